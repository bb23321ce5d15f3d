"""Measure the configurations of the Triton convolution kernels on this machine's GPU, and write its table."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from resfuse.backends import dispatch
from resfuse.backends.triton import config, plan, tables
from resfuse.backends.triton.config import KINDS, ConvConfig, ConvProblem, DeviceProperties, Kind, Precision
from resfuse.types import BatchNorm, Convolution

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CIFAR = "cifar_resnet"
"""The residual networks for 32x32 images of He et al. 2015: 16, 32 and 64 channels, of any depth."""
CANNOT_RUN = 2
INTERRUPTED = 130


class Outcome(NamedTuple):
    """The measurements of one problem."""

    problem: ConvProblem
    best: tables.Entry | None
    """None if no candidate ran correctly."""
    heuristic: float | None
    """Microseconds of the configuration used without a table; None if it does not run correctly here."""
    failures: Sequence[Exception]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", nargs="+", default=["resnet50"], metavar="NAME", help=f"one of torchvision's, or {CIFAR}")
    add("--batch", type=int, nargs="+", default=[1, 32, 256], metavar="N", help="images (default 1 32 256)")
    add("--size", type=int, default=224, help="height and width of the images (default 224)")
    add("--dtype", nargs="+", choices=tuple(DTYPES), default=["bfloat16"], help="default bfloat16")
    add("--kind", nargs="+", choices=KINDS, default=list(KINDS), help="inference or training (default both)")
    add("--candidates", type=int, default=12, metavar="N", help="the most promising of a problem (default 12, 0: all)")
    add("--output", type=Path, metavar="FILE", help="default: where resfuse looks for this GPU's table")
    add("--dry-run", action="store_true", help="list the problems and how many configurations each would try")


def run(args: argparse.Namespace) -> int:
    console = Console(highlight=False)
    reason = dispatch.backend("triton").unavailable_reason()
    if reason is None and not torch.cuda.is_available():
        reason = "torch sees no CUDA GPU, and there is nothing to measure in Triton's interpreter"
    if reason is not None and not args.dry_run:
        console.print(f"[red]tune needs a GPU:[/] {escape(reason)}", soft_wrap=True)
        return CANNOT_RUN
    if importlib.util.find_spec("triton") is None:
        console.print("[red]tune needs Triton[/], which is not installed")
        return CANNOT_RUN
    try:
        problems = [
            problem
            for model in args.model
            for dtype in args.dtype
            for problem in layer_problems(model, args.batch, DTYPES[dtype], args.kind, args.size)
        ]
    except (ModuleNotFoundError, ValueError) as error:
        console.print(f"[red]--model:[/] {escape(str(error))}", soft_wrap=True)
        return CANNOT_RUN
    where = torch.device("cuda", torch.cuda.current_device()) if reason is None else torch.device("cpu")
    device = config.cuda_properties(where) if reason is None else config.H100
    if args.dry_run:
        console.print(_listing(problems, device, args.candidates))
        return 0
    path = args.output or tables.user_folder() / tables.file_name(device.name)
    try:
        entries = tables.read(path, device.name) if path.exists() else {}
    except (tables.TableError, OSError) as error:
        console.print(f"[red]{escape(str(path))} is not overwritten:[/] {escape(str(error))}", soft_wrap=True)
        return CANNOT_RUN
    outcomes: list[Outcome] = []
    prepare = functools.partial(Trial, device=where)
    try:
        tune(problems, device, path, entries, prepare, args.candidates, console, outcomes.append)
    except KeyboardInterrupt:
        console.print(f"[yellow]Interrupted.[/] {len(outcomes)} problems are in {path}; run it again to continue.")
        return INTERRUPTED
    return _conclude(outcomes, len(set(problems)), path, console)


def tune(
    problems: Iterable[ConvProblem],
    device: DeviceProperties,
    path: Path,
    entries: dict[ConvProblem, tables.Entry],
    prepare: Callable[[ConvProblem], Trial],
    candidates: int,
    console: Console,
    report: Callable[[Outcome], None],
) -> None:
    """Measure the problems that `entries` lacks; the file is written after each, so that nothing is lost."""
    missing = [problem for problem in dict.fromkeys(problems) if _key(problem) not in entries]
    total = sum(len(_candidates(problem, device, candidates)) for problem in missing)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=console.is_terminal) as progress:
        task = progress.add_task("tune", total=total)
        for problem in missing:
            progress.update(task, description=describe(problem))
            trial, times, failures = prepare(problem), dict[ConvConfig, float](), list[Exception]()
            for candidate in _candidates(problem, device, candidates):
                try:
                    times[candidate] = trial.attempt(candidate)
                except Exception as error:  # wrong, or more shared memory or registers than there are: not this one
                    failures.append(error)
                progress.advance(task)
            fastest = min(times, key=times.__getitem__, default=None)
            best = None if fastest is None else tables.Entry(fastest, round(times[fastest], 3))
            report(Outcome(problem, best, times.get(config.heuristic_config(_key(problem), device)), failures))
            if best is not None:
                entries[_key(problem)] = best
                tables.write(path, device.name, entries)
    plan.forget()


class Trial:
    """Random operands of a problem, and its result in float64."""

    def __init__(self, problem: ConvProblem, device: torch.device) -> None:
        self.problem = p = problem
        generator = torch.Generator(device).manual_seed(0)
        normal = functools.partial(torch.randn, generator=generator, device=device)
        x, w = normal(p.n, p.c, p.h, p.w), normal(p.k, p.group_in, p.r, p.s) * (p.group_in * p.taps) ** -0.5
        self.x, self.w = (t.to(p.dtype, memory_format=torch.channels_last) for t in (x, w))
        self.convolution = Convolution(p.stride, p.padding, p.dilation, p.groups)
        mean, var, weight, bias = normal(p.k), normal(p.k).abs() + 0.5, normal(p.k), normal(p.k)
        self.bn = BatchNorm(mean, var, weight, bias, p.kind == "train", 0.0, 1e-5)
        z = F.conv2d(self.x.double(), self.w.double(), None, *self.convolution)
        mean, var, weight, bias = (vector.double() for vector in (mean, var, weight, bias))
        self.exact = F.relu(F.batch_norm(z, mean, var, weight, bias, p.kind == "train", 0.0, 1e-5))

    def run(self, candidate: ConvConfig) -> Tensor:
        with plan.forced(self.problem.kind, candidate):
            forward = dispatch.backend("triton").conv_bn_act_forward
            return forward(self.x, self.w, None, self.convolution, self.bn, None, True)[0]

    def deviation(self, result: Tensor) -> float:
        """The worst element's distance from float64, relative to it or to the root mean square; infinite for NaN."""
        scale = self.exact.abs() + self.exact.square().mean().sqrt()
        worst = ((result.double() - self.exact).abs() / scale).max().item()
        return math.inf if math.isnan(worst) else worst

    def tolerance(self) -> float:
        """The effect of rounding; a wrong tile is orders of magnitude beyond it."""
        if self.problem.dtype == torch.float32:
            return 2.0**-7 if self.problem.precision == "tf32" else 2.0**-12
        return {torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}[self.problem.dtype]

    def attempt(self, candidate: ConvConfig) -> float:
        """Microseconds of a configuration.

        Raises:
            ArithmeticError: its result is wrong.
        """
        if (deviation := self.deviation(self.run(candidate))) > self.tolerance():
            raise ArithmeticError(f"{candidate} is wrong by {deviation:.1e} on {self.problem}")
        return gpu_time(lambda: self.run(candidate))


def gpu_time(call: Callable[[], object]) -> float:
    """Median microseconds of a call by CUDA events, warmed up, with a cold L2 cache before every run."""
    from triton.testing import do_bench

    return 1e3 * float(do_bench(call, warmup=10, rep=40, return_mode="median"))


class _Convolutions(TorchDispatchMode):
    """Lists the distinct convolutions inside: (shape of the input, shape of the weight, settings)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[torch.Size, torch.Size, Convolution], None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            stride, padding, dilation = map(tuple, args[3:6])
            self.found[args[0].shape, args[1].shape, Convolution(stride, padding, dilation, args[8])] = None
        return func(*args, **(kwargs or {}))


def layer_problems(
    model: str, batches: Iterable[int], dtype: torch.dtype, kinds: Iterable[Kind] = KINDS, size: int = 224
) -> list[ConvProblem]:
    """Every distinct convolution of a network, in each of the kinds, at each batch size.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
        ValueError: torchvision has no such model.
    """
    mode = _Convolutions()
    with torch.device("meta"), torch.no_grad(), mode:
        if model == CIFAR:
            from resfuse.models import cifar_resnet

            cifar_resnet(8, shortcut="B").eval()(torch.empty(2, 3, 32, 32))
        else:
            from torchvision.models import get_model

            get_model(model, weights=None).eval()(torch.empty(2, 3, size, size))
    switch = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    precision: Precision = "tf32" if switch == "tf32" else "ieee"
    return [
        ConvProblem(kind, dtype, batch, x[2], x[3], x[1], w[0], w[2], w[3], *convolution, precision)
        for batch in batches
        for kind in kinds
        for x, w, convolution in mode.found
    ]


def describe(problem: ConvProblem) -> str:
    """A problem in one short line: `forward 32x56x56x64 > 64, 3x3 /2 bfloat16`."""
    stride = "" if problem.stride == (1, 1) else f" /{'x'.join(map(str, dict.fromkeys(problem.stride)))}"
    groups = "" if problem.groups == 1 else f" {problem.groups} groups"
    size = f"{problem.n}x{problem.h}x{problem.w}x{problem.c} > {problem.k}"
    return f"{problem.kind} {size}, {problem.r}x{problem.s}{stride}{groups} {str(problem.dtype)[6:]}"


def _candidates(problem: ConvProblem, device: DeviceProperties, count: int) -> list[ConvConfig]:
    return config.ranked(_key(problem), device)[: count or None]


def _key(problem: ConvProblem) -> ConvProblem:
    """The problem as the kernels look it up."""
    return tables.canonical(plan.tile_problem(problem))


def _listing(problems: Sequence[ConvProblem], device: DeviceProperties, candidates: int) -> Table:
    table = Table(title_justify="left", title_style="bold")
    for heading in ("problem", "GEMM M x N x K", "tried", "of"):
        table.add_column(heading, justify="left" if heading == "problem" else "right")
    counts = [len(_candidates(problem, device, candidates)) for problem in problems]
    table.title = f"{len(problems)} problems, {sum(counts)} measurements on {device.name}"
    for problem, count in zip(problems, counts, strict=True):
        gemm, of = " x ".join(map(str, problem.gemm)), len(config.every_config(_key(problem), device))
        table.add_row(describe(problem), gemm, str(count), str(of))
    return table


def _conclude(outcomes: Sequence[Outcome], total: int, path: Path, console: Console) -> int:
    table = Table(title="measured on this GPU", title_justify="left", title_style="bold")
    for heading in ("problem", "fastest", "us", "heuristic, us"):
        table.add_column(heading, justify="left" if heading == "problem" else "right")
    for outcome in outcomes:
        best, us = (
            ("[red]none[/]", "") if outcome.best is None else (_short(outcome.best.config), f"{outcome.best[1]:.1f}")
        )
        heuristic = "[yellow]not run[/]" if outcome.heuristic is None else f"{outcome.heuristic:.1f}"
        table.add_row(describe(outcome.problem), best, us, heuristic)
    if outcomes:
        console.print(table)
    failures = Counter(str(failure).partition("\n")[0] for outcome in outcomes for failure in outcome.failures)
    for message, count in failures.most_common():
        console.print(f"[yellow]{count} x not taken:[/] {escape(message)}", soft_wrap=True)
    console.print(f"{len(outcomes)} of {total} problems measured, the others were known: {escape(str(path))}")
    return 1 if any(outcome.best is None for outcome in outcomes) else 0


def _short(candidate: ConvConfig) -> str:
    """BLOCK_M x BLOCK_N x BLOCK_K / warps / stages, and the variant."""
    split = f" split {candidate.split_k}" if candidate.split_k > 1 else ""
    return "{}x{}x{}/{}/{}".format(*candidate) + split + (" persistent" if candidate.persistent else "")
