"""Comparing two commits: trees and their removal, processes, and the command.

What counts as a change is in test_compare_statistics.py.  No test depends on how fast anything is.
"""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")

from benchmarks.compare import __main__ as command
from benchmarks.compare import jobs, trees
from benchmarks.compare.side import SideError, SideProcess
from benchmarks.compare.tasks import Task
from benchmarks.compare.trees import ROOT, Tree, TreeError
from benchmarks.compare.worker import Runner

OP = Task("op", "bn_act", "train", torch.float32, "cpu", (2, 8, 5, 5))


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
    arguments = (
        "--model resnet18 --batch 2 --size 32 --rounds 1 --warm-up 0 --no-control --threads 1 --device cpu --mode train"
    )
    assert command.main([str(ROOT), *arguments.split(), "--fail-over", "5%", "--csv", str(path)]) == 0
    output = capsys.readouterr().out
    assert "1 compared: nothing beyond the noise (too few rounds for an interval" in output
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["kind"], row["name"], row["shape"], row["rounds"]) == ("model", "resnet18", "2x3x32x32", "1")
    assert float(row["ratio_p50"]) > 0 and row["low"] == "" and row["control_p50"] == ""


def test_no_such_base_is_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["no-such-commit-or-folder", "--device", "cpu"]) == 2
    assert "BASE: expected a commit or a folder" in capsys.readouterr().err


@pytest.fixture
def _heeding_interrupts() -> Iterator[None]:
    """A job in the background ignores SIGINT, and so would this process as its child."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_heeding_interrupts")
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
