"""The report of `fuse_`: modules that were fused, modules left alone, and the reasons."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.console import RenderableType


class FusedModule(NamedTuple):
    """A module that runs fused."""

    name: str
    """As in `model.named_modules()`; the model itself is ""."""
    kind: str
    """Its class, such as "Bottleneck"."""
    ops: tuple[str, ...]
    """Its fused calls, such as "conv3 + bn3 + add + relu", by the names of its children."""


class LeftModule(NamedTuple):
    """A batch norm that is in no fused call, or an activation that is called behind one."""

    name: str
    """As in `model.named_modules()`; the model itself is ""."""
    reason: str


@dataclass
class FuseReport:
    """The result of `fuse_`.  `str(report)` is a table; `rich.print(report)` a coloured one."""

    fused: list[FusedModule] = field(default_factory=list)
    left: list[LeftModule] = field(default_factory=list)
    convolutions: int = 0
    """Fused calls that begin with a convolution."""
    additions: int = 0
    """Fused calls with a residual."""
    all_additions: int = 0
    """The same, and sums of two tensors that are not part of one."""
    norms: int = 0
    """Batch norms of the model."""
    left_norms: int = 0
    """Batch norms that are in no fused call."""

    @property
    def fused_ops(self) -> int:
        """Number of fused calls in one forward pass of the fused modules."""
        return sum(len(module.ops) for module in self.fused)

    def kinds(self) -> Counter[tuple[str, tuple[str, ...]]]:
        """Number of fused modules per kind and calls, in the order of the model."""
        return Counter((module.kind, module.ops) for module in self.fused)

    def reasons(self) -> Counter[str]:
        """Number of modules left alone per reason, in the order of the model."""
        return Counter(module.reason for module in self.left)

    def __str__(self) -> str:
        lines = [self._headline()]
        kinds = [(str(count), kind, "; ".join(ops)) for (kind, ops), count in self.kinds().items()]
        width = max((len(kind) for _, kind, _ in kinds), default=0)
        lines += [f"  {count:>4}  {kind:<{width}}  {ops}" for count, kind, ops in kinds]
        if self.left:
            lines.append(f"left {_count(len(self.left), 'module')} alone")
            lines += [f"  {count:>4}  {reason}: {self._names(reason)}" for reason, count in self.reasons().items()]
        return "\n".join(line.rstrip() for line in lines)

    def __rich__(self) -> RenderableType:
        """The same table for `rich.print`."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=self._headline(), title_justify="left", box=box.SIMPLE)
        table.add_column("modules", justify="right")
        table.add_column("kind, or reason")
        table.add_column("fused calls, or names")
        for (kind, ops), count in self.kinds().items():
            table.add_row(str(count), f"[green]{escape(kind)}[/]", escape("\n".join(ops)))
        for reason, count in self.reasons().items():
            table.add_row(str(count), f"[yellow]left: {escape(reason)}[/]", escape(self._names(reason)))
        return table

    def _headline(self) -> str:
        if not self.fused:
            return "fused no module"
        calls = _count(self.fused_ops, "call")
        pairs = f"{self.convolutions} of {self.convolutions + self.left_norms} conv + bn"
        return f"fused {pairs}, {self.additions} of {self.all_additions} residual adds: {calls}"

    def _names(self, reason: str, shown: int = 3) -> str:
        names = [module.name or "(model)" for module in self.left if module.reason == reason]
        return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
