"""Measure every backend's convolutions on this machine's GPU, and write the table that backends are chosen by."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from resfuse.backends import dispatch, measured
from resfuse.backends.measured import ENGINES, Entry
from resfuse.backends.triton import config, plan
from resfuse.backends.triton.config import KINDS, ConvConfig, ConvProblem, DeviceProperties, Kind, Precision
from resfuse.cli import networks
from resfuse.explain import problem_of
from resfuse.fuse import fuse_
from resfuse.models import cifar_resnet
from resfuse.tracing import Tracer
from resfuse.types import BatchNorm, Convolution, Problem

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CIFAR = "cifar_resnet"
"""The residual networks for 32x32 images of He et al. 2015: 16, 32 and 64 channels, of any depth."""
CANNOT_RUN = 2
INTERRUPTED = 130


class NotTakenError(ValueError):
    """A backend that cannot run a problem, or not on this machine, which its speed has nothing to do with."""


class Outcome(NamedTuple):
    """The measurements of one problem."""

    problem: ConvProblem
    entry: Entry
    heuristic: float | None
    """Microseconds of the configuration that triton uses without a table; None if it does not run correctly here."""
    failures: Sequence[str]
    """Why backends and configurations were left out."""

    @property
    def complete(self) -> bool:
        """Eager PyTorch has a time.  It comes last: what ruins the CUDA context has spoilt the others' measurements."""
        return "reference" in self.entry.microseconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", nargs="+", default=["resnet50"], metavar="NAME", help=f"as in `explain`, or {CIFAR} of any depth")
    add("--batch", type=int, nargs="+", default=[1, 32, 256], metavar="N", help="images (default 1 32 256)")
    add("--size", type=int, metavar="PIXELS", help="height and width of the images (default: that of the network)")
    add("--dtype", nargs="+", choices=tuple(DTYPES), default=["bfloat16"], help="default bfloat16")
    add("--kind", nargs="+", choices=KINDS, default=list(KINDS), help="inference or training (default both)")
    add("--candidates", type=int, default=12, metavar="N", help="configurations of triton (default 12, 0: all)")
    add("--output", type=Path, metavar="DIR", help="folder of the table (default: where resfuse looks for it)")
    add("--dry-run", action="store_true", help="list the problems and how many configurations each would try")


def run(args: argparse.Namespace) -> int:
    console = Console(highlight=False)
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not args.dry_run:
        console.print("[red]tune needs a GPU:[/] torch sees no CUDA GPU, and nothing else is measured")
        return CANNOT_RUN
    if importlib.util.find_spec("triton") is None:
        console.print("[red]tune needs Triton[/], whose timer it uses, and which is not installed")
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
    where = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    device = config.cuda_properties(where) if on_gpu else config.H100
    if args.dry_run:
        console.print(_listing(problems, device, args.candidates))
        return 0
    path = (args.output or measured.user_folder()) / measured.file_name(device.name)
    try:
        known = measured.read(path, device.name) if path.exists() else None
    except (measured.TableError, OSError) as error:
        console.print(f"[red]{escape(str(path))} is not overwritten:[/] {escape(str(error))}", soft_wrap=True)
        return CANNOT_RUN
    if known is not None and (outdated := known.outdated()):
        console.print(f"[yellow]{escape(str(path))} is begun anew:[/] {escape(outdated)}", soft_wrap=True)
        known = None
    entries = {} if known is None else known.entries
    outcomes: list[Outcome] = []
    prepare = functools.partial(Trial, device=where)
    try:
        tune(problems, device, where, path, entries, prepare, args.candidates, console, outcomes.append)
    except KeyboardInterrupt:
        console.print(f"[yellow]Interrupted.[/] {len(outcomes)} problems are in {path}; run it again to continue.")
        return INTERRUPTED
    return _conclude(outcomes, len(set(problems)), path, console)


def tune(
    problems: Iterable[ConvProblem],
    device: DeviceProperties,
    where: torch.device,
    path: Path,
    entries: dict[ConvProblem, Entry],
    prepare: Callable[[ConvProblem], Trial],
    candidates: int,
    console: Console,
    report: Callable[[Outcome], None],
) -> None:
    """Measure the problems that `entries` lacks, or has without a backend that could run them by now.

    The file is written after each, so that nothing is lost.
    """
    distinct = dict.fromkeys(map(measured.canonical, problems))
    missing = [problem for problem in distinct if not _is_known(problem, entries.get(problem), where)]
    total = sum(len(_attempts(problem, device, candidates)) for problem in missing)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=console.is_terminal) as progress:
        task = progress.add_task("tune", total=total)
        for problem in missing:
            progress.update(task, description=describe(problem))
            outcome = measure(problem, device, prepare(problem), candidates, lambda: progress.advance(task))
            report(outcome)
            if outcome.complete:
                entries[problem] = outcome.entry
                measured.write(path, device.name, entries)
    plan.forget()
    dispatch.forget_choices()


def _is_known(problem: ConvProblem, entry: Entry | None, where: torch.device) -> bool:
    if entry is None:
        return False
    new = [engine for engine in ENGINES if engine not in {*entry.microseconds, *entry.left_out}]
    return all(dispatch.reasons_against(engine, _asked(problem, where), automatic=True) for engine in new)


def _asked(p: ConvProblem, device: torch.device) -> Problem:
    """What the choice of a backend is asked for."""
    shapes = torch.Size((p.n, p.c, p.h, p.w)), torch.Size((p.k, p.group_in, p.r, p.s))
    convolution = Convolution(p.stride, p.padding, p.dilation, p.groups)
    form = p.kind == "train", p.residual, p.precision == "tf32"
    return Problem("conv_bn_act_forward", device, p.dtype, *shapes, convolution, *form)


def measure(
    problem: ConvProblem, device: DeviceProperties, trial: Trial, candidates: int, advance: Callable[[], None]
) -> Outcome:
    """The time of every backend that is right on a problem; of triton that of its fastest configuration."""
    times: dict[tuple[str, ConvConfig | None], float] = {}
    failures: dict[tuple[str, ConvConfig | None], str] = {}
    refused: set[str] = set()
    for attempt in _attempts(problem, device, candidates):
        try:
            times[attempt] = trial.attempt(*attempt)
        except NotTakenError as error:  # today: a library may be built later
            refused.add(attempt[0])
            failures[attempt] = str(error)
        except Exception as error:  # wrong, or more shared memory or registers than there are: not this one
            failures[attempt] = str(error).partition("\n")[0] or type(error).__name__
        advance()
    fastest: dict[str, ConvConfig | None] = {}
    for engine, candidate in sorted(times, key=times.__getitem__):
        fastest.setdefault(engine, candidate)
    microseconds = {engine: round(times[engine, best], 3) for engine, best in fastest.items()}
    left_out = {engine: why for (engine, _), why in failures.items() if engine not in {*microseconds, *refused}}
    heuristic = times.get(("triton", config.heuristic_config(plan.tile_problem(problem), device)))
    entry = Entry(microseconds, left_out, fastest.get("triton"))
    return Outcome(problem, entry, heuristic, [f"{engine}: {why}" for (engine, _), why in failures.items()])


class Trial:
    """Random operands of a problem, and its result in float64."""

    def __init__(self, problem: ConvProblem, device: torch.device) -> None:
        self.problem = p = problem
        generator = torch.Generator(device).manual_seed(0)
        normal = functools.partial(torch.randn, generator=generator, device=device)
        x, w = normal(p.n, p.c, p.h, p.w), normal(p.k, p.group_in, p.r, p.s) * (p.group_in * p.taps) ** -0.5
        residual = normal(p.n, p.k, p.oh, p.ow) if p.residual else x
        self.x, self.w, residual = (t.to(p.dtype, memory_format=torch.channels_last) for t in (x, w, residual))
        self.residual = residual if p.residual else None
        self.asked = _asked(p, device)
        assert self.asked.convolution is not None
        self.convolution = self.asked.convolution
        mean, var, weight, bias = normal(p.k), normal(p.k).abs() + 0.5, normal(p.k), normal(p.k)
        self.bn = BatchNorm(mean, var, weight, bias, p.kind == "train", 0.0, 1e-5)
        z = F.conv2d(self.x.double(), self.w.double(), None, *self.convolution)
        mean, var, weight, bias = (vector.double() for vector in (mean, var, weight, bias))
        normalised = F.batch_norm(z, mean, var, weight, bias, p.kind == "train", 0.0, 1e-5)
        self.exact = F.relu(normalised if self.residual is None else normalised + self.residual)

    def run(self, engine: str, candidate: ConvConfig | None) -> Tensor:
        with plan.forced(self.problem.kind, candidate):
            forward = dispatch.backend(engine).conv_bn_act_forward
            return forward(self.x, self.w, None, self.convolution, self.bn, self.residual, True)[0]

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

    def attempt(self, engine: str, candidate: ConvConfig | None) -> float:
        """Microseconds of a backend, of triton with a configuration.

        Raises:
            ArithmeticError: its result is wrong.
            NotTakenError: automatic choice would not take it; the message says why.
        """
        if reasons := dispatch.reasons_against(engine, self.asked, automatic=True):
            raise NotTakenError("; ".join(reasons))
        if (deviation := self.deviation(self.run(engine, candidate))) > self.tolerance():
            raise ArithmeticError(f"{candidate or engine} is wrong by {deviation:.1e} on {describe(self.problem)}")
        return gpu_time(lambda: self.run(engine, candidate))


def gpu_time(call: Callable[[], object]) -> float:
    """Median microseconds of a call by CUDA events, warmed up, with a cold L2 cache before every run."""
    from triton.testing import do_bench

    return 1e3 * float(do_bench(call, warmup=10, rep=40, return_mode="median"))


def layer_problems(
    model: str, batches: Iterable[int], dtype: torch.dtype, kinds: Iterable[Kind] = KINDS, size: int | None = None
) -> list[ConvProblem]:
    """Every distinct convolution that `fuse_` fuses in a network, in each of the kinds, at each batch size.

    Raises:
        ModuleNotFoundError: the network's package is not installed.
        ValueError: there is no such network, or it cannot be traced.
    """
    if model == CIFAR:
        with torch.device("meta"):
            network = networks.Network(cifar_resnet(8, shortcut="B"), (3, 32, 32))
    else:
        network = networks.build(model)
    channels, height, width = network.input_shape
    switch = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    precision: Precision = "tf32" if switch == "tf32" else "ieee"
    found: dict[Kind, list[ConvProblem]] = {}
    for kind in kinds:
        shape = (2, channels, size or height, size or width)
        tracer = Tracer(network.model.train(kind == "train"), [shape])
        fuse_(tracer.model)
        runs = [run for call in tracer.calls(backward=False) for run in call.forward]
        asked = [problem_of(run, torch.device("cpu")) for run in runs if run.func.namespace == "resfuse"]
        found[kind] = [measured.conv_problem(one) for one in asked if one.kernel == "conv_bn_act_forward"]
    return [
        problem._replace(n=batch, dtype=dtype, precision=precision)
        for batch in batches
        for problems in found.values()
        for problem in dict.fromkeys(problems)
    ]


def describe(problem: ConvProblem) -> str:
    """A problem in one short line: `forward 32x56x56x64 > 64, 3x3 /2 +res bfloat16`."""
    stride = "" if problem.stride == (1, 1) else f" /{'x'.join(map(str, dict.fromkeys(problem.stride)))}"
    groups = "" if problem.groups == 1 else f" {problem.groups} groups"
    residual = " +res" if problem.residual else ""
    size = f"{problem.n}x{problem.h}x{problem.w}x{problem.c} > {problem.k}"
    return f"{problem.kind} {size}, {problem.r}x{problem.s}{stride}{groups}{residual} {str(problem.dtype)[6:]}"


def _attempts(problem: ConvProblem, device: DeviceProperties, count: int) -> list[tuple[str, ConvConfig | None]]:
    """The backends in their order, and as many configurations of triton."""
    candidates = config.ranked(plan.tile_problem(problem), device)[: count or None]
    configs = {engine: candidates if engine == "triton" else [None] for engine in ENGINES}
    return [(engine, candidate) for engine in ENGINES for candidate in configs[engine]]


def _listing(problems: Sequence[ConvProblem], device: DeviceProperties, candidates: int) -> Table:
    table = Table(title_justify="left", title_style="bold")
    for heading in ("problem", "GEMM M x N x K", "tried", "of"):
        table.add_column(heading, justify="left" if heading == "problem" else "right")
    counts = [len(_attempts(problem, device, candidates)) for problem in problems]
    table.title = f"{len(problems)} problems, {sum(counts)} measurements on {device.name}"
    for problem, count in zip(problems, counts, strict=True):
        gemm = " x ".join(map(str, problem.gemm))
        table.add_row(describe(problem), gemm, str(count), str(len(_attempts(problem, device, 0))))
    return table


def _conclude(outcomes: Sequence[Outcome], total: int, path: Path, console: Console) -> int:
    table = Table(title="microseconds on this GPU", title_justify="left", title_style="bold")
    for heading in ("problem", *ENGINES, "triton as", "heuristic"):
        table.add_column(heading, justify="left" if heading == "problem" else "right")
    for outcome in outcomes:
        times, _, best = outcome.entry
        cells = [f"{times[engine]:.1f}" if engine in times else "-" for engine in ENGINES]
        heuristic = "-" if outcome.heuristic is None else f"{outcome.heuristic:.1f}"
        table.add_row(describe(outcome.problem), *cells, "-" if best is None else _short(best), heuristic)
    if outcomes:
        console.print(table)
    failures = Counter(failure for outcome in outcomes for failure in outcome.failures)
    for message, count in failures.most_common():
        console.print(f"[yellow]{count} x left out:[/] {escape(message)}", soft_wrap=True)
    complete = sum(outcome.complete for outcome in outcomes)
    known = f"{total - len(outcomes)} were known"
    console.print(f"{complete} of {total} problems measured, {known}: {escape(str(path))}", soft_wrap=True)
    return 0 if all(outcome.complete for outcome in outcomes) else 1


def _short(candidate: ConvConfig) -> str:
    """BLOCK_M x BLOCK_N x BLOCK_K / warps / stages, and the variant."""
    split = f" split {candidate.split_k}" if candidate.split_k > 1 else ""
    return "{}x{}x{}/{}/{}".format(*candidate) + split + (" persistent" if candidate.persistent else "")
