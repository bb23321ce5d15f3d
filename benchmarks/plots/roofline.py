"""The roofline of every layer: FLOP/s achieved, against the FLOPs that there are for each byte moved.

The lines are the ceilings that the same run measured: bandwidth times intensity, and the rate of a matrix product
(Williams, Waterman and Patterson 2009, https://doi.org/10.1145/1498765.1498785).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import labels
from benchmarks.plots import style
from benchmarks.records import Record
from benchmarks.roofs import Ceilings, ceilings
from benchmarks.speeds import OURS, Comparison, comparisons

LEVELS = ("layer", "block", "op")
NAMED = 3
"""Layers whose names are written beside them: those of resfuse that are furthest below the roof."""
NOTE = (
    "One marker per layer and provider, by the median time. FLOPs and bytes are those of the fused layer, for all "
    "providers alike; the lines are ceilings measured in the same run."
)


class Point(NamedTuple):
    """A provider at work on a case."""

    provider: str
    name: str
    intensity: float
    """FLOPs per byte."""
    rate: float
    """FLOP/s."""


class Panel(NamedTuple):
    """The cases of one level, mode, dtype and run."""

    title: str
    dtype: str
    roof: Ceilings
    points: list[Point]


def draw(rows: Sequence[Record], path: Path) -> bool:
    """Write a chart for each level, mode and dtype; False where no case has FLOPs, bytes and ceilings."""
    found = panels(rows)
    if not found:
        return False
    figure, axes = style.subplots(len(found), 1, (9.0, 4.6 * len(found) + 0.5))
    looks = style.styles(point.provider for panel in found for point in panel.points)
    for axis, panel in zip(axes[:, 0], found, strict=True):
        _scatter(axis, panel, looks)
    style.finish(figure, path, rows, NOTE)
    return True


def panels(rows: Sequence[Record]) -> list[Panel]:
    """The charts that rows have the values for."""
    groups: dict[tuple[object, ...], tuple[Comparison, list[Point]]] = {}
    for one in (comparison.views[-1] for comparison in comparisons(rows)):
        first = one.first
        points = [point for provider in one.times if (point := _point(one, provider))]
        if first.level in LEVELS and points:
            key = (first.level, first.mode, first.dtype, first.conditions.device, first.conditions.threads)
            groups.setdefault(key, (one, []))[1].extend(points)
    found = []
    for one, points in groups.values():
        first, roof = one.first, ceilings(rows, one.first.conditions)
        if roof.bandwidth and first.dtype in roof.rates:
            found.append(
                Panel(
                    f"{first.level}s, {first.mode}, {first.dtype}{', CUDA graphs' * one.graphed}",
                    first.dtype,
                    roof,
                    points,
                )
            )
    return found


def _point(one: Comparison, provider: str) -> Point | None:
    row = one.times[provider]
    if not (row.flops and row.bytes and row.p50):
        return None
    return Point(provider, row.name, row.flops / row.bytes, row.flops / row.p50)


def _scatter(axis: Any, panel: Panel, looks: dict[str, style.Style]) -> None:
    roof, dtype = panel.roof, panel.dtype
    for provider in labels.ordered(point.provider for point in panel.points):
        shown = [point for point in panel.points if point.provider == provider]
        look = looks[provider]
        axis.plot(
            [point.intensity for point in shown], [point.rate for point in shown], linestyle="none", color=look.color,
            marker=look.marker, markersize=6, markeredgecolor=style.DARK, markeredgewidth=0.4, alpha=0.9,
            label=labels.label(provider),
        )  # fmt: skip
    ridge = roof.rates[dtype] / roof.bandwidth
    edges = [*(point.intensity for point in panel.points), ridge]
    line = [min(edges) / 2, ridge, max(edges) * 2]
    axis.plot(line, [roof.attainable(x, dtype) for x in line], color=style.DARK, linewidth=1.2, zorder=1)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_title(
        f"{panel.title}: {roof.bandwidth / 1e9:,.0f} GB/s, {roof.rates[dtype] / 1e12:,.2f} TFLOP/s",
        loc="left", fontsize=10,
    )  # fmt: skip
    axis.set_xlabel("FLOPs per byte", fontsize=9)
    axis.set_ylabel("FLOP/s", fontsize=9)
    style.plain_axes(axis)
    for point in furthest(panel):
        axis.annotate(
            point.name, (point.intensity, point.rate), xytext=(6, -9), textcoords="offset points", fontsize=6.5,
            color=style.GREY,
        )  # fmt: skip
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def furthest(panel: Panel) -> list[Point]:
    """The points of resfuse that reach the least part of what the roof allows there."""
    ours = [point for point in panel.points if point.provider == OURS]
    return sorted(ours, key=lambda one: one.rate / panel.roof.attainable(one.intensity, panel.dtype))[:NAMED]
