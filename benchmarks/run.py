"""Operators, layers, blocks or models, inference and training: every provider in turns; writes CSV, prints tables."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Sequence

import torch

from benchmarks import ceilings, options, presets, records
from benchmarks.cases import Case, make_cases
from benchmarks.contest import Contest
from benchmarks.crew import Crew, OutOfTimeError, Plan
from benchmarks.options import DTYPES
from benchmarks.outcome import LEFT_OUT
from benchmarks.providers import PROVIDERS, Setting
from benchmarks.records import Conditions, Record, Roofline
from benchmarks.terminal import Terminal
from resfuse.costs import Device, measure_device

LEVELS = ("op", "layer", "block", "model")
MARGIN = 0.95
"""The part of --limit after which nothing is begun."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, also where --limit ended the run; 1 where a provider failed; 2 for bad arguments."""
    started = time.monotonic()
    args = _parse(argv)
    terminal = Terminal()
    torch.set_num_threads(args.threads)
    entries = _entries(args, terminal)
    packages = dict.fromkeys(package for name, _ in entries for package in PROVIDERS[name].packages)
    conditions = records.current_conditions(args.device, args.threads, packages)
    terminal.conditions(conditions)
    path = args.output / f"{args.level}-{args.mode}.csv"
    todo = _without_known(args.cases, entries, records.read(path), conditions) if args.resume else args.cases
    if len(todo) < len(args.cases):
        terminal.say(f"{path} has {len(args.cases) - len(todo)} of {len(args.cases)} cases of this commit")
    if not todo:
        return 0
    device = measure_device(args.device, seconds=args.preset.ceilings)
    terminal.say(ceilings.describe(device))
    machine = ceilings.ceiling_rows(device, args.mode, conditions)
    plan = Plan(args.rounds, args.warmup, args.turn, args.limit / 3, started + MARGIN * args.limit)
    failed, longest = False, 0.0
    with Crew(keep=args.level != "model") as crew:
        for index, case in enumerate(todo):
            begun = time.monotonic()
            if begun + longest > plan.deadline:
                return _stop(terminal, todo[index:], path)
            contest = Contest(case, entries, plan, terminal, last_chance=index == 0)
            costs = functools.cache(functools.partial(_cost, case, device, terminal))
            try:
                rows = contest.hold(crew, costs, conditions)
            except OutOfTimeError:
                return _stop(terminal, todo[index:], path)
            failed = failed or contest.failed
            records.update(path, [*machine, *rows])
            terminal.results(rows)
            longest = max(longest, time.monotonic() - begun)
    terminal.say(f"Wrote {path}")
    return 1 if failed else 0


def _stop(terminal: Terminal, left: Sequence[Case], path: object) -> int:
    names = ", ".join(f"{case.name} ({records.shape_text(case.inputs[0])})" for case in left[:3])
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    terminal.say(f"The time is up: left are {names}{more}; --resume goes on. The rest is in {path}", "note")
    return 0


def _entries(args: argparse.Namespace, terminal: Terminal) -> list[tuple[str, Setting]]:
    """The providers that run here, in each of the settings; says why the others do not.

    With graphs, a part of a model is not timed by calls too: what they take is the time of the host.
    """
    entries = []
    graphs = (False,) if not args.graph else (False, True) if args.level == "model" else (True,)
    for dtype, name in itertools.product(args.dtype, args.provider):
        plain = Setting(args.mode, DTYPES[dtype], args.device, args.threads, level=args.level)
        settings = [dataclasses.replace(plain, graph=graph) for graph in graphs]
        reasons = [PROVIDERS[name].unavailable_reason(setting) for setting in settings]
        able = [setting for setting, reason in zip(settings, reasons, strict=True) if reason is None]
        reason = PROVIDERS[name].unavailable_reason(plain)
        if reason is None:
            entries += [(name, setting) for setting in able or [plain]]
        else:
            terminal.say(f"{name}, {dtype}: {reason}", "note")
    return entries


def _without_known(
    cases: Sequence[Case], entries: Sequence[tuple[str, Setting]], rows: Sequence[Record], conditions: Conditions
) -> list[Case]:
    """The cases of which the file has not all entries, of the same commit and machine."""
    known = {
        (row.name, row.shape, row.dtype, row.provider, row.metric)
        for row in rows
        if dataclasses.replace(row.conditions, versions="", date="")
        == dataclasses.replace(conditions, versions="", date="")
    }

    def measured(case: Case, provider: str, setting: Setting) -> bool:
        shape, dtype = records.shape_text(case.inputs[0]), records.dtype_text(setting.dtype)
        graph = "graph_" if setting.graph else ""
        return any((case.name, shape, dtype, provider, graph + metric) in known for metric in ("time", LEFT_OUT))

    return [case for case in cases if not all(measured(case, *entry) for entry in entries)]


def _cost(case: Case, device: Device, terminal: Terminal, setting: Setting) -> Roofline | None:
    """What a case costs on paper; None, with the reason, where that is not known."""
    if setting.graph:
        setting = dataclasses.replace(setting, graph=False)
    try:
        return ceilings.cost_of(case, setting, device)
    except Exception as error:  # a figure beside the measured ones: they are worth having without it
        terminal.say(f"{case.name}: no roofline ({type(error).__name__}: {error})", "note")
        return None


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=options.summary(__doc__))
    parser.add_argument("--level", choices=LEVELS, default="model")
    parser.add_argument("--mode", choices=["inference", "train"], default="inference")
    parser.add_argument("--model", nargs="+", help="networks: torchvision's, or cifar_resnet20 and so on")
    parser.add_argument("--batch", nargs="+", type=options.positive, help="batch sizes")
    parser.add_argument("--size", type=options.positive, help="height and width of the images")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32"])
    parser.add_argument(
        "--provider", nargs="+", choices=list(PROVIDERS), metavar="NAME",
        help=f"any of {', '.join(PROVIDERS)} (default: the usual ones that can run)",
    )  # fmt: skip
    parser.add_argument(
        "--graph", action=argparse.BooleanOptionalAction,
        help="time replays of CUDA graphs too (default: on a GPU, but not for the training of models)",
    )  # fmt: skip
    parser.add_argument("--case", metavar="TEXT", help="only the cases with this in their name")
    parser.add_argument("--rounds", type=options.positive, help="turns of each provider that count")
    parser.add_argument("--warmup", type=float, help="seconds for each, at the most")
    parser.add_argument("--turn", type=float, help="seconds that a turn lasts at least")
    parser.add_argument("--threads", type=options.positive, help="threads on the CPU (default: torch's own choice)")
    parser.add_argument("--quick", action="store_true", help="few small cases and rounds: a trial, not a measurement")
    parser.add_argument("--resume", action="store_true", help="leave out the cases that the file has of this commit")
    parser.add_argument(
        "--limit", type=float, default=math.inf, metavar="SECONDS", help="end before that; --resume goes on"
    )
    options.add_common(parser)
    args = options.parse(parser, argv)
    preset = args.preset = presets.choose(args.quick, args.device.type)
    part = args.level != "model"
    args.model = args.model or (preset.parts_of if part else preset.models)
    args.size = args.size or preset.size
    args.provider = args.provider or presets.providers(preset, args.level)
    args.rounds = args.rounds or preset.rounds
    args.warmup = preset.warmup if args.warmup is None else args.warmup
    args.turn = (preset.part_turn if part else preset.turn) if args.turn is None else args.turn
    args.threads = args.threads or torch.get_num_threads()
    if args.graph is None:
        args.graph = args.device.type == "cuda" and (part or args.mode == "inference")
    if args.graph and args.device.type != "cuda":
        parser.error(f"argument --graph: expected a GPU, got device {args.device}")
    if args.limit <= 0:
        parser.error(f"argument --limit: expected a number of seconds above 0, got {args.limit:g}")
    try:
        args.cases = _cases(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def _cases(args: argparse.Namespace) -> list[Case]:
    """All cases of the command line.

    Raises:
        ValueError: a network or a case does not exist.
    """
    found: list[Case] = []
    if args.level == "model":
        for name in args.model:
            for batch in args.batch or presets.batches(args.preset, "model", args.mode, name):
                found += make_cases("model", [name], batch, args.size)
    else:
        for batch in args.batch or presets.batches(args.preset, args.level, args.mode, ""):
            found += make_cases(args.level, args.model, batch, args.size)
    if args.case is not None:
        found = [case for case in found if args.case in case.name]
        if not found:
            raise ValueError(f"argument --case: no case has {args.case!r} in its name")
    return [found[0], found[-1]] if args.quick and len(found) > presets.QUICK_CASES else found


if __name__ == "__main__":
    raise SystemExit(main())
