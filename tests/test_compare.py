"""Comparing two commits: what counts as a change, whose turn it is, trees and their removal, and one real comparison.

No test depends on how fast anything is: times are made up, or not looked at.
"""

from __future__ import annotations

import csv
import itertools
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("torchvision")

from benchmarks import records
from benchmarks.compare import __main__ as command
from benchmarks.compare import contest, jobs, report, tasks, trees, turns
from benchmarks.compare.contest import BASE, CONTROL, NOW, Comparison
from benchmarks.compare.side import SideError, SideProcess
from benchmarks.compare.statistics import FASTER, SAME, SLOWER, UNKNOWN, Ratio, median_interval, verdict
from benchmarks.compare.tasks import Task
from benchmarks.compare.trees import ROOT, Tree, TreeError
from benchmarks.compare.worker import Runner
from benchmarks.measure import quantiles

OP = Task("op", "bn_act", "train", torch.float32, "cpu", (2, 8, 5, 5))


# --- statistics ------------------------------------------------------------------------------------------------------


def test_interval_of_the_median() -> None:
    """The tables of the sign test: of 20 values the 4th and the 17th, of 8 all, of fewer none."""
    assert median_interval([*range(20, 0, -1)]) == (4, 17)
    assert median_interval([*range(1, 9)]) == (1, 8)
    assert median_interval([*range(7)]) is None
    assert median_interval([*range(1, 11)], confidence=0.95) == (2, 9)


def noisy(seed: int, rounds: int = 20, factor: float = 1.0, scatter: float = 0.02) -> tuple[list[float], list[float]]:
    """Times of two sides in a machine that becomes slower and has hiccups: (base, now)."""
    draw = random.Random(seed)
    base, now = [], []
    for index in range(rounds):
        common = 1e-3 * (1 + index / rounds) * (3 if draw.random() < 0.1 else 1)
        base.append(common * draw.lognormvariate(0, scatter))
        now.append(common * factor * draw.lognormvariate(0, scatter))
    return base, now


def test_the_same_code_is_the_same() -> None:
    """As often as the interval says: 5 of 500 are 1 in 100."""
    found = Counter(verdict(Ratio.of(now, base), None) for base, now in map(noisy, range(500)))
    assert found[SAME] >= 490
    ratio = Ratio.of(*noisy(0)[::-1])
    assert ratio.interval is not None
    assert ratio.interval[0] < 1 < ratio.interval[1]


@pytest.mark.parametrize(("factor", "expected"), [(1.05, SLOWER), (0.95, FASTER)])
def test_a_change_of_twice_the_scatter_is_found(factor: float, expected: str) -> None:
    found = Counter(
        verdict(Ratio.of(now, base), None) for base, now in (noisy(seed, factor=factor) for seed in range(200))
    )
    assert found[expected] >= 190
    assert found[expected] + found[SAME] == 200


def test_what_two_processes_of_base_differ_by_is_noise() -> None:
    base = [1.0 + index / 1000 for index in range(20)]
    control = Ratio.of([1.03 * value for value in base], base)
    for factor, expected in ((1.02, SAME), (0.98, SAME), (1.06, SLOWER), (0.94, FASTER)):
        ratio = Ratio.of([factor * value for value in base], base)
        assert verdict(ratio, control) == expected
        assert verdict(ratio, None) == (SLOWER if factor > 1 else FASTER)


def test_few_rounds_say_nothing() -> None:
    assert verdict(Ratio.of([9.0] * 7, [1.0] * 7), None) == UNKNOWN
    assert Ratio.of([2.0], [1.0]).quantiles.p50 == 2.0


@pytest.mark.parametrize(
    ("values", "base", "message"),
    [
        ([1.0], [1.0, 2.0], "rounds: expected as many on both sides, got 1 and 2"),
        ([], [], "got 0 and 0"),
        ([1.0], [0.0], "times: expected positive ones, got 0.0"),
        ([float("nan")], [1.0], "times: expected positive ones, got nan"),
    ],
)
def test_ratios_of_what_can_not_be_compared(values: list[float], base: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ratio.of(values, base)


# --- turns -----------------------------------------------------------------------------------------------------------


class FakeSide:
    """Says that calls take so long, and logs them; computes what eager PyTorch does."""

    def __init__(self, name: str, seconds: float, log: list[tuple[str, int]], off: float = 0.0) -> None:
        self.name, self.seconds, self.log, self.off = name, seconds, log, off

    def prepare(self, job: Path) -> dict[str, Tensor]:
        read = torch.load(job, weights_only=False)
        step, batches, quantities = tasks.prepare(read["task"], read["tensors"], read["batches"], fused=False)
        return {name: value + self.off for name, value in tasks.snapshot(quantities(step(*batches[0]))).items()}

    def warm_up(self, limit: float) -> float:
        return self.seconds

    def run(self, calls: int) -> float:
        self.log.append((self.name, calls))
        return self.seconds * (1 + len(self.log) / 1e6)


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_everyone_has_every_place_in_a_round_as_often(names: list[str]) -> None:
    rounds = 2 * len(names)
    orders = [turns.order_of(index, names) for index in range(rounds)]
    assert all(sorted(order) == names for order in orders)
    places = Counter((name, order.index(name)) for order in orders for name in names)
    assert set(places.values()) == {2}
    follows = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert len(set(follows.values())) <= 1


def test_sides_take_turns_with_the_same_number_of_calls() -> None:
    log: list[tuple[str, int]] = []
    advanced: list[None] = []
    sides = {BASE: FakeSide("a", 0.01, log), NOW: FakeSide("b", 0.05, log)}
    found = turns.take_turns(sides, 4, 1.0, lambda: advanced.append(None))
    assert [name for name, _ in log] == ["a", "b", "b", "a", "b", "a", "a", "b"]
    assert {calls for _, calls in log} == {5}
    assert {name: len(seconds) for name, seconds in found.items()} == {BASE: 4, NOW: 4}
    assert len(advanced) == 8


def test_calls_of_a_turn() -> None:
    assert [turns.calls_of_a_turn(seconds) for seconds in (2.0, 0.25, 0.1, 1e-7, 0.0)] == [1, 1, 3, 2000, 2000]


# --- the contest -----------------------------------------------------------------------------------------------------


def compared(off: float = 0.0, seconds: float = 0.01, task: Task = OP) -> Comparison:
    log: list[tuple[str, int]] = []
    names = {BASE: 0.01, NOW: seconds, CONTROL: 0.01}
    sides = {name: FakeSide(name, value, log, off if name == NOW else 0.0) for name, value in names.items()}
    (found,) = contest.compare([task], sides, 8, 0.0, 1)
    return found


def test_a_contest_of_equals() -> None:
    found = compared()
    assert (found.verdict, found.wrong) == (SAME, ())
    assert found.ratio.quantiles.p50 == pytest.approx(1, rel=1e-3)
    assert not found.fails(over=0.0)


def test_a_contest_with_a_slower_side() -> None:
    found = compared(seconds=0.02)
    assert found.verdict == SLOWER
    assert found.ratio.quantiles.p50 == pytest.approx(2, rel=1e-3)
    assert found.control is not None and found.control.quantiles.p50 == pytest.approx(1, rel=1e-3)
    assert found.fails(over=0.05) and found.fails(over=0.9) and not found.fails(over=1.1) and not found.fails(None)


def test_wrong_results_fail_however_fast() -> None:
    found = compared(off=0.1, seconds=0.001)
    assert found.verdict == contest.WRONG
    assert found.fails(None)
    assert all(text.startswith("now: ") for text in found.wrong)
    assert {text.split(" is off")[0] for text in found.wrong} >= {"now: output", "now: grad input"}


def small_tasks(dtype: torch.dtype) -> list[Task]:
    modes = ("inference", "train")
    found = list(jobs.micro_tasks(modes, [dtype], "cpu", scale=8))
    return [*found, *jobs.model_tasks(["resnet18"], modes, [2], [dtype], "cpu", 32)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_task_computes_by_resfuse_what_it_computes_eagerly(dtype: torch.dtype, one_thread: None) -> None:
    for task in small_tasks(dtype):
        job = jobs.make_job(task)
        step, batches, quantities = tasks.prepare(task, job.tensors, job.batches)
        assert len(batches) == jobs.INPUTS
        results = tasks.snapshot(quantities(step(*batches[0])))
        assert results.keys() == job.exact.keys()
        assert job.objections(results) == []
        assert job.objections({name: value * 2 + 1 for name, value in results.items()})
    assert {task.kind for task in small_tasks(dtype)} == {"model", "op", "host"}


# --- trees -----------------------------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three commits: the sources of the libraries differ in the first; the libraries are built in the checkout."""
    root = tmp_path / "checkout"
    for name in ("resfuse", "csrc"):
        (root / name).mkdir(parents=True)
    git(tmp_path, "init", "-q", str(root))
    (root / ".gitignore").write_text("*.so\nbuild/\n")
    for version, source in (("1", "old"), ("2", "new"), ("3", "new")):
        (root / "resfuse" / "__init__.py").write_text(f"__version__ = {version!r}\n")
        (root / "resfuse" / "_build.py").write_text("")
        (root / "csrc" / "kernel.cpp").write_text(source)
        (root / "setup.py").write_text("import sys; sys.exit('no compiler')")
        git(root, "add", ".")
        git(root, "commit", "-q", "-m", version)
    (root / "resfuse" / "_cpu.abi3.so").write_text("ours")
    monkeypatch.setattr(trees, "ROOT", root)
    monkeypatch.setattr(trees, "CACHE", root / "build" / "compare")
    return root


def nothing(text: str) -> None:
    pass


def test_a_commit_is_checked_out_and_gone_afterwards(repository: Path) -> None:
    with trees.checked_out("HEAD~1", nothing, cuda=False) as tree:
        assert (tree.path / "resfuse" / "__init__.py").read_text() == "__version__ = '2'\n"
        assert (tree.path / "resfuse" / "_cpu.abi3.so").read_text() == "ours"  # from the same sources
        assert tree.label == git(repository, "rev-parse", "--short", "HEAD~1")
        assert len(git(repository, "worktree", "list").splitlines()) == 2
    assert not tree.path.exists() and not tree.path.parent.exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_it_is_gone_whatever_happens(repository: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), trees.checked_out("HEAD~1", nothing, cuda=False) as tree:
        raise failure
    assert not tree.path.parent.exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_other_sources_are_built_once(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[bool] = []

    def build(folder: Path, *, cuda: bool) -> None:
        builds.append(cuda)
        (folder / "resfuse" / "_cpu.abi3.so").write_text("theirs")

    monkeypatch.setattr(trees, "_build", build)
    said: list[str] = []
    for cuda in (False, False, True):
        with trees.checked_out("HEAD~2", said.append, cuda=cuda) as tree:
            assert (tree.path / "resfuse" / "_cpu.abi3.so").read_text() == "theirs"
    assert builds == [False, True]  # the CUDA library is another build
    assert len(said) == 2 and "building BASE" in said[0]


def test_a_build_that_fails_is_told(repository: Path) -> None:
    with pytest.raises(TreeError, match=r"BASE can not be built: .*setup.py(.|\n)*no compiler"):
        trees.checked_out("HEAD~2", nothing, cuda=False).__enter__()
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_without_libraries_here_none_are_built_there(repository: Path) -> None:
    (repository / "resfuse" / "_cpu.abi3.so").unlink()
    with trees.checked_out("HEAD~2", nothing, cuda=False) as tree:
        assert not list(tree.path.glob("resfuse/*.so"))


def test_a_folder_is_left_alone(repository: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    git(repository, "worktree", "add", "-q", str(other), "HEAD~1")
    with trees.checked_out(str(other), nothing, cuda=False) as tree:
        assert tree == Tree(other, "other")
        assert (other / "resfuse" / "_cpu.abi3.so").exists()
    assert other.exists()


def test_no_such_commit(repository: Path) -> None:
    message = "BASE: expected a commit or a folder with a checkout, got 'nonsense'"
    with pytest.raises(TreeError, match=message):
        trees.checked_out("nonsense", nothing, cuda=False).__enter__()


def test_libraries_older_than_their_sources_are_noticed(repository: Path) -> None:
    library, source = repository / "resfuse" / "_cpu.abi3.so", repository / "csrc" / "kernel.cpp"
    os.utime(source, (1, 1))
    assert trees.stale_reason(repository) is None
    os.utime(library, (0, 0))
    assert trees.stale_reason(repository) == "_cpu.abi3.so is older than csrc/kernel.cpp: is it built?"


# --- processes, and the command --------------------------------------------------------------------------------------


def test_a_side_in_a_process(tmp_path: Path) -> None:
    job = jobs.make_job(OP)
    job.save(tmp_path / "job.pt", 1)
    with SideProcess(Tree(ROOT, "here"), 1) as side:
        assert "reference" in side.describe()["backends"]
        assert job.objections(side.prepare(tmp_path / "job.pt")) == []
        assert side.warm_up(0.0) > 0
        assert side.run(2) > 0
        with pytest.raises(SideError, match=r"here: (.|\n)*No such file"):
            side.prepare(tmp_path / "none.pt")
        assert side.run(1) > 0  # it goes on
        process = side._process
    assert process.returncode == 0


def test_a_side_that_imports_something_else(tmp_path: Path) -> None:
    (tmp_path / "resfuse.py").write_text("raise SystemExit(7)")
    with SideProcess(Tree(tmp_path, "broken"), 1) as side, pytest.raises(SideError, match="broken: its process ended"):
        side.describe()
    with pytest.raises(ImportError, match=f"resfuse: expected that of {tmp_path}, got {ROOT}"):
        Runner(tmp_path).describe()


@pytest.mark.slow
def test_this_tree_against_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "compare.csv"
    arguments = "--model resnet18 --batch 2 --size 32 --rounds 1 --warm-up 0 --threads 1 --device cpu --mode train"
    assert command.main([str(ROOT), *arguments.split(), "--fail-over", "5%", "--csv", str(path)]) == 0
    output = capsys.readouterr().out
    assert "1 compared: nothing beyond the noise (too few rounds for an interval" in output
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["kind"], row["name"], row["shape"], row["rounds"]) == ("model", "resnet18", "2x3x32x32", "1")
    assert float(row["ratio_p50"]) > 0 and row["low"] == "" and float(row["control_p50"]) > 0


def test_no_such_base_is_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["no-such-commit-or-folder", "--device", "cpu"]) == 2
    assert "BASE: expected a commit or a folder" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_ends_it_and_leaves_nothing(
    number: int, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(tree: Tree, threads: int) -> SideProcess:
        assert len(git(repository, "worktree", "list").splitlines()) == 2
        os.kill(os.getpid(), number)
        time.sleep(60)
        raise AssertionError("it goes on")

    monkeypatch.setattr(command, "SideProcess", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    assert command.main(["HEAD~1", "--device", "cpu"]) == 130
    assert signal.getsignal(signal.SIGTERM) == before
    assert "interrupted" in capsys.readouterr().err
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_arguments() -> None:
    planned = command.planned(command.parse(["HEAD", "--device", "cpu", "--mode", "inference", "train"]))
    assert [(task.mode, task.shape[0]) for task in planned] == [("inference", 1), ("inference", 16), ("train", 8)]
    micro = command.parse(["HEAD", "--device", "cuda", "--model", "--micro", "--dtype", "bfloat16"])
    assert Counter(task.kind for task in command.planned(micro)) == {"op": 4, "host": 4}
    assert command.parse(["HEAD", "--fail-over", "5%"]).fail_over == pytest.approx(0.05)
    assert command.part("0.1") == 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fail-over", "much"], "expected a part such as 5% or 0.05, got 'much'"),
        (["--fail-over=-3%"], "expected a part such as"),
        (["--rounds", "0"], "expected a whole number above 0"),
        (["--device", "cuda:1"], "got cuda:1"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse(["HEAD", *arguments])
    assert message in capsys.readouterr().err


def test_what_is_shown_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, now = noisy(1, factor=1.2)
    slower = Comparison(OP, quantiles(base), quantiles(now), Ratio.of(now, base), Ratio.of(base, base))
    wrong = compared(off=0.1)
    conditions = records.Conditions("a processor", 2, "torch 0", "abc", "2026-01-01")
    report.show([slower, wrong])
    shown = capsys.readouterr().out
    assert "2 compared: 1 slower, 1 wrong" in shown
    assert "wrong: bn_act, train, 2x8x5x5, float32: now: output is off by" in shown
    heading, line, _ = report.lines([slower, wrong])
    assert heading.split()[0] == "base"
    assert f"{slower.ratio.quantiles.p50:.3f}" in line and line.endswith("slower")
    report.write(tmp_path / "compare.csv", [slower, wrong], ("abc", "def+"), conditions)
    with (tmp_path / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["verdict"] for row in rows] == ["slower", "wrong"]
    assert float(rows[0]["ratio_p50"]) == pytest.approx(slower.ratio.quantiles.p50, rel=1e-5)
    assert (rows[0]["base"], rows[0]["now"], rows[0]["device"]) == ("abc", "def+", "a processor")
