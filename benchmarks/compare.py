"""This tree against another commit: both in processes of their own, in turns, on one machine.

The tree of BASE is kept in build/compare.  Its C++ and CUDA libraries are copies of this tree's where the sources are
the same; else they are built there, once.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import math
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import models
from benchmarks.case import DTYPES, Setting
from benchmarks.harness import order, say
from benchmarks.overhead import MODES, TINY
from benchmarks.steps import make_workload
from benchmarks.worker import ROOT, Worker

CACHE = ROOT / "build" / "compare"
NATIVE = ("csrc", "resfuse/_build.py", "setup.py")
TIMEOUT = 900.0
CALLS = 200
"""Calls of an operator whose host time is taken together."""


class Ratio(NamedTuple):
    """Time of this tree over time of BASE; less than 1 is faster."""

    name: str
    base: float
    this: float
    """Medians, in seconds."""
    median: float
    low: float
    high: float
    """Median and interval of the ratios of the rounds, which pair the sides: whatever slows a round down cancels."""

    @property
    def verdict(self) -> str:
        """slower or faster where the interval of the ratio excludes 1."""
        return "slower" if self.low > 1 else "faster" if self.high < 1 else "same"


def ratio(name: str, base: Sequence[float], this: Sequence[float]) -> Ratio:
    """The ratio of two sides that took part in the same rounds, with its 95 % interval."""
    ratios = [mine / other for mine, other in zip(this, base, strict=True)]
    interval = median_interval(ratios)
    return Ratio(name, statistics.median(base), statistics.median(this), statistics.median(ratios), *interval)


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The interval of the median by the sign test, whatever the distribution; all values where they are too few (< 6).

    Source: Conover 1999, Practical Nonparametric Statistics, section 3.2.
    """
    ordered, n = sorted(values), len(values)
    below, tail = 0, 0.5**n
    while 2 * tail <= 1 - confidence:
        below += 1
        tail += math.comb(n, below) * 0.5**n
    return ordered[max(below - 1, 0)], ordered[n - max(below, 1)]


def checked_out(base: str, cuda: bool) -> tuple[Path, str]:
    """(folder, short commit) of a commit's tree with its libraries.

    Raises:
        ValueError: there is no such commit.
        RuntimeError: its libraries cannot be built.
    """
    found = _git("rev-parse", "--verify", "--quiet", "--short", f"{base}^{{commit}}")
    if found.returncode:
        raise ValueError(f"BASE: expected a commit, got {base!r}")
    commit = found.stdout.strip()
    folder = CACHE / f"{commit}{'-cuda' * cuda}"
    if not folder.is_dir() or (_built(ROOT) and not _built(folder)):
        shutil.rmtree(folder, ignore_errors=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            archive, tree = Path(scratch, "tree.tar"), Path(scratch, "tree")
            _git("archive", "--output", str(archive), commit)
            with tarfile.open(archive) as packed:
                packed.extractall(tree, filter="data")
            provide_libraries(tree, cuda)
            tree.rename(folder)  # which is complete, then
    return folder, commit


def provide_libraries(folder: Path, cuda: bool) -> None:
    """Give a tree the libraries of its sources: this tree's, or a build in place; none where this tree has none."""
    ours = _built(ROOT)
    if ours and native_digest(folder) == native_digest(ROOT):
        for path in ours:
            shutil.copy2(path, folder / "resfuse")
    elif ours:
        say("The C++ and CUDA sources differ: building BASE (minutes; once)")
        environment = os.environ | ({} if cuda else {"RESFUSE_SKIP_CUDA_BUILD": "1", "FORCE_CUDA": "0"})
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode or not _built(folder):
            raise RuntimeError(f"BASE cannot be built:\n{(done.stdout + done.stderr)[-4000:]}")


def native_digest(folder: Path) -> str:
    """Hash of everything that the libraries of a tree depend on."""
    digest = hashlib.sha256()
    for name in NATIVE:
        start = folder / name
        for path in sorted(start.rglob("*")) if start.is_dir() else [start]:
            if path.is_file():
                digest.update(f"\0{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _built(folder: Path) -> list[Path]:
    libraries = sorted((folder / "resfuse").glob("*.so"))
    return [*libraries, *(folder / "resfuse").glob("_build_info.json")] if libraries else []


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)


def compare_models(sides: dict[str, Worker], args: argparse.Namespace) -> Iterator[Ratio]:
    """Steps of models, after a check of both sides against float64."""
    for mode, batch, dtype in itertools.product(args.mode, args.batch, args.dtype):
        setting = Setting(mode, DTYPES[dtype], args.device, args.threads)
        for case in models.cases(args.model, batch, args.size):
            workload = make_workload(case, setting)
            with tempfile.NamedTemporaryFile(suffix=".pt") as file:
                torch.save(workload, file.name)
                for name, side in sides.items():
                    errors = side.ask("prepare", Path(file.name), timeout=TIMEOUT)
                    if complaint := workload.complaint(errors):
                        raise RuntimeError(f"{name}, {case.name}: {complaint}")

            def turn(side: Worker) -> float:
                times = side.ask("turn", 0.0 if args.quick else 0.25, timeout=TIMEOUT)
                return statistics.median(times["time"])

            yield _rounds(f"{case.name}, {mode}, {dtype}, {case.shape}", sides, args.rounds, turn)


def compare_overhead(sides: dict[str, Worker], args: argparse.Namespace) -> Iterator[Ratio]:
    """Host time of single calls on tiny tensors."""
    for name in TINY:
        for mode in MODES:
            for side in sides.values():
                side.ask("prepare_overhead", name, mode, args.device, timeout=TIMEOUT)
            turn = lambda side: side.ask("host_turn", 5 if args.quick else CALLS, timeout=TIMEOUT)  # noqa: E731
            yield _rounds(f"{name}, {mode}, host time", sides, args.rounds, turn)


def _rounds(title: str, sides: dict[str, Worker], rounds: int, turn: Callable[[Worker], float]) -> Ratio:
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(-1, rounds):  # the first round does not count
        for name in order(list(sides), index):
            found = turn(sides[name])
            if index >= 0:
                seconds[name].append(found)
    return ratio(title, seconds["base"], seconds["this"])


def line(found: Ratio) -> str:
    """One line of the table."""
    return (
        f"{found.name:<48} {found.base * 1e3:10.4g} {found.this * 1e3:10.4g} "
        f"{found.median:7.3f} [{found.low:.3f}, {found.high:.3f}] {found.verdict}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 where something is slower by more than --fail-over; 2 where BASE cannot be compared with."""
    args = _parse(argv)
    slower = []
    try:
        folder, commit = checked_out(args.base, args.device.startswith("cuda"))
        trees = {"base": folder, "this": ROOT}
        with contextlib.ExitStack() as stack:
            threads = 1 if args.overhead else args.threads
            sides = {name: stack.enter_context(Worker("resfuse", tree, threads)) for name, tree in trees.items()}
            for name, side in sides.items():
                found = side.ask("versions", timeout=TIMEOUT)
                if Path(found["path"]).parent.resolve() != trees[name].resolve():
                    raise RuntimeError(f"{name}: expected {trees[name]}, imported {found['path']}")
                say(f"{name}: {commit if name == 'base' else 'this tree'}, backends {', '.join(found['backends'])}")
            say(f"{'':<48} {'base ms':>10} {'this ms':>10} {'ratio':>7} and 95 % interval; below 1 is faster")
            for one in (compare_overhead if args.overhead else compare_models)(sides, args):
                say(line(one))
                if args.fail_over is not None and one.low > 1 + args.fail_over / 100:
                    slower.append(one.name)
    except (ValueError, RuntimeError) as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        return 2
    return int(bool(slower))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("base", metavar="BASE", help="the commit to compare with: HEAD~1")
    add("--overhead", action="store_true", help="host time of single calls on tiny tensors instead of models")
    add("--model", nargs="+", default=["resnet50"], help="default %(default)s")
    add("--mode", nargs="+", choices=("inference", "train"), default=["inference"], help="default %(default)s")
    add("--batch", nargs="+", type=int, default=[16], help="default %(default)s")
    add("--size", type=int, help="height and width of the images (default: the network's own)")
    add("--dtype", nargs="+", choices=list(DTYPES), default=["float32"], help="default %(default)s")
    add("--rounds", type=int, default=20, help="turns of each side (default %(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="on the CPU (default %(default)s)")
    add("--device", default="cuda" if gpu else "cpu", help="default %(default)s")
    add("--fail-over", type=float, metavar="PERCENT", help="exit with 1 where the interval lies beyond so much slower")
    add("--quick", action="store_true", help="short turns: a trial, not a measurement")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
