"""Hold the fused operators of every backend of this machine against the numerical contract; exit code 1 if broken."""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from resfuse import contract
from resfuse.backends import dispatch as registry
from resfuse.cli import cases, model_table, models
from resfuse.contract import Deviation

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Finding = tuple[str, Deviation]
"""What was run, and how far off it is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", action="append", choices=registry.PREFERENCE, help="only this (repeatable)")
    parser.add_argument("--op", action="append", choices=tuple(cases.VERBS), help="only this (repeatable)")
    parser.add_argument("--dtype", action="append", choices=tuple(DTYPES), help="only this (repeatable)")
    parser.add_argument("--model", metavar="NAME", help="also fuse a torchvision model, e.g. resnet50, and compare")
    parser.add_argument(
        "--models",
        nargs="*",
        metavar="PATTERN",
        help="instead: fuse every listed model of torchvision and timm (whose name has a pattern in it, such as "
        "timm/resnetv2), and compare forward, gradients and statistics; takes minutes",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the table of --models to this .csv")


def run(args: argparse.Namespace) -> int:
    console = Console(highlight=False)
    if args.models is not None:
        return model_table.run(args.models, args.output, console)
    if args.model and (objection := _model_objection(args.model)):
        console.print(f"--model: {objection}", markup=False, soft_wrap=True)
        return 1
    unavailable = registry.unavailable_reasons()
    wanted = args.backend or list(registry.PREFERENCE)
    backends = [name for name in wanted if unavailable[name] is None]
    for name in wanted:
        if unavailable[name] is not None:
            console.print(f"[yellow]{name} is left out:[/] {escape(str(unavailable[name]))}")
    if not backends:
        console.print("[red]None of the backends asked for can be used here.[/]")
        return 1
    started = time.perf_counter()
    plan = list(cases.runs(backends, args.op or list(cases.VERBS), [DTYPES[name] for name in args.dtype or DTYPES]))
    findings, skipped = _execute(plan, console)
    for title, group in findings.items():
        console.print(_table(title, group))
    for reason, names in skipped.items():
        console.print(f"[yellow]Not run:[/] {', '.join(sorted(names))}: {escape(reason)}")
    everything = [finding for group in findings.values() for finding in group]
    if args.model:
        model_findings = _verify_model(args.model, console)
        console.print(_table(f"{args.model}, fused by resfuse.fuse_", model_findings))
        everything += model_findings
    return _conclude(everything, time.perf_counter() - started, console)


def _execute(plan: list[cases.Run], console: Console) -> tuple[dict[str, list[Finding]], dict[str, set[str]]]:
    """All findings by backend and dtype, and what could not be run by reason."""
    findings: dict[str, list[Finding]] = {}
    skipped: dict[str, set[str]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=console.is_terminal) as progress:
        task = progress.add_task("fused, eager, float64", total=len(plan))
        for case in plan:
            dtype = str(case.dtype).removeprefix("torch.")
            reasons = case.reasons_against()
            for reason in reasons:
                skipped.setdefault(reason, set()).add(f"{case.case.op} on {case.backend}")
            if not reasons:
                group = findings.setdefault(f"{case.backend} backend on {case.device.type}, {dtype}", [])
                group += _findings(case)
            progress.advance(task)
    return dict(sorted(findings.items())), skipped


def _findings(case: cases.Run) -> list[Finding]:
    """How far off the case is; a backend that raises is as far off as can be, and the rest is still verified."""
    try:
        return [(str(case), deviation) for deviation in case.deviations()]
    except Exception as error:
        message = f"raised {type(error).__name__}: {error}"
        return [(str(case), Deviation(message.partition("\n")[0], *[math.nan] * 6))]


def _model_objection(name: str) -> str | None:
    """Why a model can not be verified, None if it can."""
    missing = models.missing_packages()
    if missing:
        return f"needs {', '.join(missing)}: pip install 'resfuse[demo]'"
    from torchvision.models import list_models

    return None if name in list_models() else f"torchvision has no model {name!r}"


def _verify_model(name: str, console: Console) -> list[Finding]:
    """Findings about a whole torchvision model on the CPU, in float32 and bfloat16."""
    findings = []
    for dtype in ("float32", "bfloat16"):
        with console.status(f"{name}, {dtype}"):
            for mode, deviation in models.deviations(name, DTYPES[dtype], torch.device("cpu")):
                findings.append((f"{dtype}, {name}, {mode}", deviation))
    return findings


def _table(title: str, findings: list[Finding]) -> Table:
    """The worst finding of every quantity of every operator."""
    table = Table(title=title, title_justify="left", title_style="bold", caption_justify="left")
    table.add_column("op", style="cyan", no_wrap=True)
    table.add_column("quantity", no_wrap=True, max_width=24)
    for heading in ("E(fused)", "E(eager)", "limit", "used"):
        table.add_column(heading, justify="right", no_wrap=True)
    previous = ""
    for (op, quantity), group in _by_quantity(findings):
        worst = max((deviation for _, deviation in group), key=lambda deviation: deviation.used)
        errors = (f"{value:.1e}" for value in (worst.fused, worst.eager, worst.limit))
        if previous and op != previous:
            table.add_section()
        color = "bold red" if worst.violated else "green"
        used = f"{worst.used:.0%}" if math.isfinite(worst.used) else "inf"
        table.add_row("" if op == previous else op, escape(quantity), *errors, f"[{color}]{used}[/]")
        previous = op
    return table


def _by_quantity(findings: list[Finding]) -> Iterable[tuple[tuple[str, str], list[Finding]]]:
    """Groups by (operator, quantity), in the order in which they first appear."""
    keyed = [((what.partition(",")[0], deviation.quantity), (what, deviation)) for what, deviation in findings]
    order = {key: index for index, key in enumerate(dict.fromkeys(key for key, _ in keyed))}
    by_op = {op: index for index, op in enumerate(dict.fromkeys(op for op, _ in order))}
    keyed.sort(key=lambda item: (by_op[item[0][0]], order[item[0]]))
    for key, group in itertools.groupby(keyed, key=lambda item: item[0]):
        yield key, [finding for _, finding in group]


def _conclude(findings: list[Finding], seconds: float, console: Console) -> int:
    rule = (
        f"E(fused) <= {contract.FACTOR:g} E(eager) + floor, worst element <= {contract.ELEMENT_FACTOR:g} x eager's, "
        "both against float64"
    )
    violations = [finding for finding in findings if finding[1].violated]
    for what, deviation in violations:
        console.print(f"[bold red]violation[/] {escape(what)}\n  {escape(str(deviation))}", soft_wrap=True)
    if not findings:
        console.print("[red]Nothing could be compared.[/]")
        return 1
    if violations:
        console.print(f"[bold red]{len(violations)} of {len(findings)} comparisons break the contract[/]: {rule}.")
        return 1
    console.print(f"[bold green]All {len(findings)} comparisons keep the contract[/] ({seconds:.0f} s): {rule}.")
    return 0
