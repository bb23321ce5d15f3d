"""Speeds, and other quantities, of all providers as ratios to eager PyTorch: bars for few cases, dots for many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import labels
from benchmarks.measure import Quantiles
from benchmarks.plots import style
from benchmarks.records import Record
from benchmarks.speeds import BASELINES, Comparison, comparisons, views

WIDTH = 0.8
"""Of a group of bars, where groups are 1 apart."""
MOST_BARS, MOST_GROUPS = 64, 8
"""In one chart; where there are more, each case is a line of dots."""
CROWDED_BARS = 44
NOTE = "Medians; lines from p20 to p80."
Groups = dict[str, dict[str, Quantiles]]
"""Ratios, by case and by provider."""


class Panel(NamedTuple):
    """One chart of a figure."""

    title: str
    label: str
    groups: Groups

    @property
    def providers(self) -> list[str]:
        """Those of all its cases."""
        return labels.ordered(provider for group in self.groups.values() for provider in group)

    @property
    def bars(self) -> int:
        """How many there would be, gaps included."""
        return len(self.groups) * len(self.providers)

    @property
    def dotted(self) -> bool:
        """Whether that is too much for bars."""
        return self.bars > MOST_BARS or len(self.groups) > MOST_GROUPS


def draw(rows: Sequence[Record], path: Path) -> bool:
    """Write a chart for each level, mode, dtype and quantity into one figure; False where nothing can be compared."""
    found = panels(rows)
    if not found:
        return False
    heights = [1.1 + 0.2 * len(panel.groups) if panel.dotted else 3.4 for panel in found]
    widths = [9.0 if panel.dotted else 3.0 + 0.34 * panel.bars for panel in found]
    figure, axes = style.subplots(len(found), 1, (min(14.0, max(8.0, *widths)), sum(heights) + 0.5), heights)
    looks = style.styles(provider for panel in found for provider in panel.providers)
    for axis, panel in zip(axes[:, 0], found, strict=True):
        (_dots if panel.dotted else _bars)(axis, panel, looks)
        axis.set_title(panel.title, loc="left", fontsize=10)
    style.finish(figure, path, rows, NOTE)
    return True


def panels(rows: Sequence[Record]) -> list[Panel]:
    """The charts that rows have the values for; a ratio is of quantities of one case and one run."""
    found = comparisons(rows)
    timed = [one for one in views(found) if one.times]
    charts = []
    for key in dict.fromkeys(_chart(one) for one in timed):
        chosen = [one for one in timed if _chart(one) == key]
        level, mode, dtype, image, graphed = key
        title = f"{level}s, {mode}, {dtype}" + (f", images {image}" if image else "") + ", CUDA graphs" * graphed
        wide = {_but_dtype(one): one for one in timed if one.first.dtype == "float32"}
        for bases in (None, wide) if dtype != "float32" and level == "model" else (None,):
            charts += [Panel(title, label, groups) for label, groups in _speeds(chosen, bases).items()]
    for metric, title, name in (
        ("host_time", "host time per call", _name_and_mode),
        ("saved_bytes", "saved bytes", _name_and_batch),
    ):
        for dtype in dict.fromkeys(one.first.dtype for one in found):
            costs = [one for one in found if one.first.dtype == dtype and not one.timed]
            if metric == "saved_bytes":  # at any batch the ratio is the same
                costs = list({one.first.name: one for one in sorted(costs, key=lambda one: one.batch)}.values())
            charts.append(Panel(f"{title}, {dtype}", "against eager\n(lower is better)", _costs(costs, metric, name)))
    return [panel for panel in charts if panel.groups]


def _chart(one: Comparison) -> tuple[str, str, str, str, bool]:
    first = one.first
    return first.level, first.mode, first.dtype, one.image if first.level == "model" else "", one.graphed


def _but_dtype(one: Comparison) -> tuple[object, ...]:
    first = one.first
    return first.level, first.name, first.mode, first.shape, first.conditions, one.graphed


def _speeds(chosen: Iterable[Comparison], wide: dict[tuple[object, ...], Comparison] | None) -> dict[str, Groups]:
    """Against eager of the same case, or of its counterpart in `wide`; by the label that says so."""
    found: dict[str, Groups] = {}
    for one in chosen:
        other = one if wide is None else wide.get(_but_dtype(one))
        if other is None or other.base is None:
            continue
        base = other.times[other.base].p50
        label = f"speed against {labels.label(other.base)}" + (" in float32" if wide else "")
        found.setdefault(f"{label}\n(higher is better)", {})[_name_and_batch(one)] = {
            provider: Quantiles(*(base / value for value in row.quantiles)) for provider, row in one.times.items()
        }
    return found


def _costs(chosen: Iterable[Comparison], metric: str, name: Callable[[Comparison], str]) -> Groups:
    groups: Groups = {}
    for one in chosen:
        found = {provider: rows[metric] for provider, rows in one.rows.items() if metric in rows}
        base = next((found[provider] for provider in BASELINES if provider in found), None)
        if base and base.p50 and len(found) > 1:
            groups[name(one)] = {
                provider: Quantiles(*(value / base.p50 for value in row.quantiles)) for provider, row in found.items()
            }
    return groups


def _name_and_batch(one: Comparison) -> str:
    return f"{one.first.name}\nbatch {one.batch}"


def _name_and_mode(one: Comparison) -> str:
    return f"{one.first.name}\n{one.first.mode}"


def _bars(axis: Any, panel: Panel, looks: dict[str, style.Style]) -> None:
    width = WIDTH / len(panel.providers)
    for index, provider in enumerate(panel.providers):
        places = [place for place, group in enumerate(panel.groups.values()) if provider in group]
        ratios = [group[provider] for group in panel.groups.values() if provider in group]
        look, offset = looks[provider], (index + 0.5) * width - WIDTH / 2
        bars = axis.bar(
            [place + offset for place in places], [ratio.p50 for ratio in ratios], width * 0.92, yerr=_spreads(ratios),
            label=labels.label(provider), color=look.color, hatch=look.hatch, edgecolor="white", linewidth=0,
            error_kw={"elinewidth": style.FINE, "ecolor": style.DARK},
        )  # fmt: skip
        size = 7 if panel.bars <= CROWDED_BARS else 5.5
        axis.bar_label(bars, [f"{ratio.p50:.2f}" for ratio in ratios], fontsize=size, padding=2)
    axis.axhline(1, color=style.DARK, linewidth=style.FINE)
    axis.set_xticks(range(len(panel.groups)), list(panel.groups), fontsize=8)
    axis.set_ylabel(panel.label)
    axis.margins(y=0.15)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _dots(axis: Any, panel: Panel, looks: dict[str, style.Style]) -> None:
    places = {name: place for place, name in enumerate(panel.groups)}
    for provider in panel.providers:
        shown = [(places[name], group[provider]) for name, group in panel.groups.items() if provider in group]
        look = looks[provider]
        axis.errorbar(
            [ratio.p50 for _, ratio in shown], [place for place, _ in shown],
            xerr=_spreads([ratio for _, ratio in shown]), label=labels.label(provider), color=look.color,
            marker=look.marker, markersize=5, markeredgecolor=style.DARK, markeredgewidth=0.4, linestyle="none",
            elinewidth=style.FINE,
        )  # fmt: skip
    axis.axvline(1, color=style.DARK, linewidth=style.FINE)
    axis.set_xscale("log", base=2)
    values = [ratio.p50 for group in panel.groups.values() for ratio in group.values()]
    low, high = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    ticks = [2.0**power for power in (range(low, high + 1) if low < high else (low - 1, low, low + 1))]
    axis.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axis.set_yticks(list(places.values()), [name.replace("\n", ", ") for name in places], fontsize=7)
    axis.set_ylim(len(places) - 0.4, -0.6)  # the first case on top
    axis.set_xlabel(panel.label.replace("\n", " "), fontsize=9)
    style.plain_axes(axis)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _spreads(ratios: Sequence[Quantiles]) -> list[list[float]]:
    """Lengths of the lines left and right of each median; a speed's quantiles are those of its time, turned around."""
    return [
        [ratio.p50 - min(ratio) for ratio in ratios],
        [max(ratio) - ratio.p50 for ratio in ratios],
    ]
