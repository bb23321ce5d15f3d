"""What changes with the batch: time per step, images per second, and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import labels
from benchmarks.plots import style
from benchmarks.records import Record
from benchmarks.speeds import GRAPH_TIME, TIME, Comparison, comparisons, on_gpu, views

FEWEST = 3
"""Batches, below which a line says nothing."""
MEMORY = {"peak_memory": "-", "predicted_peak": ":"}
"""Metrics, and the lines that stand for them."""
Points = dict[int, float]
"""A value for each batch."""


class Chart(NamedTuple):
    """One pair of axes: a line for each label."""

    title: str
    unit: str
    lines: dict[tuple[str, str], Points]
    """By provider and kind of line."""


def draw_latency(rows: Sequence[Record], path: Path) -> bool:
    """Write time per step and images per second against the batch; False where too few batches were measured."""
    charts = latency_charts(rows)
    note = "Medians. Both axes are logarithmic."
    return _draw(charts, path, [row for row in rows if row.metric in (TIME, GRAPH_TIME)], note, columns=2)


def draw_memory(rows: Sequence[Record], path: Path) -> bool:
    """Write the peak memory of a training step against the batch; False where too few batches were measured."""
    charts = memory_charts(rows)
    note = "Peak memory of a training step; dotted lines are predictions from what is saved for backward."
    if not all(on_gpu(row.conditions) for row in rows):
        note += " On a CPU it is the most that tensors take at once, counted."
    return _draw(charts, path, [row for row in rows if row.metric in MEMORY], note, columns=min(2, len(charts)))


def latency_charts(rows: Sequence[Record]) -> list[Chart]:
    """Two for each model, mode and dtype: milliseconds per step and images per second."""
    charts = []
    for title, group in _groups([one for one in views(comparisons(rows)) if one.times]):
        seconds = _lines(group, TIME, lambda one, value: value * 1e3)
        charts.append(Chart(title, "ms per step", seconds))
        charts.append(Chart(title, "images per second", _lines(group, TIME, lambda one, value: one.batch / value)))
    return [chart for chart in charts if chart.lines]


def memory_charts(rows: Sequence[Record]) -> list[Chart]:
    """One for each model and dtype, of training steps.

    Runs that took times on a CPU have the resident set of the process, libraries and all, which is not shown.
    """
    charts = []
    for title, group in _groups([one for one in comparisons(rows) if one.first.mode == "train" and _counted(one)]):
        lines: dict[tuple[str, str], Points] = {}
        for metric in MEMORY:
            lines |= _lines(group, metric, lambda one, value: value / 2**30)
        charts.append(Chart(title, "GiB", lines))
    return [chart for chart in charts if chart.lines]


def _counted(one: Comparison) -> bool:
    return on_gpu(one.first.conditions) or not one.timed


def _groups(found: Sequence[Comparison]) -> list[tuple[str, list[Comparison]]]:
    """Those that differ in nothing but batch and date, with a title, by rising batch."""
    groups: dict[tuple[object, ...], list[Comparison]] = {}
    for one in found:
        first = one.first
        if first.level == "model":
            how = ", CUDA graphs" * one.graphed
            machine = first.conditions.device, first.conditions.threads
            key = (first.name, first.mode, first.dtype, one.image, how, *machine)
            groups.setdefault(key, []).append(one)
    return [
        (f"{name}, {mode}, {dtype}, images {image}{how}", sorted(group, key=lambda one: one.batch))
        for (name, mode, dtype, image, how, *_), group in groups.items()
    ]


def _lines(
    group: Sequence[Comparison], metric: str, value: Callable[[Comparison, float], float]
) -> dict[tuple[str, str], Points]:
    """Of the providers for which there are enough batches."""
    lines: dict[tuple[str, str], Points] = {}
    for one in group:
        for provider in one.rows:
            median = one.median(provider, metric)
            if median:
                lines.setdefault((provider, MEMORY.get(metric, "-")), {})[one.batch] = value(one, median)
    return {key: points for key, points in lines.items() if len(points) >= FEWEST}


def _draw(charts: Sequence[Chart], path: Path, rows: Sequence[Record], note: str, columns: int) -> bool:
    if not charts:
        return False
    height = -(-len(charts) // columns)
    figure, axes = style.subplots(height, columns, (4.6 * columns + 2.2, (3.4 if height < 4 else 2.6) * height + 0.5))
    looks = style.styles(provider for chart in charts for provider, _ in chart.lines)
    for index, chart in enumerate(charts):
        _chart(axes[index // columns, index % columns], chart, looks, legend=index % columns == columns - 1)
    for axis in axes.flat[len(charts) :]:
        axis.set_visible(False)
    style.finish(figure, path, rows, note)
    return True


def _chart(axis: Any, chart: Chart, looks: dict[str, style.Style], legend: bool) -> None:
    for provider in labels.ordered(provider for provider, _ in chart.lines):
        for kind in dict.fromkeys(MEMORY.values()):
            points = chart.lines.get((provider, kind))
            if points:
                look = looks[provider]
                predicted = kind == MEMORY["predicted_peak"]
                axis.plot(
                    list(points), list(points.values()), linestyle=kind, color=look.color,
                    marker="" if predicted else look.marker, markersize=5, markeredgecolor=style.DARK,
                    markeredgewidth=0.4, label=labels.label(provider) + (", predicted" if predicted else ""),
                )  # fmt: skip
    if chart.unit == "GiB":  # a fixed part and one per image: a straight line
        axis.set_ylim(bottom=0)
    else:
        batches = sorted({batch for points in chart.lines.values() for batch in points})
        axis.set_yscale("log")
        axis.set_xscale("log", base=2)
        axis.set_xticks(batches, [str(batch) for batch in batches])
    axis.set_title(chart.title, loc="left", fontsize=9)
    axis.set_xlabel("batch", fontsize=9)
    axis.set_ylabel(chart.unit, fontsize=9)
    style.plain_axes(axis)
    if legend:
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
