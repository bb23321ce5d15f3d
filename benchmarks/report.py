"""Tables, for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Quantiles
from benchmarks.providers import BASELINE, BASELINE_CHANNELS_LAST
from benchmarks.records import Conditions, Record

FASTER, SLOWER = 1.02, 0.98
"""Ratios outside of these are coloured."""
RESTLESS = 0.15
"""A spread over which a measurement says more about the machine than about what was measured."""


def new_table(title: str, columns: Sequence[str]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
        show_edge=False, pad_edge=False,
    )  # fmt: skip
    table.add_column(columns[0], style="cyan", no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def number_text(value: float) -> str:
    """Three digits, or all those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def spread_text(values: Quantiles) -> str:
    """The distance from p20 to p80, as a part of the median."""
    return f"{spread(values):.0%}"


def spread(values: Quantiles) -> float:
    """(p80 - p20) / p50."""
    return (values.p80 - values.p20) / values.p50


def warn_if_restless(console: Console, records: Iterable[Record]) -> None:
    """Say so where times scatter too much for their ratios to mean something."""
    restless = [record for record in records if spread(record.quantiles) > RESTLESS]
    if restless:
        console.print(
            f"The spread is over {RESTLESS:.0%} in {len(restless)} of these rows: was something else running? Not all "
            "providers suffer alike from that, so the ratios would be wrong too.",
            style="yellow",
        )


def show_table(console: Console, table: Table) -> None:
    """Print a table between blank lines."""
    console.print()
    console.print(table)
    console.print()


def ratio_text(ratio: float | None) -> str:
    """A speed ratio, where more than 1 is better; a dash where it is unknown."""
    if ratio is None:
        return "-"
    color = "green" if ratio > FASTER else "red" if ratio < SLOWER else "default"
    return f"[{color}]{ratio:.2f}x[/]"


def show_conditions(console: Console, conditions: Conditions) -> None:
    """What the results depend on, before they come."""
    console.print(f"{conditions.device}, {conditions.threads} threads, commit {conditions.commit or 'unknown'}")
    console.print(conditions.versions, highlight=False)


def model_tables(records: Sequence[Record]) -> Iterable[Table]:
    """A table for each dtype of one case of a model benchmark."""
    by_key = {(record.provider, record.dtype, record.metric): record for record in records}
    for dtype in dict.fromkeys(record.dtype for record in records):
        yield _model_table([record for record in records if record.dtype == dtype], by_key)


def _model_table(records: Sequence[Record], by_key: Mapping[tuple[str, str, str], Record]) -> Table:
    first = records[0]
    wide = first.dtype == "float32"
    columns = ["provider", "ms", "spread", "vs\neager", "vs ch.\nlast"]
    columns += [] if wide else ["vs\nfp32"]
    table = new_table(
        f"{first.name}, {first.mode}, {first.shape}, {first.dtype}", [*columns, "page\nfaults", "system\nms", "error"]
    )
    for record in records:
        if record.metric != "time":
            continue

        def against(provider: str, dtype: str, record: Record = record) -> str:
            base = by_key.get((provider, dtype, "time"))
            return ratio_text(base.p50 / record.p50 if base else None)

        def median(metric: str, record: Record = record) -> float:
            return by_key[record.provider, record.dtype, metric].p50

        errors = [by_key[record.provider, record.dtype, name].p50 for name in error_metrics(record.mode)]
        table.add_row(
            record.provider,
            number_text(record.p50 * 1e3),
            spread_text(record.quantiles),
            against(BASELINE, record.dtype),
            against(BASELINE_CHANNELS_LAST, record.dtype),
            *([] if wide else [against(BASELINE, "float32")]),
            f"{median('minor_faults'):.0f}",
            f"{median('system_time') * 1e3:.1f}",
            f"{max(errors):.0e}",
        )
    return table


def error_metrics(mode: str) -> tuple[str, ...]:
    """The metrics of a mode that are relative errors."""
    return ("error_output",) if mode == "inference" else ("error_loss", "error_gradient")


def pair_table(title: str, records: Sequence[Record], unit: str, scale: float) -> Table:
    """Two providers side by side, resfuse the second; the ratio is of what it needs to what the first needs."""
    first, second = dict.fromkeys(record.provider for record in records)
    table = new_table(title, ["what", "mode", "eager", second, "ratio"])
    table.columns[1].justify = "left"
    by_key = {(record.name, record.mode, record.provider): record.p50 for record in records}
    for name, mode in dict.fromkeys((record.name, record.mode) for record in records):
        before, after = by_key[name, mode, first], by_key[name, mode, second]
        table.add_row(
            name, mode, f"{number_text(before * scale)} {unit}", f"{number_text(after * scale)} {unit}",
            f"{after / before:.2f}",
        )  # fmt: skip
    return table
