"""Bar charts of speed ratios, from the CSV files that the benchmarks wrote.

Each CSV becomes a PNG beside it: models-inference.csv becomes models-inference.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import options, records
from benchmarks.measure import Quantiles
from benchmarks.providers import BASELINE, BASELINE_CHANNELS_LAST
from benchmarks.records import Record

COLORS = {
    "eager_nchw": "#9aa0a6",
    "eager_channels_last": "#5b8db8",
    "inductor": "#7f6bb3",
    "inductor_nchw": "#b3a6d9",
    "onnxruntime": "#4f9d7a",
    "openvino": "#2c6e63",
    "resfuse": "#d9622b",
    "resfuse_nchw": "#eba883",
}
WIDTH = 0.8
"""Of a group of bars, where groups are 1 apart."""
Groups = dict[str, dict[str, Quantiles]]
"""Ratios, by group and by provider."""


class Panel(NamedTuple):
    """One chart of a figure."""

    title: str
    label: str
    groups: Groups


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=options.summary(__doc__))
    parser.add_argument("csv", nargs="+", type=Path, help="files that the benchmarks wrote")
    args = parser.parse_args(argv)
    for path in args.csv:
        rows = records.read(path)
        charts = panels(rows)
        if charts:
            _draw(path.with_suffix(".png"), charts, rows)
            print(f"Wrote {path.with_suffix('.png')}")
        else:
            print(f"{path} has nothing to draw: no baseline to compare with")
    return 0


def panels(rows: Sequence[Record]) -> list[Panel]:
    """The charts that rows have the values for."""
    found = []
    speeds = [row for row in rows if row.level == "model" and row.metric == "time"]
    for mode, dtype, image in dict.fromkeys((row.mode, row.dtype, _image(row)) for row in speeds):
        chosen = [row for row in speeds if (row.mode, row.dtype, _image(row)) == (mode, dtype, image)]
        for base_dtype in dict.fromkeys((dtype, "float32")):
            bases = [row for row in speeds if (row.provider, row.dtype) == (BASELINE, base_dtype)]
            groups = _ratios(chosen, bases, _name_and_batch, inverse=True)
            label = f"speed against eager NCHW\nin {base_dtype} (higher is better)"
            found.append(Panel(f"{mode}, {dtype}, images {image}", label, groups))
    names = {"host_time": ("host time per call", _name_and_mode), "saved_bytes": ("saved bytes", _name_and_batch)}
    for metric, (title, name) in names.items():
        costs = [row for row in rows if row.metric == metric]
        for dtype in dict.fromkeys(row.dtype for row in costs):
            chosen = [row for row in costs if row.dtype == dtype]
            bases = [row for row in chosen if row.provider == BASELINE_CHANNELS_LAST]
            groups = _ratios(chosen, bases, name)
            found.append(Panel(f"{title}, {dtype}", "against eager channels_last\n(lower is better)", groups))
    return [panel for panel in found if panel.groups]


def _ratios(
    rows: Sequence[Record], bases: Sequence[Record], label: Callable[[Record], str], inverse: bool = False
) -> Groups:
    """Each row relative to the base's median in the same comparison."""
    medians = {_comparison(base): base.p50 for base in bases}
    groups: Groups = {}
    for row in rows:
        base = medians.get(_comparison(row))
        if base and row.provider in COLORS:
            ratios = Quantiles(*((base / value if inverse else value / base) for value in row.quantiles))
            groups.setdefault(label(row), {})[row.provider] = ratios
    return groups


def _comparison(row: Record) -> tuple[str, ...]:
    """What two rows must have in common for their ratio to mean something: all but dtype and provider, and the run."""
    return row.level, row.name, row.mode, row.shape, *(str(part) for part in dataclasses.astuple(row.conditions))


def _draw(path: Path, panels: Sequence[Panel], rows: Sequence[Record]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    widest = max(sum(len(providers) for providers in groups.values()) for _, _, groups in panels)
    size = max(8.0, 0.45 * widest), 4.2 * len(panels)
    figure, axes = pyplot.subplots(len(panels), 1, figsize=size, squeeze=False, layout="constrained")
    for axis, (title, label, groups) in zip(axes[:, 0], panels, strict=True):
        _bars(axis, groups)
        axis.set_title(title, loc="left", fontsize=11, pad=20)
        axis.set_ylabel(label)
    figure.supxlabel(_caption(rows, int(size[0] * 14)), fontsize=8, color="#555555", x=0.01, ha="left")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _bars(axis: Any, groups: Groups) -> None:
    shown = [name for name in COLORS if any(name in providers for providers in groups.values())]
    width = WIDTH / len(shown)
    for index, provider in enumerate(shown):
        places = [place for place, providers in enumerate(groups.values()) if provider in providers]
        ratios = [providers[provider] for providers in groups.values() if provider in providers]
        middles = [ratio.p50 for ratio in ratios]
        errors = [[abs(r.p50 - min(r)) for r in ratios], [abs(max(r) - r.p50) for r in ratios]]
        offset = (index + 0.5) * width - WIDTH / 2
        bars = axis.bar(
            [place + offset for place in places], middles, width * 0.92, yerr=errors, label=provider,
            color=COLORS[provider], error_kw={"elinewidth": 0.8, "ecolor": "#333333"},
        )  # fmt: skip
        axis.bar_label(bars, [f"{middle:.2f}" for middle in middles], fontsize=7, padding=2)
    axis.axhline(1, color="#333333", linewidth=0.8)
    long = len(groups) * max(map(len, groups)) > 120
    axis.set_xticks(range(len(groups)), list(groups), rotation=30 if long else 0, ha="right" if long else "center")
    axis.margins(y=0.15)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, ncols=len(shown), loc="lower left", bbox_to_anchor=(-0.01, 0.98))


def _caption(rows: Sequence[Record], width: int) -> str:
    """Under which conditions the figures were measured."""
    parts = []
    for conditions in dict.fromkeys(row.conditions for row in rows):
        parts.append(
            f"{conditions.device}, {conditions.threads} thread{'s' if conditions.threads > 1 else ''}; "
            f"{conditions.versions}; commit {conditions.commit}, {conditions.date}"
        )
    parts.append("Medians; lines from p20 to p80")
    return "\n".join(textwrap.wrap(". ".join(parts) + ".", width))


def _image(row: Record) -> str:
    return row.shape.partition("x")[2]


def _name_and_batch(row: Record) -> str:
    return f"{row.name}\nbatch {row.shape.partition('x')[0]}"


def _name_and_mode(row: Record) -> str:
    return f"{row.name}, {row.mode}"


if __name__ == "__main__":
    raise SystemExit(main())
