"""Measure resfuse against its peers, or make a report of what was measured (in a checkout)."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

LEVELS = ("op", "layer", "block", "model")
MODES = ("inference", "train")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RESULTS, TRIALS = Path("benchmarks/results"), Path("out/bench")
"""Folders of the CSV files, unless told otherwise: of measurements, and of trials, whose figures mean nothing."""
ROOT = Path(__file__).resolve().parents[2]
"""Of the checkout, where this is one."""
OPTIONS = ("model", "batch", "dtype", "provider")
"""Handed on to `benchmarks.run`."""
MISSING = (
    "The benchmarks come with a checkout of resfuse, not with the installed package. "
    "Clone the repository and run `python -m resfuse bench` in its root."
)


class Run(NamedTuple):
    """One call of `benchmarks.run`: a level and a mode."""

    level: str
    mode: str
    model: tuple[str, ...] = ()
    batch: tuple[int, ...] = ()
    dtype: tuple[str, ...] = ()
    provider: tuple[str, ...] = ()


PLANS = {
    "cpu": (
        Run("model", "inference", ("resnet50",), (1, 16), ("float32", "bfloat16")),
        Run("model", "train", ("resnet50",), (8,), ("float32",)),
        Run("layer", "inference", ("resnet50",), (8,), ("float32",)),
    ),
    "cuda": (
        Run("model", "inference", ("resnet50",), (1, 128), ("bfloat16",)),
        Run("model", "train", ("resnet50",), (256,), ("bfloat16",)),
        Run("layer", "inference", ("resnet50",), (128,), ("bfloat16",)),
        Run("layer", "train", ("resnet50",), (128,), ("bfloat16",)),
    ),
}
"""What says most in the least time, by the type of the device."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--level", nargs="+", choices=LEVELS, help="default: models, and the layers of ResNet-50")
    parser.add_argument("--mode", nargs="+", choices=MODES, help="default: both")
    parser.add_argument("--model", nargs="+", help="networks (default: resnet50)")
    parser.add_argument("--batch", nargs="+", type=int, help="batch sizes (default: some for the machine)")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--provider", nargs="+", metavar="NAME", help="default: all that can run here")
    parser.add_argument("--device", choices=list(PLANS), help="default: cuda where there is a GPU")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="begin nothing after that; --resume goes on")
    parser.add_argument("--resume", action="store_true", help="leave out what the files have of this commit")
    parser.add_argument("--quick", action="store_true", help="small and short: a trial, not a measurement")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be measured, and how long it takes")
    parser.add_argument("--output", type=Path, help=f"folder of the CSV files (default {RESULTS}, of trials {TRIALS})")
    parser.add_argument(
        "--report", nargs="*", type=Path, metavar="FOLDER",
        help="measure nothing: from the CSV files in all these, draw plots, and write report.md into the first "
        "(default: the folder of --output)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    args.output = args.output or (TRIALS if args.quick else RESULTS)
    if not benchmarks_found():
        print(MISSING, file=sys.stderr)
        return 1
    if args.report is not None:
        return _benchmark("summary", [str(folder) for folder in args.report or [args.output]])
    runs = plan(args)
    try:
        _announce(runs, args)
    except ValueError as error:  # a network or a provider that does not exist
        print(error, file=sys.stderr)
        return 2
    if args.dry_run:
        return 0
    if device_type(args) == "cuda" and not torch.cuda.is_available():
        print("device: cuda was asked for, but torch.cuda sees no GPU here", file=sys.stderr)
        return 1
    return _measure(runs, args)


def benchmarks_found() -> bool:
    """Whether the benchmarks of a checkout can be imported; where this file lies in one, they can from then on."""
    if (ROOT / "benchmarks" / "run.py").is_file() and str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    found = importlib.util.find_spec("benchmarks")
    return found is not None and importlib.util.find_spec("benchmarks.run") is not None


def device_type(args: argparse.Namespace) -> str:
    """The one asked for, or the best there is."""
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def plan(args: argparse.Namespace) -> list[Run]:
    """What the arguments ask for; the machine's plan, as far as they ask for nothing else."""
    default = PLANS[device_type(args)]
    asked = [(level, mode) for level in args.level or () for mode in args.mode or MODES]
    if asked:
        dtype = default[-1].dtype
        runs = [next((run for run in default if run[:2] == pair), Run(*pair, dtype=dtype)) for pair in asked]
    else:
        runs = [run for run in default if run.mode in (args.mode or MODES)]
    if args.quick:  # small networks and batches of its own
        runs = [run._replace(model=(), batch=()) for run in runs]
    given: dict[str, Any] = {
        name: tuple(values) for name in OPTIONS if (values := getattr(args, name)) is not None
    }  # fmt: skip
    return [run._replace(**given) for run in runs]


def arguments(run: Run, args: argparse.Namespace, limit: float | None) -> list[str]:
    """The command line of `benchmarks.run`."""
    line = ["--level", run.level, "--mode", run.mode, "--output", str(args.output), "--device", device_type(args)]
    for name in OPTIONS:
        values = getattr(run, name)
        line += [f"--{name}", *map(str, values)] if values else []
    line += ["--limit", f"{limit:g}"] if limit is not None else []
    return line + [f"--{name}" for name in ("resume", "quick") if getattr(args, name)]


def _announce(runs: Sequence[Run], args: argparse.Namespace) -> None:
    estimate = importlib.import_module("benchmarks.estimate")
    total = 0.0
    for run in runs:
        extent = estimate.extent(
            run.level, run.mode, torch.device(device_type(args)), models=run.model, batches=run.batch,
            dtypes=[DTYPES[name] for name in run.dtype], providers=run.provider, quick=args.quick,
        )  # fmt: skip
        total += extent.minutes
        what = ", ".join([run.level, run.mode, *run.model, *run.dtype])
        print(f"{what}: {extent.cases} cases, {extent.entries} entries each, about {extent.minutes:.0f} min")
    print(f"Together about {total:.0f} min; --limit ends it earlier, --resume goes on.", flush=True)


def _measure(runs: Sequence[Run], args: argparse.Namespace) -> int:
    """Run them one after another; the worst exit code."""
    started, worst = time.monotonic(), 0
    files = []
    for run in runs:
        left = None if args.limit is None else args.limit - (time.monotonic() - started)
        if left is not None and left <= 0:
            print("The time is up; --resume goes on.")
            break
        worst = max(worst, _benchmark("run", arguments(run, args, left)))
        files.append(args.output / f"{run.level}-{run.mode}.csv")
    _show(files)
    return worst


def _show(files: Sequence[Path]) -> None:
    """What the files say, resfuse against its best peer."""
    if importlib.util.find_spec("rich") is None:  # a bare machine with a GPU: --report writes the tables all the same
        print("rich, which draws the tables, is not installed; the measurements are in", *map(str, files))
        return
    from rich.console import Console

    records, report = (importlib.import_module(f"benchmarks.{name}") for name in ("records", "report"))
    console = Console(highlight=False)
    for path in files:
        for table in report.summary_tables(records.read(path)):
            report.show_table(console, table)


def _benchmark(module: str, line: Sequence[str]) -> int:
    """Run `python -m benchmarks.<module>` in this process; its exit code."""
    script: Any = importlib.import_module(f"benchmarks.{module}")
    return script.main(line)
