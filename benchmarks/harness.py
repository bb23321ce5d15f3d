"""Measure an op or the models: every provider in a process of its own, checked against float64, in turns."""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import resfuse
from benchmarks import report, results
from benchmarks.case import DTYPES, MODES, Case, Setting, dtype_name
from benchmarks.providers import DEFAULT, PROVIDERS, QUICK
from benchmarks.providers.fused import fuse
from benchmarks.steps import make_workload
from benchmarks.worker import ProviderError, UnsuitableError, Worker
from resfuse.roofline import Device, measure_device

LEFT_OUT = "left_out"
"""The metric of a provider without a speed: 1 where it failed or was wrong, 0 where it has nothing to offer."""


class OutOfTimeError(RuntimeError):
    """The run has to end now."""


class Plan(NamedTuple):
    """Durations and numbers of turns."""

    rounds: int
    turn: float
    """Seconds that a provider's turn lasts at least; short calls are repeated."""
    warmup: float
    """Seconds of the first turn, which does not count: a GPU's clocks need half a second under load."""
    timeout: float = 600.0
    """Seconds that a provider may take to be prepared, or for a turn."""
    deadline: float = math.inf
    """By time.monotonic()."""

    def time_left(self) -> float:
        """The timeout, cut by the deadline.

        Raises:
            OutOfTimeError: the deadline has passed.
        """
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise OutOfTimeError
        return min(self.timeout, left)


def order(names: Sequence[str], index: int) -> list[str]:
    """The order of one round: over the rounds each name comes first, and each comes before and after each other."""
    shift = index // 2 % max(1, len(names))
    rotated = [*names[shift:], *names[:shift]]
    return rotated[::-1] if index % 2 else rotated


class Comparison:
    """One case in one setting: providers are prepared and checked, then take turns."""

    def __init__(self, case: Case, setting: Setting, providers: Sequence[str], plan: Plan, graph: bool) -> None:
        self.case, self.setting, self.plan = case, setting, plan
        self.providers = providers
        self.graph = graph
        self.failed: dict[str, bool] = {}
        """Providers without a speed; False for those that have nothing to offer."""
        self.errors: dict[str, dict[str, float]] = {}
        self.samples: dict[str, dict[str, list[float]]] = {}
        self.peaks: dict[str, float] = {}

    def run(self, workers: Workers) -> list[dict[str, Any]]:
        """The rows of the case.

        Raises:
            OutOfTimeError: the deadline came before all had their turns.
        """

        def ask(name: str, method: str, *arguments: object) -> Any:
            return workers.of(name).ask(method, *arguments, timeout=self.plan.time_left())

        def prepare(name: str) -> None:
            graph = self.graph and PROVIDERS[name].graphs
            try:
                errors = ask(name, "prepare", path, graph)
            except ProviderError as error:
                if not graph or isinstance(error, UnsuitableError):
                    raise
                workers.end(name)
                say(f"  {name} is timed by calls only, as its CUDA graph failed: {str(error).splitlines()[-1]}")
                errors = ask(name, "prepare", path, False)
            if complaint := workload.complaint(errors):
                raise ProviderError(complaint)
            self.errors[name] = errors

        def turn(name: str) -> None:
            for metric, seconds in ask(name, "turn", self.plan.turn).items():
                self.samples.setdefault(name, {}).setdefault(metric, []).extend(seconds)

        def finish(name: str) -> None:
            self.peaks[name] = ask(name, "finish")

        with tempfile.TemporaryDirectory() as folder:
            workload, path = make_workload(self.case, self.setting), Path(folder, "workload.pt")
            torch.save(workload, path)
            if self.setting.device.startswith("cuda"):
                torch.cuda.empty_cache()
            self._each(self.providers, workers, prepare)
            self._each(self.left, workers, lambda name: ask(name, "turn", self.plan.warmup))
            for index in range(self.plan.rounds):
                self._each(order(self.left, index), workers, turn)
            self._each(self.left, workers, finish)
        return self._rows()

    @property
    def left(self) -> list[str]:
        """The providers that still take part."""
        return [name for name in self.providers if name not in self.failed]

    def _each(self, names: Sequence[str], workers: Workers, action: Callable[[str], None]) -> None:
        """Do something for each; a provider that fails is said, ended, and takes part no more."""
        for name in names:
            try:
                action(name)
            except ProviderError as error:
                if time.monotonic() > self.plan.deadline:
                    raise OutOfTimeError from error
                say(f"  {name} is left out: {error}")
                self.failed[name] = not isinstance(error, UnsuitableError)
                self.samples.pop(name, None)
                if self.failed[name]:
                    workers.end(name)

    def _rows(self) -> list[dict[str, Any]]:
        found = []

        def add(name: str, metric: str, unit: str, values: Sequence[float]) -> None:
            found.append(results.row(self.case, self.setting, name, metric, unit, values))

        for name, failed in self.failed.items():
            add(name, LEFT_OUT, "1", [float(failed)])
        for name, metrics in self.samples.items():
            for metric, seconds in metrics.items():
                add(name, metric, "s", seconds)
            add(name, "peak_memory", "B", [self.peaks[name]])
            for kind in ("output", "loss", "grad"):
                if errors := [error for key, error in self.errors[name].items() if key.partition(" ")[0] == kind]:
                    add(name, f"error_{kind}", "1", [max(errors)])
        return found


class Workers:
    """The processes of the providers; kept from case to case where cases are small."""

    def __init__(self, threads: int, keep: bool) -> None:
        self._threads, self._keep = threads, keep
        self._workers: dict[str, Worker] = {}

    def of(self, name: str) -> Worker:
        """The process of a provider, started if need be."""
        if name not in self._workers or not self._workers[name].alive:
            self._workers[name] = Worker(name, threads=self._threads)
        return self._workers[name]

    def end(self, name: str) -> None:
        """End a process that failed."""
        if name in self._workers:
            self._workers.pop(name).kill()

    def rest(self) -> None:
        """Between two cases: idle processes hold no memory of a case."""
        for name, worker in list(self._workers.items()):
            try:
                if not self._keep:
                    raise ProviderError
                worker.ask("release", timeout=60)
            except ProviderError:
                self.end(name)

    def close(self) -> None:
        """End all."""
        for name in list(self._workers):
            self.end(name)


def cost(case: Case, setting: Setting, device: Device) -> dict[str, float]:
    """Bytes, FLOPs and roofline time of a case where all that can be fused is, the same for all providers.

    A training step counts forward and backward; loss and optimiser, a few percent of it, are not counted.  Empty where
    the work is not known.
    """
    if setting.mode in ("forward", "backward"):
        return {}
    module = case.build().to("meta", setting.dtype).train(setting.trains)
    module = module if case.op == "models" else fuse(module)
    needs_grad = setting.trains and not case.image
    inputs = [torch.empty(shape, device="meta", dtype=setting.dtype, requires_grad=needs_grad) for shape in case.shapes]
    try:
        total = resfuse.explain(module, *inputs, device=device).total
    except Exception as error:  # a figure beside the measured ones, which are worth having without it
        say(f"  no roofline: {type(error).__name__}: {error}")
        return {}
    return {"bytes": total.bytes, "flops": total.flops, "seconds": total.seconds}


def add_roofline(rows: Sequence[dict[str, Any]], work: Mapping[str, float]) -> None:
    """Write into rows of times the work of the case, and the fraction of the roofline that the median reaches."""
    for row in rows:
        if work and row["metric"] in ("time", "graph_time"):
            row |= {"bytes": work["bytes"], "flops": work["flops"], "roofline": work["seconds"] / row["p50"]}


def main(op: str, argv: Sequence[str] | None = None) -> int:
    """Measure one op, or the models: writes <op>.csv and prints tables.

    Returns:
        The exit status: 0, also where --limit ended the run; 1 where a provider failed or was wrong.
    """
    started = time.monotonic()
    args = _parse(op, argv)
    torch.set_num_threads(args.threads)
    path = args.output / f"{op}.csv"
    packages = dict.fromkeys(package for name in args.provider for package in PROVIDERS[name].packages)
    conditions = results.conditions(args.device, args.threads, packages)
    say(", ".join(f"{name} {value}" for name, value in conditions.items()))
    todo = [
        (case, Setting(mode, DTYPES[dtype], args.device, args.threads))
        for mode, case, dtype in itertools.product(args.mode, args.cases, args.dtype)
    ]
    if args.resume:
        todo = [one for one in todo if not _known(*one, results.read(path), conditions)]
        say(f"{len(todo)} cases are left")
    if not todo:
        return 0
    device = measure_device(torch.device(args.device), seconds=0.01 if args.quick else 0.5)
    ceilings = {"copy": device.bandwidth, **{name: device.rate(DTYPES[name]) for name in args.dtype}}
    plan = Plan(args.rounds, args.turn, args.warmup, args.timeout, started + 0.95 * args.limit)
    workers, failed, longest = Workers(args.threads, keep=op != "models"), False, 0.0
    try:
        for index, (case, setting) in enumerate(todo):
            begun = time.monotonic()
            if begun + longest > plan.deadline:
                raise OutOfTimeError
            able = _able(args.provider, setting)
            say(f"[{index + 1}/{len(todo)}] {case.name}, {setting.mode}, {dtype_name(setting.dtype)}, {case.shape}")
            comparison = Comparison(case, setting, able, plan, args.graph and setting.mode in ("inference", "full"))
            rows = comparison.run(workers)
            workers.rest()
            add_roofline(rows, cost(case, setting, device))
            machine = [_ceiling_row(setting, name, value) for name, value in ceilings.items()]
            results.update(path, [row | conditions for row in [*machine, *rows]])
            say(report.case_text(rows))
            failed = failed or any(comparison.failed.values())
            longest = max(longest, time.monotonic() - begun)
    except OutOfTimeError:
        say(f"The time is up: {len(todo) - index} cases are left, --resume goes on")
    finally:
        workers.close()
    say(f"Wrote {path}")
    return int(failed)


def say(text: str) -> None:
    """A line of progress, at once."""
    print(text, flush=True)


def _able(providers: Sequence[str], setting: Setting) -> list[str]:
    able = []
    for name in providers:
        if reason := PROVIDERS[name].unavailable_reason(setting):
            say(f"  {name}: {reason}")
        else:
            able.append(name)
    return able


def _ceiling_row(setting: Setting, name: str, value: float) -> dict[str, Any]:
    unit = "B/s" if name == "copy" else "FLOP/s"
    return {
        "op": results.CEILING, "name": "copy" if name == "copy" else "matmul", "mode": setting.mode,
        "dtype": "" if name == "copy" else name, "shape": "", "provider": "pytorch", "x": 0,
        "metric": "bandwidth" if name == "copy" else "rate", "unit": unit, **results.quantiles([value]),
    }  # fmt: skip


def _known(case: Case, setting: Setting, rows: Any, conditions: Mapping[str, Any]) -> bool:
    """True where a file has the case of this commit and machine; its rows are written when all of it is done."""
    wanted = {
        "op": case.op, "name": case.name, "mode": setting.mode, "dtype": dtype_name(setting.dtype),
        "shape": case.shape, **{name: conditions[name] for name in ("device", "threads", "commit")},
    }  # fmt: skip
    return bool((rows[list(wanted)] == list(wanted.values())).all(axis=1).any())


def _parse(op: str, argv: Sequence[str] | None) -> argparse.Namespace:
    module = importlib.import_module(f"benchmarks.{op}")
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{op}", description=module.__doc__.splitlines()[0])
    add = parser.add_argument
    add("--mode", nargs="+", choices=MODES[op], default=["inference"], help="default %(default)s")
    add("--model", nargs="+", metavar="NAME", default=["resnet50"], help="torchvision's, or cifar_resnet20 and so on")
    add("--batch", nargs="+", type=_count, metavar="N", default=[128 if gpu else 8], help="default %(default)s")
    add("--size", type=_count, metavar="N", help="height and width of the images (default: the network's own)")
    add("--dtype", nargs="+", choices=list(DTYPES), default=["bfloat16" if gpu else "float32"])
    add("--provider", nargs="+", choices=list(PROVIDERS), metavar="NAME", default=DEFAULT, help=", ".join(PROVIDERS))
    add("--case", default="", metavar="TEXT", help="only the cases with this in their name")
    add("--rounds", type=_count, default=20, help="turns of each provider (default %(default)s)")
    seconds: dict[str, Any] = {"type": float, "metavar": "SECONDS"}
    add("--turn", **seconds, default=0.25 if op == "models" else 0.03, help="a turn lasts at least")
    add("--warmup", **seconds, default=1.0, help="a turn that does not count, for each provider")
    add("--timeout", **seconds, default=600.0, help="for a provider's preparation or turn")
    add("--graph", action=argparse.BooleanOptionalAction, help="time replays of CUDA graphs too (default: on a GPU)")
    add("--threads", type=_count, default=torch.get_num_threads(), metavar="N", help="on the CPU (default %(default)s)")
    add("--device", default="cuda" if gpu else "cpu", help="default %(default)s")
    add("--output", type=Path, default=results.RESULTS, metavar="DIR", help="where <op>.csv is (default %(default)s)")
    add("--resume", action="store_true", help="leave out the cases that the file has of this commit and machine")
    add("--limit", type=float, default=math.inf, metavar="SECONDS", help="end before that; --resume goes on")
    add("--quick", action="store_true", help="few small cases and rounds: a trial, not a measurement")
    if parser.parse_args(argv).quick:
        parser.set_defaults(
            provider=QUICK, rounds=2, turn=0.0, warmup=0.0, model=["cifar_resnet20"], batch=[2], size=32
        )
    args = parser.parse_args(argv)
    on_gpu = args.device.startswith("cuda")
    if args.graph and not on_gpu:
        parser.error("argument --graph: CUDA graphs need a GPU")
    args.graph = on_gpu if args.graph is None else args.graph
    try:
        found = [case for batch in args.batch for case in module.cases(args.model, batch, args.size)]
    except ValueError as error:
        parser.error(str(error))
    args.cases = [case for case in found if args.case in case.name]
    if not args.cases:
        parser.error(f"argument --case: no case has {args.case!r} in its name")
    if args.quick:
        args.cases = args.cases[:1]
    return args


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)
