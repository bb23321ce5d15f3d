"""Measure the configurations of the Triton convolution kernels on this machine's GPU, and write its table."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from resfuse.backends import dispatch as registry
from resfuse.backends.triton import configs, tuning
from resfuse.backends.triton.devices import H100, DeviceProperties, cuda_properties
from resfuse.backends.triton.problems import KINDS, ConvConfig, ConvProblem, Precision
from resfuse.cli import tune_layers
from resfuse.cli.tune_trials import Measure, Trial, gpu_time

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CANNOT_RUN = 2
INTERRUPTED = 130


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What measuring one problem gave."""

    problem: ConvProblem
    best: tuning.Entry | None
    """None if no candidate ran correctly."""
    heuristic: float | None
    """Microseconds of what would run without a table; None if it is not correct here."""
    failures: Sequence[Exception]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", nargs="+", default=["resnet50"], metavar="NAME", help="torchvision's, or cifar_resnet")
    add("--batch", type=int, nargs="+", default=[1, 32, 256], metavar="N", help="images (default 1 32 256)")
    add("--size", type=int, default=224, help="height and width of the images (default 224)")
    add("--dtype", nargs="+", choices=tuple(DTYPES), default=["bfloat16"], help="default bfloat16")
    add("--kind", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    add("--candidates", type=int, default=12, metavar="N", help="the most promising of a problem (default 12, 0: all)")
    add("--output", type=Path, metavar="FILE", help="default: where resfuse looks for this GPU's table")
    add("--dry-run", action="store_true", help="list the problems and how many configurations each would try")


def run(args: argparse.Namespace) -> int:
    console = Console(highlight=False)
    reason = registry.backend("triton").unavailable_reason()
    if reason is None and not torch.cuda.is_available():
        reason = "torch sees no CUDA GPU, and there is nothing to measure in Triton's interpreter"
    if reason is not None and not args.dry_run:
        console.print(f"[red]tune needs a GPU:[/] {escape(reason)}", soft_wrap=True)
        return CANNOT_RUN
    if importlib.util.find_spec("triton") is None:
        console.print("[red]tune needs Triton[/], which is not installed")
        return CANNOT_RUN
    where, device = _device(reason is None)
    try:
        problems = _problems(args)
    except (ModuleNotFoundError, ValueError) as error:
        console.print(f"[red]--model:[/] {escape(str(error))}", soft_wrap=True)
        return CANNOT_RUN
    if args.dry_run:
        console.print(_plan(problems, device, args.candidates))
        return 0
    path = args.output or tuning.user_folder() / tuning.file_name(device.name)
    try:
        table = open_table(path, device)
    except (tuning.TableError, OSError) as error:
        console.print(f"[red]{escape(str(path))} is not overwritten:[/] {escape(str(error))}", soft_wrap=True)
        return CANNOT_RUN
    outcomes: list[Outcome] = []
    try:
        tune(problems, device, path, table, lambda problem: Trial(problem, where), gpu_time, args.candidates,
             console, outcomes.append)  # fmt: skip
    except KeyboardInterrupt:
        console.print(
            f"[yellow]Interrupted.[/] {len(outcomes)} problems are in {path}; the same command goes on there."
        )
        return INTERRUPTED
    return _conclude(outcomes, len(problems), path, console)


def open_table(path: Path, device: DeviceProperties) -> tuning.Table:
    """The table in a file, to go on with, or an empty one.

    Raises:
        TableError: the file is no table, or one of another device.
        OSError: it can not be read.
    """
    if not path.exists():
        return tuning.Table(device.name, importlib.metadata.version("triton"))
    table = tuning.read(path)
    if table.device != device.name:
        raise tuning.TableError(f"it is the table of {table.device}, not of {device.name}")
    return table


def tune(
    problems: Iterable[ConvProblem],
    device: DeviceProperties,
    path: Path,
    table: tuning.Table,
    prepare: Callable[[ConvProblem], Trial],
    measure: Measure,
    candidates: int,
    console: Console,
    report: Callable[[Outcome], None],
) -> None:
    """Measure the problems that the table does not have; the file is written after each, so that nothing is lost.

    Args:
        problems: what to measure.
        device: where.
        path: of the table.
        table: what is known already, and what is added to.
        prepare: makes the tensors of a problem.
        measure: times a call.
        candidates: per problem, 0 for all.
        console: of the progress bar.
        report: called with each outcome.
    """
    missing = [problem for problem in dict.fromkeys(problems) if _key(problem) not in table.entries]
    counts = [len(_candidates(problem, device, candidates)) for problem in missing]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=console.is_terminal) as progress:
        task = progress.add_task("tune", total=sum(counts))
        for problem in missing:
            progress.update(task, description=describe(problem))
            outcome = _tune_one(problem, device, prepare, measure, candidates, lambda: progress.advance(task))
            report(outcome)
            if outcome.best is not None:
                table.entries[_key(problem)] = outcome.best
                tuning.write(path, table)
    configs.forget()


def describe(problem: ConvProblem) -> str:
    """A problem in one short line: `forward 32x56x56x64 > 64, 3x3 /2 bfloat16`."""
    stride = "" if problem.stride == (1, 1) else f" /{'x'.join(map(str, dict.fromkeys(problem.stride)))}"
    groups = "" if problem.groups == 1 else f" {problem.groups} groups"
    size = f"{problem.n}x{problem.h}x{problem.w}x{problem.c} > {problem.k}"
    return f"{problem.kind} {size}, {problem.r}x{problem.s}{stride}{groups} {str(problem.dtype)[6:]}"


def _tune_one(
    problem: ConvProblem,
    device: DeviceProperties,
    prepare: Callable[[ConvProblem], Trial],
    measure: Measure,
    candidates: int,
    advance: Callable[[], None],
) -> Outcome:
    """The fastest of the candidates that compute the right thing."""
    times: dict[ConvConfig, float] = {}
    failures: list[Exception] = []
    trial = prepare(problem)
    for config in _candidates(problem, device, candidates):
        try:
            times[config] = trial.attempt(config, measure)
        except Exception as error:  # wrong, or more shared memory or registers than there are: not this one
            failures.append(error)
        advance()
    fastest = min(times, key=times.__getitem__, default=None)
    best = None if fastest is None else tuning.Entry(fastest, round(times[fastest], 3))
    return Outcome(problem, best, times.get(configs.heuristic_config(_key(problem), device)), failures)


def _candidates(problem: ConvProblem, device: DeviceProperties, count: int) -> list[ConvConfig]:
    return configs.ranked(_key(problem), device)[: count or None]


def _key(problem: ConvProblem) -> ConvProblem:
    """The problem as the kernels look it up."""
    return tuning.canonical(tune_layers.tile_problem(problem))


def _device(measured: bool) -> tuple[torch.device, DeviceProperties]:
    """The current GPU, or, where there is none to measure on, an H100 to plan for."""
    if not measured:
        return torch.device("cpu"), H100
    where = torch.device("cuda", torch.cuda.current_device())
    return where, cuda_properties(where)


def _problems(args: argparse.Namespace) -> list[ConvProblem]:
    found: list[ConvProblem] = []
    for model in args.model:
        for dtype in args.dtype:
            found += tune_layers.layer_problems(
                model, args.batch, DTYPES[dtype], kinds=args.kind, size=args.size, precision=_precision()
            )
    return list(dict.fromkeys(found))


def _precision() -> Precision:
    switch = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if switch == "tf32" else "ieee"


def _plan(problems: Sequence[ConvProblem], device: DeviceProperties, candidates: int) -> RichTable:
    counts = [len(_candidates(problem, device, candidates)) for problem in problems]
    table = RichTable(title=f"{len(problems)} problems, {sum(counts)} measurements on {device.name}")
    table.title_justify, table.title_style = "left", "bold"
    table.add_column("problem", style="cyan")
    table.add_column("GEMM M x N x K", justify="right")
    table.add_column("tried", justify="right")
    table.add_column("of", justify="right")
    for problem, count in zip(problems, counts, strict=True):
        gemm = f"{problem.gemm_m} x {problem.gemm_n} x {problem.gemm_k}"
        table.add_row(describe(problem), gemm, str(count), str(len(configs.every_config(_key(problem), device))))
    return table


def _conclude(outcomes: Sequence[Outcome], total: int, path: Path, console: Console) -> int:
    table = RichTable(title="measured on this GPU", title_justify="left", title_style="bold")
    table.add_column("problem", style="cyan")
    for heading in ("fastest", "us", "heuristic, us"):
        table.add_column(heading, justify="right")
    for outcome in outcomes:
        fastest = "[red]none[/]" if outcome.best is None else _short(outcome.best.config)
        best = "" if outcome.best is None else f"{outcome.best.microseconds:.1f}"
        heuristic = "[yellow]not run[/]" if outcome.heuristic is None else f"{outcome.heuristic:.1f}"
        table.add_row(describe(outcome.problem), fastest, best, heuristic)
    if outcomes:
        console.print(table)
    failures = Counter(str(failure).partition("\n")[0] for outcome in outcomes for failure in outcome.failures)
    for message, count in failures.most_common():
        console.print(f"[yellow]{count} x not taken:[/] {escape(message)}", soft_wrap=True)
    console.print(f"{len(outcomes)} of {total} problems measured, the others were known: {escape(str(path))}")
    return 1 if any(outcome.best is None for outcome in outcomes) else 0


def _short(config: ConvConfig) -> str:
    """BLOCK_M x BLOCK_N x BLOCK_K / warps / stages, and what else there is."""
    split = f" split {config.split_k}" if config.split_k > 1 else ""
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}/{config.num_warps}/{config.num_stages}"
    return tile + split + (" persistent" if config.persistent else "")
