"""Whole models: inference and training steps of every provider, in turns; writes CSV and prints tables."""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import options, records, report, workload
from benchmarks.measure import Sample
from benchmarks.options import DTYPES
from benchmarks.providers import DEFAULT, PROVIDERS, Setting
from benchmarks.records import Conditions, Record, Subject
from benchmarks.worker import ProviderError, Worker
from benchmarks.workload import Workload


class Preset(NamedTuple):
    """What is not given on the command line."""

    batch: dict[str, list[int]]
    model: list[str]
    size: int
    rounds: int
    warmup: float
    """Seconds, at the most, for each provider."""
    turn: float
    """Seconds that a provider's turn lasts, at least; short calls are repeated."""


FULL = Preset({"inference": [1, 16], "train": [8]}, ["resnet50", "resnet18"], 224, 20, 10.0, 0.25)
QUICK = Preset({"inference": [2], "train": [2]}, ["resnet18"], 64, 2, 0.2, 0.0)


class Contestant(NamedTuple):
    """A provider at work in one dtype."""

    provider: str
    dtype: str
    workload: Workload
    worker: Worker
    errors: dict[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    console = Console(highlight=False, soft_wrap=False)
    torch.set_num_threads(args.threads)
    settings = [Setting(args.mode, DTYPES[name], args.device, args.threads) for name in args.dtype]
    entries = _available(args.provider, settings, console)
    packages = dict.fromkeys(package for name, _ in entries for package in PROVIDERS[name].packages)
    conditions = records.current_conditions(args.device, args.threads, packages)
    report.show_conditions(console, conditions)
    path = args.output / f"models-{args.mode}.csv"
    failed = False
    for name, batch in itertools.product(args.model, args.batch):
        with ExitStack() as stack, _progress(console) as progress:
            contestants = []
            task = progress.add_task(f"{name}, batch {batch}: preparing", total=len(entries))
            for provider, dtype, made in _workloads(entries, name, batch, args.size):
                try:
                    contestants.append(_enter(stack, provider, dtype, made))
                except ProviderError as error:
                    failed = True
                    console.print(f"[red]{provider}, {dtype} is left out:[/]")
                    console.print(str(error), markup=False, style="dim")
                progress.advance(task)
            rows = _measure(contestants, args, conditions, progress)
        for table in report.model_tables(rows):
            report.show_table(console, table)
        report.warn_if_restless(console, [row for row in rows if row.metric == "time"])
        records.update(path, rows)
    console.print(f"Wrote {path}", soft_wrap=True)
    return 1 if failed else 0


def _available(providers: Sequence[str], settings: Sequence[Setting], console: Console) -> list[tuple[str, Setting]]:
    """The providers that run here, in each of the settings; says why the others do not."""
    entries = []
    for setting, provider in itertools.product(settings, providers):
        reason = PROVIDERS[provider].unavailable_reason(setting)
        if reason is None:
            entries.append((provider, setting))
        else:
            console.print(f"{provider}, {records.dtype_text(setting.dtype)}: {reason}", style="yellow")
    return entries


def _workloads(
    entries: Sequence[tuple[str, Setting]], name: str, batch: int, size: int
) -> Iterator[tuple[str, str, tuple[Workload, Path]]]:
    """(provider, dtype, (workload, its file)) of each entry."""
    with tempfile.TemporaryDirectory() as folder:
        made: dict[Setting, tuple[Workload, Path]] = {}
        for provider, setting in entries:
            dtype = records.dtype_text(setting.dtype)
            if setting not in made:
                made[setting] = workload.make_workload(name, batch, size, setting), Path(folder, f"{dtype}.pt")
                made[setting][0].save(made[setting][1])
            yield provider, dtype, made[setting]


def _enter(stack: ExitStack, provider: str, dtype: str, made: tuple[Workload, Path]) -> Contestant:
    """Start a provider and check what it computes.

    Raises:
        ProviderError: it failed, or its results are wrong: then it has no speed.
    """
    job, path = made
    worker = stack.enter_context(Worker(provider, path))
    errors = worker.errors()
    for quantity, error in errors.items():
        if not error <= job.limit(quantity):
            raise ProviderError(
                f"wrong: {workload.describe_errors(errors)}; limit {job.limit(quantity):.1e} for the {quantity}, "
                f"eager {workload.describe_errors(job.eager_errors)}"
            )
    return Contestant(provider, dtype, job, worker, errors)


def _measure(
    contestants: Sequence[Contestant], args: argparse.Namespace, conditions: Conditions, progress: Progress
) -> list[Record]:
    """Warm up, then let the contestants take turns: A B C A B C ..."""
    task = progress.add_task("  warming up", total=len(contestants))
    calls = []
    for contestant in contestants:
        seconds = contestant.worker.warm_up(args.warmup)
        calls.append(max(1, math.ceil(args.turn / seconds)))
        progress.advance(task)
    samples: list[list[Sample]] = [[] for _ in contestants]
    task = progress.add_task("  measuring", total=args.rounds * len(contestants))
    for _ in range(args.rounds):
        for contestant, count, found in zip(contestants, calls, samples, strict=True):
            # Short calls feel that another process ran before: the first one brings caches and threads back.
            found += contestant.worker.run(count, lead_in=count > 1)
            progress.advance(task)
    rows = []
    for contestant, found in zip(contestants, samples, strict=True):
        rows += _rows(contestant, found, args.mode, conditions)
    return rows


def _rows(contestant: Contestant, samples: Sequence[Sample], mode: str, conditions: Conditions) -> list[Record]:
    job = contestant.workload
    layout = PROVIDERS[contestant.provider].layout
    shape = records.shape_text(job.shape)
    subject = Subject("model", job.name, contestant.provider, mode, shape, contestant.dtype, layout)
    quantities: dict[str, tuple[Sequence[float], str]] = {
        "time": ([sample.seconds for sample in samples], "s"),
        "minor_faults": ([sample.minor_faults for sample in samples], "1"),
        "system_time": ([sample.system_seconds for sample in samples], "s"),
        "peak_memory": ([contestant.worker.peak_memory()], "B"),
        **{f"error_{quantity}": ([error], "1") for quantity, error in contestant.errors.items()},
    }
    return [subject.record(metric, values, unit, conditions) for metric, (values, unit) in quantities.items()]


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<36}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=options.summary(__doc__))
    parser.add_argument("--mode", choices=["inference", "train"], default="inference")
    parser.add_argument("--model", nargs="+", help=f"torchvision models (default {' '.join(FULL.model)})")
    parser.add_argument("--batch", nargs="+", type=int, help="batch sizes (default 1 and 16, training 8)")
    parser.add_argument("--size", type=int, help=f"height and width of the images (default {FULL.size})")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32"])
    parser.add_argument(
        "--provider", nargs="+", choices=list(PROVIDERS), default=list(DEFAULT), metavar="NAME",
        help=f"any of {', '.join(PROVIDERS)} (default: the usual ones that are installed)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, help=f"turns of each provider that count (default {FULL.rounds})")
    parser.add_argument("--warmup", type=float, help=f"seconds for each, at the most (default {FULL.warmup:.0f})")
    parser.add_argument("--turn", type=float, help=f"seconds that a turn lasts at least (default {FULL.turn})")
    parser.add_argument("--threads", type=int, help="threads on the CPU (default: torch's own choice)")
    parser.add_argument("--quick", action="store_true", help="small images and few rounds: a trial, not a measurement")
    options.add_common(parser)
    args = options.parse(parser, argv)
    preset = QUICK if args.quick else FULL
    for name in ("model", "size", "rounds", "warmup", "turn"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(preset, name))
    args.batch = args.batch or preset.batch[args.mode]
    args.threads = args.threads or torch.get_num_threads()
    return args


if __name__ == "__main__":
    raise SystemExit(main())
