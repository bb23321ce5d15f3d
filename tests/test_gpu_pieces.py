"""`make gpu`, as far as it goes without a GPU: what is kept and gone on with, all command lines, a rehearsal."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import pieces, process, summary
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.pieces import PIECES, Piece, Step
from benchmarks.gpu.runner import DONE, FAILED, LEFT, OUT, Runner, status
from benchmarks.gpu.store import ARCHIVE, STATE, SUMMARY, Store

ROOT = Path(__file__).resolve().parent.parent


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_another_machine_goes_on_with_three_files(tmp_path: Path) -> None:
    first = Store(tmp_path / "out", tmp_path / "work")
    (first.work / "bench").mkdir()
    (first.work / "bench" / "model-train.csv").write_text("a,b\n")
    (first.work / "scratch").mkdir()
    (first.work / "scratch" / "large").write_bytes(b"x" * 1000)
    (first.work / "chatter.log").write_bytes(b"first" + b"x" * (5 << 20) + b"last")
    first.pieces["build"] = {"steps": {"build": {"status": DONE}}}
    first.save("the summary")
    assert sorted(path.name for path in first.output.iterdir()) == sorted([STATE, SUMMARY, ARCHIVE])
    second = Store(tmp_path / "out", tmp_path / "elsewhere")
    assert second.pieces == first.pieces
    assert (second.work / "bench" / "model-train.csv").read_text() == "a,b\n"
    assert not (second.work / "scratch").exists()
    chatter = (second.work / "chatter.log").read_bytes()
    assert chatter.endswith(b"last") and len(chatter) == 4 << 20


def test_the_same_machine_keeps_what_it_has(tmp_path: Path) -> None:
    first = Store(tmp_path / "out", tmp_path / "work")
    first.save()
    (first.work / "newer").write_text("than the archive")
    assert (Store(tmp_path / "out", tmp_path / "work").work / "newer").exists()
    other = Store(tmp_path / "other", tmp_path / "work")  # which is of another run
    assert not (other.work / "newer").exists()


def test_a_folder_that_is_not_one_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / STATE).write_text("[1")
    assert main(["--output", str(tmp_path), "--work", str(tmp_path / "work")]) == 2
    assert "is not JSON" in capsys.readouterr().err
    (tmp_path / STATE).write_text('{"version": 7}')
    with pytest.raises(ValueError, match="another version"):
        Store(tmp_path, tmp_path / "work")
    (tmp_path / STATE).write_text('{"version": 1, "run": "x", "pieces": {"build": {}}}')
    with pytest.raises(ValueError, match=rf"{ARCHIVE} is missing"):
        Store(tmp_path, tmp_path / "work")


def test_the_archive_is_renewed_while_a_piece_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "out", tmp_path / "work")
    (store.work / "half.csv").write_text("so far")
    store.beat()
    with tarfile.open(store.output / ARCHIVE) as packed:
        assert {"run", "half.csv"} == set(packed.getnames())
    (store.work / "later.csv").write_text("more")
    store.beat()  # too soon
    with tarfile.open(store.output / ARCHIVE) as packed:
        assert "later.csv" not in packed.getnames()


# --- pieces -----------------------------------------------------------------------------------------------------------


def piece(*steps: Step, name: str = "one", every_call: bool = False) -> Piece:
    return Piece(name, "test", "of a test", 1, steps, every_call=every_call)


def runner(tmp_path: Path, limit: float = 600) -> Runner:
    return Runner(Store(tmp_path / "out", tmp_path / "work"), "cpu", True, limit)


def step(name: str, *arguments: str, **options: Any) -> Step:
    return Step(name, "this", rehearsal=arguments, **options)  # `python -m this` is short, and takes any arguments


def test_what_is_done_is_not_repeated(tmp_path: Path) -> None:
    works, missing = step("works"), step("missing", needs=("no_such_package",))
    broken = Step("broken", "no_such_module", rehearsal=())
    first = runner(tmp_path)
    first.do([piece(works, missing, broken)])
    steps = first._store.pieces["one"]["steps"]
    assert {name: one["status"] for name, one in steps.items()} == {"works": DONE, "missing": OUT, "broken": FAILED}
    assert "no_such_package" in steps["missing"]["why"]
    assert "No module named no_such_module" in steps["broken"]["tail"]
    log = tmp_path / "work" / "logs" / "one.log"
    before = log.read_text()
    runner(tmp_path).do([piece(works, missing, broken)])
    assert log.read_text() == before
    runner(tmp_path).do([piece(works, missing, broken)], again=True)
    assert len(log.read_text()) == 2 * len(before)


def test_nothing_is_begun_that_can_not_end(tmp_path: Path) -> None:
    first = runner(tmp_path, limit=10)
    first.do([piece(step("works"))])
    assert first._store.pieces == {}
    long, short = Step("long", "this", least=9), Step("short", "this")
    real = Runner(first._store, "cpu", False, 300)
    assert (real._least(long), real._least(short)) == (270, 30)
    real._end -= 100
    real.do([piece(long, short)])
    assert list(first._store.pieces["one"]["steps"]) == ["short"], "which fits into what is left"


def test_a_fresh_machine_builds_again_if_there_is_anything_to_do(tmp_path: Path) -> None:
    always, other = piece(step("build"), name="build", every_call=True), piece(step("works"))
    log = tmp_path / "work" / "logs" / "build.log"
    for expected in (1, 1):  # the second time nothing is left
        runner(tmp_path).do([always, other])
        assert log.read_text().count("$ ") == expected
    runner(tmp_path).do([always, piece(step("more"))])
    assert log.read_text().count("$ ") == 2


def test_tests_begin_anew_where_the_sources_changed(tmp_path: Path) -> None:
    first = runner(tmp_path)
    first._store.pieces.update({"suite": {"steps": {}}, "aims": {"steps": {}}})
    (first._store.work / "suite").mkdir()
    first._store.state["sources"] = "others"
    first._store.save()
    second = runner(tmp_path)
    assert set(second._store.pieces) == {"aims"}
    assert not (second._store.work / "suite").exists()


@pytest.mark.parametrize(
    ("code", "tail", "expected"),
    [
        (0, "Wrote a.csv", DONE), (1, "1 failed", FAILED), (-9, "", FAILED), (None, "", LEFT), (75, "", LEFT),
        (0, "The time is up: left are resnet50", LEFT),
        (0, "Left for the next run (--resume), as --limit is near: x", LEFT),
    ],
)  # fmt: skip
def test_how_a_step_ended(code: int | None, tail: str, expected: str) -> None:
    assert status(process.Finished(code, 1.0, tail)) == expected


def test_names_and_groups() -> None:
    assert [one.name for one in pieces.named(["tune", "aims"], None)] == ["build", "aims", "tune"]
    assert {one.group for one in pieces.named(None, ["bench"])} == {"bench", "test"}, "with the build"
    assert [one.name for one in pieces.named(["report"], None)] == ["report"]
    assert pieces.named(None, None) == list(PIECES)
    with pytest.raises(ValueError, match=r"--piece: expected some of .*, got fly"):
        pieces.named(["fly"], None)


class _ParsedError(Exception):
    """The command line is a right one."""


STEPS = {f"{piece.name}-{step.name}": step for piece in PIECES for step in piece.steps}


@pytest.mark.parametrize("name", STEPS)
def test_every_command_line_is_understood(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for the GPU too: only the parsing, by the program's own parser."""
    one = STEPS[name]
    for package in one.needs:
        pytest.importorskip(package)
    parse = argparse.ArgumentParser.parse_args

    def parsed(self: argparse.ArgumentParser, *args: Any, **options: Any) -> argparse.Namespace:
        parse(self, *args, **options)
        raise _ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    module = one.module
    entry = {"resfuse": "resfuse.cli", "benchmarks.memory": "benchmarks.memory.__main__"}.get(module, module)
    for device, arguments in (("cuda", one.arguments), ("cpu", one.rehearsal)):
        if arguments is not None:
            words = {"work": tmp_path, "device": device, "limit": "100"}
            with pytest.raises(_ParsedError):
                importlib.import_module(entry).main([argument.format(**words) for argument in arguments])


def test_the_pieces_are_short_enough() -> None:
    assert all(piece.minutes <= 8 and all(step.minutes <= 8 for step in piece.steps) for piece in PIECES)
    assert all(any(step.rehearsal is not None for step in piece.steps) for piece in PIECES)


# --- the summary, and all of it ---------------------------------------------------------------------------------------


def test_the_summary_is_short(tmp_path: Path) -> None:
    failed = {"status": FAILED, "exit": 1, "tail": "a\nb\nthe last word", "seconds": 3}
    known = {one.name: {"steps": {each.name: failed for each in one.steps}} for one in PIECES}
    text = summary.lines(known, tmp_path)
    assert len(text) <= summary.LONGEST
    assert any("exit status 1: a | b | the last word" in line for line in text)
    assert text[-1] == "nothing is left"
    assert summary.lines({}, tmp_path) == [f"left: {', '.join(p.name for p in PIECES)}; the same command goes on there"]


def test_the_summary_survives_results_that_can_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "model-train.csv").write_text("no,such\ncolumns,here\n")
    assert any(line.startswith("aims (bench): not read, ") for line in summary.lines({}, tmp_path))


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--limit", "0"], "expected seconds above 0, got 0"), (["--device", "cpu"], "cpu is for rehearsals"),
        (["--group", "fly"], "invalid choice: 'fly'"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as exit_code:
            main(arguments)
        assert exit_code.value.code == 2
        assert message in capsys.readouterr().err
    assert main(["--piece", "fly"]) == 2
    assert "got fly" in capsys.readouterr().err


@pytest.mark.slow
def test_rehearsal(tmp_path: Path) -> None:
    """Every piece, by the command that a GPU machine runs, with the smallest arguments there are."""
    pytest.importorskip("torchvision")
    pytest.importorskip("rich")
    folders = ["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick", "--limit", "900", *folders]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "EMU_OFF": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    state = json.loads((tmp_path / "out" / STATE).read_text())
    statuses = {f"{name}: {s}": one for name, p in state["pieces"].items() for s, one in p["steps"].items()}
    wrong = {name: one for name, one in statuses.items() if one["status"] not in (DONE, OUT)}
    assert done.returncode == 0 and not wrong, f"{done.stdout}\n{done.stderr}\n{json.dumps(wrong, indent=1)}"
    assert set(state["pieces"]) == {piece.name for piece in PIECES}
    assert done.stdout.splitlines()[-2] == "nothing is left"
    assert len(list((tmp_path / "out").iterdir())) == 3
    with tarfile.open(tmp_path / "out" / ARCHIVE) as packed:
        names = set(packed.getnames())
    expected = {"untuned/model-inference.csv", "bench/model-train.csv", "bench/memory.csv", "bench/report.md"}
    assert expected | {"suite/suite.json", "sanitize/sanitize.json", "logs/check.log"} <= names
