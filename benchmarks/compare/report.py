"""What a comparison prints, and the CSV that it writes if asked to."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare.contest import Comparison
from benchmarks.compare.statistics import CONFIDENCE, UNKNOWN, Ratio
from benchmarks.compare.tasks import HOST, MODEL
from benchmarks.measure import Quantiles
from benchmarks.records import Conditions, dtype_text, shape_text

HEADINGS = ("base -> now", "ratio", "20-80 %", f"{CONFIDENCE:.0%}", f"noise {CONFIDENCE:.0%}", "")
COLUMNS = (
    "kind", "name", "mode", "shape", "dtype", "base_p20", "base_p50", "base_p80", "now_p20", "now_p50", "now_p80",
    "ratio_p20", "ratio_p50", "ratio_p80", "low", "high", "control_p50", "control_low", "control_high", "rounds",
    "verdict", "wrong", "base", "now", "device", "threads", "versions", "date",
)  # fmt: skip


def table(comparisons: Sequence[Comparison]) -> Any:
    """For rich to print."""
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), title="now / base", title_justify="left")
    for index, heading in enumerate(HEADINGS):
        drawn.add_column(heading, justify="right" if index else "left", no_wrap=index > 0, overflow="fold")
    colors = {"slower": "red", "wrong": "red", "faster": "green"}
    for comparison in comparisons:
        drawn.add_row(*_cells(comparison, "\n"), style=colors.get(comparison.verdict))
    return drawn


def lines(comparisons: Sequence[Comparison]) -> list[str]:
    """The same in plain text."""
    rows = [HEADINGS, *(_cells(comparison, ", ") for comparison in comparisons)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(HEADINGS))]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return ["  ".join(row).rstrip() for row in padded]


def show(comparisons: Sequence[Comparison]) -> None:
    """The table, then what is wrong, and a sentence that says what the marks mean."""
    if importlib.util.find_spec("rich") is not None:
        from rich.console import Console

        Console(highlight=False).print(table(comparisons))
    else:
        print("\n".join(lines(comparisons)))
    for comparison in comparisons:
        for text in comparison.wrong:
            print(f"wrong: {title(comparison)}: {text}")
    print(summary(comparisons))


def summary(comparisons: Sequence[Comparison]) -> str:
    """How many of each, and what it takes to be one."""
    counts = {mark: sum(found.verdict == mark for found in comparisons) for mark in ("faster", "slower", "wrong")}
    found = ", ".join(f"{count} {mark}" for mark, count in counts.items() if count) or "nothing beyond the noise"
    note = "too few rounds for an interval; " if any(c.verdict == UNKNOWN for c in comparisons) else ""
    noise = ", and that is larger than what two processes of base differ by"
    meaning = f"a change is one whose interval leaves out 1{noise if all(c.control for c in comparisons) else ''}"
    return f"{len(comparisons)} compared: {found} ({note}{meaning})"


def title(comparison: Comparison) -> str:
    """resnet50, train, 8x3x224x224, float32."""
    task = comparison.task
    what = {MODEL: "", HOST: "host time of "}.get(task.kind, "")
    return f"{what}{task.name}, {task.mode}, {shape_text(task.shape)}, {dtype_text(task.dtype)}"


def write(path: Path, comparisons: Iterable[Comparison], labels: tuple[str, str], conditions: Conditions) -> None:
    """A row per comparison.

    Args:
        path: replaced.
        comparisons: all.
        labels: the commits, base and now.
        conditions: of the machine.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for comparison in comparisons:
            writer.writerow(_row(comparison, labels, conditions))


def _row(comparison: Comparison, labels: tuple[str, str], conditions: Conditions) -> list[object]:
    task, ratio, control = comparison.task, comparison.ratio, comparison.control
    numbers = [*comparison.base, *comparison.now, *ratio.quantiles, *(ratio.interval or ("", ""))]
    numbers += [control.quantiles.p50, *(control.interval or ("", ""))] if control else [""] * 3
    row: list[object] = [task.kind, task.name, task.mode, shape_text(task.shape), dtype_text(task.dtype)]
    row += [f"{number:.6g}" if isinstance(number, float) else number for number in numbers]
    row += [ratio.rounds, comparison.verdict, "; ".join(comparison.wrong), *labels]
    return [*row, conditions.device, conditions.threads, conditions.versions, conditions.date]


def _cells(comparison: Comparison, separator: str) -> tuple[str, ...]:
    ratio, control = comparison.ratio, comparison.control
    return (
        f"{title(comparison)}{separator}{_time(comparison.base)} -> {_time(comparison.now)}",
        f"{ratio.quantiles.p50:.3f}", f"{ratio.quantiles.p20:.3f}-{ratio.quantiles.p80:.3f}", _interval(ratio),
        "" if control is None else _interval(control), comparison.verdict,
    )  # fmt: skip


def _interval(ratio: Ratio) -> str:
    return "-" if ratio.interval is None else "{:.3f}-{:.3f}".format(*ratio.interval)


def _time(seconds: Quantiles) -> str:
    """With three digits: 12.3 ms."""
    scale, unit = next(((s, u) for s, u in ((1.0, "s"), (1e3, "ms")) if seconds.p50 * s >= 1), (1e6, "us"))
    return f"{seconds.p50 * scale:.3g} {unit}"
