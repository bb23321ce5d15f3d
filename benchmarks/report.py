"""Tables, for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks import labels, speeds
from benchmarks.labels import number_text, time_unit
from benchmarks.measure import Quantiles
from benchmarks.providers import BASELINE, BASELINE_CHANNELS_LAST
from benchmarks.records import Record
from benchmarks.speeds import OURS, Comparison, by_level, comparisons, views

FASTER, SLOWER = 1.02, 0.98
"""Ratios outside of these are coloured."""
RESTLESS = 0.15
"""A spread over which a measurement says more about the machine than about what was measured."""
WIDTH, GAP = 80, 2
"""Of a table, and between its columns."""


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
    return f"[{color}]{labels.ratio_text(ratio)}[/]"


class _Column(NamedTuple):
    """One that is shown where there is something in it and room for it."""

    head: str
    text: Callable[[Comparison, str], str | None]
    """Of a provider; None where there is nothing."""


def case_tables(records: Sequence[Record]) -> Iterable[Table]:
    """A table of all providers for each case and dtype."""
    found = views(comparisons(records))
    wide = {_but_dtype(one): one for one in found if one.first.dtype == "float32"}
    for one in by_level(found):
        if one.times:
            yield _case_table(one, wide.get(_but_dtype(one)))


def _but_dtype(one: Comparison) -> tuple[object, ...]:
    first = one.first
    return first.level, first.name, first.mode, first.shape, first.conditions, one.graphed


def _case_table(one: Comparison, wide: Comparison | None) -> Table:
    scale, unit = time_unit(row.p50 for row in one.times.values())
    rows = {provider: [provider] for provider in one.times}
    heads = ["provider"]
    width = max(map(len, rows))
    for column in _columns(one, wide, scale, unit):
        texts = {provider: column.text(one, provider) for provider in rows}
        lines = [*column.head.split("\n"), *(Text.from_markup(text).plain for text in texts.values() if text)]
        needed = GAP + max(map(len, lines))
        if any(texts.values()) and width + needed <= WIDTH:
            width += needed
            heads.append(column.head)
            for provider, text in texts.items():
                rows[provider].append(text or "-")
    first = one.first
    how = ", CUDA graphs" * one.graphed
    table = new_table(f"{first.name}, {first.mode}, {first.shape}, {first.dtype}{how}", heads)
    for cells in rows.values():
        table.add_row(*cells)
    return table


def _columns(one: Comparison, wide: Comparison | None, scale: float, unit: str) -> Sequence[_Column]:
    """The most important first."""

    def metric(name: str, form: Callable[[float], str]) -> Callable[[Comparison, str], str | None]:
        def text(one: Comparison, provider: str) -> str | None:
            value = one.median(provider, name)
            return None if value is None else form(value)

        return text

    def roofline(one: Comparison, provider: str) -> str | None:
        fraction = one.times[provider].roofline
        return f"{fraction:.0%}" if fraction else None

    def against(base: str, other: Comparison | None = None) -> Callable[[Comparison, str], str | None]:
        other = other or one
        return lambda one, provider: (
            ratio_text(other.times[base].p50 / one.times[provider].p50) if base in other.times else None
        )

    columns = [
        _Column(unit, lambda one, provider: number_text(one.times[provider].p50 * scale)),
        _Column("spread", lambda one, provider: spread_text(one.times[provider].quantiles)),
        _Column("vs\neager", against(BASELINE)),
        _Column("vs ch.\nlast", against(BASELINE_CHANNELS_LAST)),
        _Column("roof-\nline", roofline),
        _Column("error", _error),
        _Column("launches", metric("launches", lambda value: f"{value:.0f}")),
        _Column("host\nus", metric("host_time", lambda value: number_text(value * 1e6))),
        _Column("peak\nMB", metric("peak_memory", lambda value: f"{value / 1e6:.0f}")),
        _Column("page\nfaults", metric("minor_faults", lambda value: f"{value:.0f}")),
        _Column("system\nms", metric("system_time", lambda value: f"{value * 1e3:.1f}")),
    ]
    if wide and one.first.dtype != "float32":
        columns.insert(4, _Column("vs\nfp32", against(BASELINE, wide)))
    return columns


def _error(one: Comparison, provider: str) -> str | None:
    errors = [row.p50 for name, row in one.rows[provider].items() if name.startswith("error_")]
    return f"{max(errors):.0e}" if errors else None


def summary_tables(records: Sequence[Record]) -> Iterable[Table]:
    """A table for each level, mode and dtype: resfuse against its best peer in every case."""
    found = [one for one in views(by_level(comparisons(records))) if OURS in one.times]
    for key in dict.fromkeys(_chapter(one) for one in found):
        yield _summary_table(key, [one for one in found if _chapter(one) == key])


def _chapter(one: Comparison) -> tuple[str, str, str, str, bool]:
    first = one.first
    return first.level, first.mode, first.dtype, first.conditions.device, one.graphed


def _summary_table(key: tuple[str, str, str, str, bool], found: Sequence[Comparison]) -> Table:
    level, mode, dtype, device, graphed = key
    scale, unit = time_unit(one.times[OURS].p50 for one in found)
    batches, images = {one.batch for one in found}, {one.image for one in found}
    same = f", batch {batches.pop()}" if len(batches) == 1 else ""
    heads = ["case", *([] if same else ["batch"]), f"resfuse\n{unit}", "best peer", f"its\n{unit}"]
    title = f"{level}s, {mode}, {dtype}{', CUDA graphs' * graphed}{same}"
    title += f", images {images.pop()}" if level == "model" and len(images) == 1 else ""
    table = new_table(f"{title}, {device}", [*heads, "vs\npeer", "vs\neager", "roof-\nline"])
    table.columns[heads.index("best peer")].justify = "left"
    table.columns[0].no_wrap = False
    for one in found:
        peer, row = one.best_peer, one.times[OURS]
        table.add_row(
            one.first.name, *([] if same else [str(one.batch)]), number_text(row.p50 * scale), peer or "-",
            number_text(one.times[peer].p50 * scale) if peer else "-", ratio_text(one.against_best_peer()),
            ratio_text(one.speed(OURS, one.base)), f"{row.roofline:.0%}" if row.roofline else "-",
        )  # fmt: skip
    if len(found) > 1:
        table.add_section()
        peer_mean = speeds.geometric_mean(one.against_best_peer() for one in found)
        eager_mean = speeds.geometric_mean(one.speed(OURS, one.base) for one in found)
        blank = [""] * (len(heads) - 1)
        table.add_row("geometric mean", *blank, ratio_text(peer_mean), ratio_text(eager_mean), "")
    return table


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
