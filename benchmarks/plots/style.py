"""What all plots have in common: a provider's colour and marker, the conditions below, and small files."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.labels import conditions_text
from benchmarks.records import Record

DPI = 110
FINE = 0.8
"""Width of thin lines, in points."""
DARK, GREY = "#333333", "#555555"
PALETTE_SIZE = 96
"""Colours of a PNG, blends at edges included."""


class Style(NamedTuple):
    """How a provider looks in every plot."""

    color: str
    marker: str
    hatch: str


# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), told apart with any colour vision; the forms of one system
# share hue and marker, and differ by lightness and hatch.
KNOWN = {
    "eager_nchw": Style("#c9c9c9", "o", ""),
    "eager_channels_last": Style("#7d7d7d", "o", ""),
    "inductor": Style("#0072b2", "s", ""),
    "inductor_reduce_overhead": Style("#56b4e9", "s", ""),
    "inductor_max_autotune": Style("#004b75", "s", "//"),
    "inductor_freezing": Style("#9fd3f2", "s", ".."),
    "onnxruntime": Style("#009e73", "^", ""),
    "openvino": Style("#f0e442", "v", ""),
    "tensorrt": Style("#000000", "X", ""),
    "resfuse": Style("#d55e00", "D", ""),
    "resfuse_cuda": Style("#e69f00", "D", "//"),
    "resfuse_triton": Style("#f3c06b", "D", ".."),
}
FAMILIES = {
    "eager": ("o", ("#a3a3a3", "#5f5f5f")),
    "inductor": ("s", ("#3d94c4", "#bfe3f7", "#2b5f80")),
    "cudnn": ("P", ("#cc79a7", "#8f4a70", "#e3b3cd")),
    "onnxruntime": ("^", ("#6cc5ab", "#00664b")),
    "openvino": ("v", ("#b3a82a",)),
    "tensorrt": ("X", ("#444444",)),
    "resfuse": ("D", ("#8a3d00", "#b0713d", "#f7dba8", "#5c2900")),
}
"""Marker and colours of those that are not in KNOWN, by the beginning of their name."""
HATCHES = ("", "xx", "\\\\", "++")
OTHER = ("*", ("#7a5195", "#b48ccb"))


def styles(providers: Iterable[str]) -> dict[str, Style]:
    """A style for each, whatever the order; a provider in KNOWN looks the same in every plot."""
    found: dict[str, Style] = {}
    taken: dict[str, int] = {}
    for provider in sorted(set(providers)):
        if provider in KNOWN:
            found[provider] = KNOWN[provider]
            continue
        family = next((name for name in FAMILIES if provider == name or provider.startswith(f"{name}_")), "")
        marker, colors = FAMILIES.get(family, OTHER)
        index = taken[family] = taken.get(family, -1) + 1
        found[provider] = Style(colors[index % len(colors)], marker, HATCHES[index % len(HATCHES)])
    return found


def subplots(
    rows: int, columns: int, size: tuple[float, float], heights: Sequence[float] | None = None
) -> tuple[Any, Any]:
    """A figure of `size` inches, and its axes as an array of two dimensions; nothing is shown on a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", height_ratios=heights)


def finish(figure: Any, path: Path, rows: Sequence[Record], note: str) -> None:
    """Write conditions and a note below a figure, save it as a PNG of few colours, and close it."""
    from matplotlib import pyplot
    from PIL import Image  # a dependency of matplotlib

    width = int(figure.get_size_inches()[0] * 14)
    figure.supxlabel(caption(rows, note, width), fontsize=8, color=GREY, x=0.01, ha="left")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    pyplot.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(drawn).convert("RGB").quantize(PALETTE_SIZE, dither=Image.Dither.NONE).save(path, optimize=True)


def caption(rows: Sequence[Record], note: str, width: int) -> str:
    """Under which conditions the figures were measured, in lines of at most `width` characters."""
    return "\n".join(textwrap.wrap(f"{conditions_text(rows)}. {note}", width))


def plain_axes(axis: Any) -> None:
    """No frame, and a faint grid behind."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#e6e6e6", linewidth=FINE)
    axis.set_axisbelow(True)
