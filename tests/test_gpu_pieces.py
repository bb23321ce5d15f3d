"""`make gpu`, as far as it goes without a GPU: limits, crashes, what is kept and gone on with, all command lines."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import build, outcomes, pieces, process, sanitize, suite, summary, wheels
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.pieces import PIECES, Piece, Step
from benchmarks.gpu.runner import DONE, FAILED, LEFT, OUT, Runner, status
from benchmarks.gpu.store import ARCHIVE, STATE, SUMMARY, Store
from tests import needs, sharing

ROOT = Path(__file__).resolve().parent.parent


# --- processes -------------------------------------------------------------------------------------------------------


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_command_is_logged_and_its_status_returned(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "one.log"
    first = process.run(python("print('first'); raise SystemExit(3)"), log=log, limit=60)
    second = process.run(python("print('second')"), log=log, limit=60)
    assert (first.status, second.status) == (3, 0)
    assert (first.tail.strip(), second.tail.strip()) == ("first", "second")
    assert log.read_text().split() == ["first", "second"]


def test_a_limit_ends_the_whole_family(tmp_path: Path) -> None:
    child = "import subprocess; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    beats: list[float] = []
    done = process.run(python(child), log=tmp_path / "log", limit=1.5, beat=lambda: beats.append(time.time()), grace=1)
    assert done.status is None
    assert done.seconds < 30
    assert beats
    pid = int(done.tail.split()[0])
    deadline = time.time() + 20
    while Path(f"/proc/{pid}/stat").exists() and time.time() < deadline:
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return  # dead, and not yet collected by whoever adopts orphans here
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()


def test_who_stops_in_good_order_has_time_to(tmp_path: Path) -> None:
    code = "import time\ntry:\n time.sleep(600)\nexcept KeyboardInterrupt:\n print('written')"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it, and its children
    try:
        done = process.run(python(code), log=tmp_path / "log", limit=3, grace=20)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.status, done.tail.strip()) == (None, "written")


# --- the suite -------------------------------------------------------------------------------------------------------

SAMPLE = """
import os, time
import pytest

@pytest.mark.parametrize("number", range(15))
def test_many(number):
    assert number != 7, "seven is wrong"

def test_crash():
    os.abort()

def test_hang():
    time.sleep(600)

def test_skipped():
    pytest.skip("no reason")

@pytest.mark.slow
def test_after_all():
    pass
"""


def test_the_suite_survives_crashes_and_hangs_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    share = tmp_path / "share"
    command = ["--share", str(share), "--device", "cpu", "--workers", "2", "--per-test", "4", "--limit", "120", "--"]
    assert suite.main([*command, str(tmp_path / "test_sample.py")]) == 1
    printed = capsys.readouterr().out
    assert "3 failed, 15 passed, 1 skipped" in printed
    for expected in ("test_crash: crashed: signal SIGABRT", "test_hang: hung", "seven is wrong", "no reason"):
        assert expected in printed
    report = json.loads((share / outcomes.MERGED).read_text())
    assert (report["left"], len(report["failures"])) == (0, 3)
    records = [record for path in share.glob("*.jsonl") for record in sharing.records(path) if "outcome" in record]
    assert max(Counter(record["test"] for record in records).values()) == 1, "a test ran twice"
    assert suite.main([*command, str(tmp_path / "test_sample.py")]) == 1, "outcomes are kept"
    assert "3 failed, 15 passed, 1 skipped" in capsys.readouterr().out
    assert sum(1 for path in share.glob("*.jsonl") for record in sharing.records(path) if "started" in record) == 19


def test_a_suite_that_can_not_be_collected_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_broken.py").write_text("import no_such_package_at_all")
    command = ["--share", str(tmp_path / "share"), "--device", "cpu", "--workers", "1", "--limit", "60", "--"]
    assert suite.main([*command, str(tmp_path / "test_broken.py")]) == 2
    printed = capsys.readouterr().out
    assert "no_such_package_at_all" in printed
    assert "no test was run" in printed


def test_what_runs_on_the_gpu_is_claimed_first() -> None:
    tests = [("a.py::plain", False), ("a.py::slow[cuda]", True), ("b.py::x[cuda-cuda]", False)]
    tests += [("a.py::y[cuda_emulator]", False), ("a.py::slow", True)]
    assert sharing.chunks(tests) == [
        ["b.py::x[cuda-cuda]"], ["a.py::plain", "a.py::y[cuda_emulator]"], ["a.py::slow[cuda]"], ["a.py::slow"],
    ]  # fmt: skip
    many = sharing.chunks([(f"a.py::t{number}", False) for number in range(30)])
    assert [len(chunk) for chunk in many] == [12, 12, 6]


def test_lines_that_are_being_written_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text('{"started": "a", "at": 1}\n{"test": "a", "outco')
    assert sharing.records(path) == [{"started": "a", "at": 1}]
    assert sharing.last_record(path) == {"started": "a", "at": 1}
    assert sharing.last_record(tmp_path / "none") == {}


def test_files_are_left_out_for_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    assert "timm" in needs.needed(ROOT / "tests" / "test_surgery_timm.py")
    assert "rich" in needs.needed(ROOT / "tests" / "test_triton_tune.py"), "through resfuse.cli.tune"
    monkeypatch.setattr(needs.importlib.util, "find_spec", lambda name: None if name == "timm" else find(name))
    found = needs.left_out(ROOT / "tests")
    assert found["test_surgery_timm.py"] == ["timm"]
    assert "test_bn_act.py" not in found


# --- what is kept ----------------------------------------------------------------------------------------------------


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


# --- pieces ----------------------------------------------------------------------------------------------------------


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
    assert all(any(step.rehearsal is not None for step in piece.steps) for piece in PIECES if piece.name not in LATER)


LATER = ("models", "tune-more")
"""Pieces that run what others do, on other networks."""


# --- build, wheels, sanitizer ----------------------------------------------------------------------------------------


def test_libraries_are_taken_only_if_all_is_the_same(tmp_path: Path) -> None:
    package, keep = tmp_path / "package", tmp_path / "keep"
    package.mkdir()
    for name in build.BUILT:
        (package / name).write_text(f"new {name}")
    wanted = build.key("9.0a", "2.11.0")
    build.preserve(keep, wanted, package)
    for name in build.BUILT:
        (package / name).write_text("old")
    assert not build.restore(keep, build.key("8.0+PTX", "2.11.0"), package)
    assert not build.restore(tmp_path / "none", wanted, package)
    assert (package / build.BUILT[0]).read_text() == "old"
    assert build.restore(keep, wanted, package)
    assert [(package / name).read_text() for name in build.BUILT] == [f"new {name}" for name in build.BUILT]


def test_only_the_gpu_that_is_there_is_built_for() -> None:
    assert [build.arch_list(one) for one in ((9, 0), (8, 6), (10, 0))] == ["9.0a", "8.6+PTX", "10.0+PTX"]


def test_an_old_setuptools_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    setuptools = pytest.importorskip("setuptools")
    assert not [reason for reason in build.objections("cpu", os.environ) if "setuptools" in reason]
    monkeypatch.setattr(setuptools, "__version__", "70.1")
    assert any("setuptools 70.1 is too old" in reason for reason in build.objections("cpu", os.environ))


def test_wheels_are_unpacked_without_a_network(tmp_path: Path) -> None:
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip("pip is not installed")
    folder, site = tmp_path / "wheels", tmp_path / "site"
    with pytest.raises(ValueError, match="has no files"):
        wheels.install(folder, site)
    folder.mkdir()
    info = "brought_along-1.0.dist-info"
    with zipfile.ZipFile(folder / "brought_along-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("brought_along.py", "there = True\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: brought-along\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    wheels.install(folder, site)
    assert (site / "brought_along.py").is_file()
    (folder / "broken-1.0-py3-none-any.whl").write_text("no wheel")
    with pytest.raises(ValueError, match="pip could not install"):
        wheels.install(folder, site)


def test_verdicts_of_the_sanitizer() -> None:
    def of(code: int | None, text: str) -> object:
        return sanitize.verdict(process.Finished(code, 2.0, text))["status"]

    assert of(0, "1.0\n113 problems\n========= ERROR SUMMARY: 0 errors\n") == "passed"
    assert of(0, "nothing ran") == "failed"
    assert of(99, "========= Invalid __global__ read of size 4 bytes\n") == "found"
    assert of(1, "Traceback") == "failed"
    assert of(None, "") == "unfinished"
    found = sanitize.verdict(process.Finished(99, 2.0, "x\n========= Invalid read\n=========\n"))
    assert found["text"] == "========= Invalid read"


def test_every_tool_sees_both_backends() -> None:
    jobs = sanitize.jobs("cuda")
    assert len(set(jobs)) == len(sanitize.TOOLS) * 2 * 3
    assert jobs[0].backend == "cuda" and jobs[-1].backend == "triton"
    assert jobs[0].command("/bin/tool")[:5] == ["/bin/tool", "--tool", "memcheck", "--error-exitcode", "99"]
    lines = sanitize.lines({str(jobs[0]): {"status": "found", "text": "a\nb"}}, jobs[:2])
    assert lines[1:] == ["  memcheck cuda bfloat16: found a | b", "  racecheck cuda bfloat16: not started "]


# --- the summary, and all of it --------------------------------------------------------------------------------------


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
