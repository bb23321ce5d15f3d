"""The equality table: every listed model of torchvision and timm, fused, against the numerical contract."""

from __future__ import annotations

import csv
import importlib.util
import math
import time
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from resfuse import contract
from resfuse.cli import catalogue, equality
from resfuse.cli.catalogue import Entry
from resfuse.cli.equality import Comparison

COLUMNS = ("mode", "worst quantity", "E(fused)", "E(eager)", "limit", "used")

NUMBERS = ("fused", "eager", "limit", "fused_max", "eager_max", "limit_max", "used")
"""Fields of a Deviation."""


def run(patterns: Sequence[str], output: Path | None, console: Console) -> int:
    """Compare the models that have one of the patterns in their names, or all; print a table, and write a CSV file.

    Returns:
        0, or 1 where the contract is broken, a model fails, or there is nothing to compare.
    """
    missing = [name for name in ("torchvision", "timm") if importlib.util.find_spec(name) is None]
    if missing:
        console.print(f"--models: needs {' and '.join(missing)}: pip install {' '.join(missing)}", soft_wrap=True)
        return 1
    entries = [entry for entry in catalogue.entries() if not patterns or any(part in str(entry) for part in patterns)]
    if not entries:
        console.print(f"--models: no listed model has {' or '.join(patterns)} in its name", markup=False)
        return 1
    started = time.perf_counter()
    comparisons, failures = _compare(entries, console)
    console.print(_table(comparisons))
    if output is not None:
        _write(output, comparisons)
        console.print(f"Wrote {output}", soft_wrap=True, markup=False)
    for entry, error in failures:
        console.print(f"[bold red]{escape(str(entry))} failed[/]: {escape(error)}", soft_wrap=True)
    return _conclude(comparisons, len(failures), time.perf_counter() - started, console)


def _compare(entries: Sequence[Entry], console: Console) -> tuple[list[Comparison], list[tuple[Entry, str]]]:
    """All comparisons; a model that can not be compared does not keep the others from it."""
    comparisons: list[Comparison] = []
    failures: list[tuple[Entry, str]] = []
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=console.is_terminal) as progress:
        task = progress.add_task("", total=len(entries))
        for entry in entries:
            progress.update(task, description=escape(str(entry)))
            try:
                comparisons += equality.compare(entry)
            except Exception as error:
                failures.append((entry, f"{type(error).__name__}: {error}".partition("\n")[0]))
            progress.advance(task)
    return comparisons, failures


def _cells(comparison: Comparison) -> tuple[str, ...]:
    worst = comparison.worst
    mode = "training" if comparison.training else "inference"
    used = f"{worst.used:.0%}" if math.isfinite(worst.used) else "inf"
    return mode, worst.quantity, f"{worst.fused:.1e}", f"{worst.eager:.1e}", f"{worst.limit:.1e}", used


def _table(comparisons: Sequence[Comparison]) -> Table:
    table = Table(
        title="Fused against eager, both against float64", title_justify="left", title_style="bold",
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False,
    )  # fmt: skip
    table.add_column("model (fused calls)", style="cyan")
    for heading in COLUMNS:
        table.add_column(heading, justify="left" if heading in COLUMNS[:2] else "right", no_wrap=heading != COLUMNS[1])
    previous: Entry | None = None
    for comparison in comparisons:
        *cells, used = _cells(comparison)
        color = "bold red" if comparison.worst.violated else "green"
        name = "" if comparison.entry == previous else f"{comparison.entry} ({comparison.calls})"
        table.add_row(escape(name), *cells, f"[{color}]{used}[/]")
        previous = comparison.entry
    return table


def _write(path: Path, comparisons: Sequence[Comparison]) -> None:
    """One line per model, mode and quantity."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("family", "model", "mode", "fused_calls", "flipped_signs", "quantity", *NUMBERS))
        for comparison in comparisons:
            mode = "training" if comparison.training else "inference"
            for found in comparison.deviations:
                values = [f"{getattr(found, name):.3g}" for name in NUMBERS]
                writer.writerow(
                    (*comparison.entry[:2], mode, comparison.calls, comparison.flips, found.quantity, *values)
                )


def _conclude(comparisons: Sequence[Comparison], failures: int, seconds: float, console: Console) -> int:
    broken = [(comparison, found) for comparison in comparisons for found in comparison.deviations if found.violated]
    for comparison, found in broken:
        mode = "training" if comparison.training else "inference"
        console.print(f"[bold red]violation[/] {escape(str(comparison.entry))}, {mode}\n  {found}", soft_wrap=True)
    count = len({comparison.entry for comparison in comparisons})
    rule = (
        f"E(fused) <= {contract.FACTOR:g} E(eager) + floor, worst element <= {contract.ELEMENT_FACTOR:g} x eager's, "
        "for the output, all gradients and all running statistics"
    )
    if broken or failures:
        console.print(f"[bold red]{len(broken)} violations, {failures} models failed[/]: {rule}.", soft_wrap=True)
        return 1
    console.print(f"[bold green]All {count} models keep the contract[/] ({seconds:.0f} s): {rule}.", soft_wrap=True)
    return 0
