"""An explanation as a table: equal layers together, the worst first."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from resfuse.explain.facts import MEMORY, Facts, Layer, Totals
from resfuse.explain.wording import headline, number, reasons, summary

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

SHOWN = 20
WIDTH, NARROWEST = 100, 70
_WIDEST_PATH = 24
_INDENT = 9 * " "
_LEFT = ("layer", "operation", "CxHxW", "backend")  # aligned to the left
_DISPENSABLE = ("GFLOP", "MB", "backend", "n", "by", "CxHxW", "ratio")  # in this order, where there is no room


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


def ordered(explanation: Facts) -> list[Group]:
    """Groups of equal layers, those first that lose most or, not measured, need most."""
    return sorted(groups_of(explanation.layers), key=lambda group: group.weight, reverse=True)


def text(explanation: Facts, *, every_layer: bool = False, shown: int = SHOWN, width: int = WIDTH) -> str:
    """The whole explanation as plain text.

    Args:
        explanation: what `resfuse.explain` returned.
        every_layer: each layer, in the order in which they run, instead of groups.
        shown: at most so many groups.
        width: columns of the text; where they are few, the table has fewer.
    """
    columns, left_out = _columns(explanation, every_layer, shown)
    columns, gap = _fitted(columns, width)
    lines = []
    for row in zip(*(column.cells for column in columns), strict=True):
        cells = (column.aligned(cell) for column, cell in zip(columns, row, strict=True))
        lines.append((" " * gap).join(cells))
    lines.insert(1, (" " * gap).join("-" * column.width for column in columns))
    below = [*left_out, "", *summary(explanation), "", *reasons(explanation)]
    lines = [*_wrapped([headline(explanation), ""], width), *lines, *_wrapped(below, width)]
    return "\n".join(line.rstrip() for line in lines)


def _wrapped(lines: list[str], width: int) -> list[str]:
    parts = (textwrap.wrap(line, width, subsequent_indent=_INDENT, break_on_hyphens=False) for line in lines)
    return [part for wrapped in parts for part in wrapped or [""]]


class Rich:
    """The same for a terminal of any width."""

    def __init__(self, explanation: Facts, every_layer: bool = False, shown: int = SHOWN) -> None:
        """Arguments as for `text`."""
        self._explanation, self._every_layer, self._shown = explanation, every_layer, shown

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich import box
        from rich.markup import escape
        from rich.padding import Padding
        from rich.table import Table

        columns, left_out = _columns(self._explanation, self._every_layer, self._shown)
        columns, gap = _fitted(columns, options.max_width)
        # The box has a space between columns.
        table = Table(box=box.SIMPLE_HEAD, padding=(0, gap - 1, 0, 0), pad_edge=False, show_edge=False)
        for column in columns:
            table.add_column(column.cells[0], justify="left" if column.left else "right", no_wrap=True)
        for path, *row in list(zip(*(column.cells for column in columns), strict=True))[1:]:
            table.add_row(f"[cyan]{escape(path)}[/]", *(escape(cell) for cell in row))
        yield f"[bold]{escape(headline(self._explanation))}[/]\n"
        yield table
        for line in (*left_out, "", *summary(self._explanation), "", *reasons(self._explanation)):
            yield Padding(escape(line), 0)


@dataclasses.dataclass(frozen=True)
class _Column:
    """A column of the table; the first cell is its header."""

    cells: tuple[str, ...]

    @property
    def left(self) -> bool:
        return self.cells[0] in _LEFT

    @property
    def width(self) -> int:
        return max(map(len, self.cells))

    def aligned(self, cell: str) -> str:
        return f"{cell:<{self.width}}" if self.left else f"{cell:>{self.width}}"


def _fitted(columns: list[_Column], width: int) -> tuple[list[_Column], int]:
    """The columns that there is room for, and the spaces between them."""
    for dropped in range(len(_DISPENSABLE) + 1):
        kept = [column for column in columns if column.cells[0] not in _DISPENSABLE[:dropped]]
        for gap in (2, 1):
            if sum(column.width + gap for column in kept) - gap <= width:
                return kept, gap
    return kept, 1


def _columns(explanation: Facts, every_layer: bool, shown: int) -> tuple[list[_Column], list[str]]:
    """All columns, and a line on the rows that are left out."""
    measured = explanation.total.measured is not None
    groups = [Group((layer,)) for layer in explanation.layers] if every_layer else ordered(explanation)
    seconds = max((group.total.measured or group.total.seconds for group in groups), default=0.0)
    unit, factor = ("ms", 1e3) if seconds >= 5e-3 else ("us", 1e6)
    header = ["layer", "operation", "CxHxW", "backend", "n", "GFLOP", "MB", f"min {unit}", "by"]
    header += [unit, "lost", "ratio"] if measured else []
    kept = groups if every_layer else groups[:shown]
    rows = [header, *(_row(group, factor, measured) for group in kept)]
    left_out = []
    if len(kept) < len(groups):
        rest = Totals.of(layer for group in groups[len(kept) :] for layer in group.layers)
        time = rest.seconds if rest.measured is None else rest.measured
        count = len(groups) - len(kept)
        rows_left = f"{count} more row{'' if count == 1 else 's'}"
        left_out = [f"... and {rows_left}, together {number(factor * time)} {unit}"]
    return [_Column(cells) for cells in zip(*rows, strict=True)], left_out


def _row(group: Group, factor: float, measured: bool) -> list[str]:
    layer, total = group.layers[0], group.total
    count = f" x{len(group.layers)}" if len(group.layers) > 1 else ""
    cells = [
        _shortened(layer.path or "(model)", _WIDEST_PATH - len(count)) + count,
        f"{layer.op} {layer.detail}".rstrip(),
        "x".join(map(str, layer.shape[1:])) or "-",
        layer.backend,
        str(total.launches),
        number(total.flops / 1e9),
        number(total.bytes / 1e6),
        number(factor * total.seconds),
        "mem" if layer.bound == MEMORY else "math",
    ]
    if measured and total.measured is not None and total.lost is not None:
        ratio = number(total.measured / total.seconds) if total.seconds else "-"
        cells += [number(factor * total.measured), number(factor * total.lost), ratio]
    return cells


def _shortened(path: str, width: int) -> str:
    """The path with its middle left out where it is too long."""
    if len(path) <= width:
        return path
    tail = (width - 1) * 2 // 3
    return f"{path[: width - 2 - tail]}..{path[-tail:]}"
