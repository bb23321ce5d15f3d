"""An explanation as a table: grouped, the worst first, 100 columns wide."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from resfuse.explain.explanation import MEMORY, Explanation, Layer, Totals

if TYPE_CHECKING:
    from rich.console import RenderableType

SHOWN = 20
_WIDEST_PATH = 24


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers that are the same but for their place."""

    layers: tuple[Layer, ...]

    @property
    def total(self) -> Totals:
        return Totals.of(self.layers)

    @property
    def weight(self) -> float:
        """Seconds by which groups are ordered: lost or, not measured, of the roofline."""
        total = self.total
        return total.seconds if total.lost is None else total.lost


def groups_of(layers: Iterable[Layer]) -> list[Group]:
    """Equal layers together, in the order of their first."""
    found: dict[Any, list[Layer]] = {}
    for layer in layers:
        key = dataclasses.replace(layer, path="", measured=None)
        found.setdefault((key, layer.measured), []).append(layer)
    return [Group(tuple(group)) for group in found.values()]


def ordered(explanation: Explanation) -> list[Group]:
    """Groups of equal layers, those first that lose most or, not measured, need most."""
    return sorted(groups_of(explanation.layers), key=lambda group: group.weight, reverse=True)


def text(explanation: Explanation, every_layer: bool = False, shown: int = SHOWN) -> str:
    """The whole explanation as plain text of at most 100 columns.

    Args:
        explanation: what `resfuse.explain` returned.
        every_layer: each layer, in the order in which they run, instead of groups.
        shown: at most so many groups.
    """
    header, rows, left_out = _rows(explanation, every_layer, shown)
    widths = [max(len(row[index]) for row in (header, *rows)) for index in range(len(header))]
    lines = [headline(explanation), ""]
    for row in (header, *rows):
        cells = zip(row, widths, range(len(row)), strict=True)
        lines.append(
            "  ".join(f"{cell:<{width}}" if index < _LEFT else f"{cell:>{width}}" for cell, width, index in cells)
        )
    lines.insert(3, "  ".join("-" * width for width in widths))
    return "\n".join(
        line.rstrip() for line in (*lines, *left_out, "", *summary(explanation), "", *reasons(explanation))
    )


def rich(explanation: Explanation, every_layer: bool = False, shown: int = SHOWN) -> RenderableType:
    """The same for a terminal; arguments as for `text`."""
    from rich import box
    from rich.console import Group as Together
    from rich.markup import escape
    from rich.table import Table

    header, rows, left_out = _rows(explanation, every_layer, shown)
    table = Table(title=escape(headline(explanation)), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index < _LEFT else "right", no_wrap=True)
    for row in rows:
        table.add_row(f"[cyan]{escape(row[0])}[/]", *(escape(cell) for cell in row[1:]))
    lines = [*left_out, *summary(explanation), "", *reasons(explanation)]
    return Together(table, *(escape(line) for line in lines))


_LEFT = 4  # columns that are aligned to the left


def _rows(explanation: Explanation, every_layer: bool, shown: int) -> tuple[list[str], list[list[str]], list[str]]:
    """Header, rows, and a line on what is left out."""
    measured = explanation.total.measured is not None
    groups = [Group((layer,)) for layer in explanation.layers] if every_layer else ordered(explanation)
    seconds = max((group.total.measured or group.total.seconds for group in groups), default=0.0)
    unit, factor = ("ms", 1e3) if seconds >= 5e-3 else ("us", 1e6)
    header = ["layer", "operation", "input", "backend", "n", "GFLOP", "MB", f"min {unit}", "by"]
    header += [unit, "lost", "ratio"] if measured else []
    kept = groups if every_layer else groups[:shown]
    rows = [_row(group, factor, measured) for group in kept]
    left_out = []
    if len(kept) < len(groups):
        rest = Totals.of(layer for group in groups[len(kept) :] for layer in group.layers)
        time = rest.seconds if rest.measured is None else rest.measured
        left_out = [f"... and {len(groups) - len(kept)} more rows, together {_number(factor * time)} {unit}"]
    return header, rows, left_out


def _row(group: Group, factor: float, measured: bool) -> list[str]:
    layer, total = group.layers[0], group.total
    count = f" x{len(group.layers)}" if len(group.layers) > 1 else ""
    cells = [
        _shortened(layer.path or "(model)", _WIDEST_PATH - len(count)) + count,
        f"{layer.op} {layer.detail}".rstrip(),
        "x".join(map(str, layer.shape)) or "()",
        layer.backend,
        str(total.launches),
        _number(total.flops / 1e9),
        _number(total.bytes / 1e6),
        _number(factor * total.seconds),
        "mem" if layer.bound == MEMORY else "math",
    ]
    if measured and total.measured is not None and total.lost is not None:
        ratio = _number(total.measured / total.seconds) if total.seconds else "-"
        cells += [_number(factor * total.measured), _number(factor * total.lost), ratio]
    return cells


def headline(explanation: Explanation) -> str:
    """Model, mode, inputs and device."""
    inputs = ", ".join(
        f"{'x'.join(map(str, info.shape))} {str(info.dtype).removeprefix('torch.')}" for info in explanation.inputs
    )
    mode = "train()" if explanation.training else "eval()"
    passes = "forward and backward" if explanation.backward else "forward"
    return f"{explanation.model}, {mode}, {passes}, {inputs}, on {explanation.device.name}"


def summary(explanation: Explanation) -> list[str]:
    """Totals, what fusing saves, and what is lost."""
    total, unfused, device = explanation.total, explanation.unfused, explanation.device
    lines = [_total_line("fused", total, device.launch), _total_line("unfused", unfused, device.launch)]
    lines.append(
        f"saved    {_saved(unfused.launches, total.launches)} of the launches, "
        f"{_saved(unfused.bytes, total.bytes)} of the bytes, {_saved(unfused.seconds, total.seconds)} of the least time"
        + (
            f", {_saved(unfused.measured, total.measured)} of the measured"
            if total.measured and unfused.measured
            else ""
        )
    )
    if total.lost is not None:
        lines.append(
            f"lost     {_time(total.lost)} above the least time, {_number(total.lost / total.seconds + 1)} x it"
        )
    lines.append(f"ceilings {_number(device.bandwidth / 1e9)} GB/s, {_rates(explanation)} ({device.source})")
    legend = "n: kernel launches; min: least time, by memory or arithmetic (math)"
    legend += "; lost: time above it" if total.measured is not None else ""
    return [*(part for line in lines for part in _wrapped(line)), legend]


def reasons(explanation: Explanation) -> list[str]:
    """Which backend runs what, and why."""
    counts: dict[tuple[str, str, str], int] = {}
    for layer in explanation.layers:
        key = (layer.backend, layer.op, layer.reason)
        counts[key] = counts.get(key, 0) + 1
    grouped: dict[tuple[str, str], list[str]] = {}
    for (backend, op, reason), count in counts.items():
        grouped.setdefault((backend, reason), []).append(f"{op} x{count}" if count > 1 else op)
    return [
        part
        for (backend, reason), ops in grouped.items()
        for part in _wrapped(f"{backend}: {', '.join(ops)}: {reason}")
    ]


def _total_line(name: str, total: Totals, launch: float) -> str:
    line = (
        f"{name:<8} {total.launches} launches, {_number(total.flops / 1e9)} GFLOP, {_number(total.bytes / 1e6)} MB, "
        f"at least {_time(total.seconds)}"
    )
    if launch:
        line += f" and {_time(total.launches * launch)} of launching"
    return line if total.measured is None else f"{line}, measured {_time(total.measured)}"


def _rates(explanation: Explanation) -> str:
    dtypes = dict.fromkeys(layer.dtype for layer in explanation.layers if layer.flops)
    rates = (f"{_number(explanation.device.rate(dtype) / 1e12)} TFLOP/s {str(dtype)[6:]}" for dtype in dtypes)
    return ", ".join(rates) or "no arithmetic"


def _saved(before: float, after: float) -> str:
    return f"{100 * (1 - after / before):.0f} %" if before else "0 %"


def _time(seconds: float) -> str:
    return f"{_number(seconds * 1e3)} ms" if abs(seconds) >= 1e-3 else f"{_number(seconds * 1e6)} us"


def _number(value: float) -> str:
    """Three digits, no exponent."""
    if abs(value) < 5e-4:
        return "0"
    places = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2 if abs(value) >= 0.9995 else 3
    return f"{value:.{places}f}"


def _shortened(path: str, width: int) -> str:
    """The path with its middle left out where it is too long."""
    if len(path) <= width:
        return path
    tail = (width - 1) * 2 // 3
    return f"{path[: width - 2 - tail]}..{path[-tail:]}"


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, 100, subsequent_indent="         ", break_on_hyphens=False)
