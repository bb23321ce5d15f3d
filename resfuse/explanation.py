"""The result of `resfuse.explain`: one entry per operator call of a model, the totals, and a table of them."""

from __future__ import annotations

import dataclasses
import textwrap
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

from resfuse.roofline import Device

PYTORCH = "pytorch"
WIDTH = 110
_DISPENSABLE = ("GFLOP", "MB", "backend", "n", "by", "CxHxW")  # in this order, where there is no room
_LEFT = ("layer", "operation", "CxHxW", "backend")  # columns aligned to the left


@dataclasses.dataclass(frozen=True)
class Layer:
    """One operator call of the fused model: its least cost and, where that was asked for, its time."""

    path: str
    """The module it belongs to, as in `model.named_modules()`: "layer1.0.conv2"."""
    op: str
    """ "conv_bn_act", "bn_act", "add_relu", or ATen's name: "max_pool2d", "addmm"."""
    detail: str
    """Kernel, stride, groups and residual: "3x3/2", "3x3 g32", "1x1 +res"."""
    shape: tuple[int, ...]
    """The shape of the input."""
    output_shape: tuple[int, ...]
    dtype: torch.dtype
    """The dtype of the input."""
    backend: str
    """The backend that runs the forward; "pytorch" for an operator that is not resfuse's."""
    backward_backend: str | None
    """The backend that computes most of the gradients, those of a convolution; None where there are none."""
    reason: str
    """Why that backend runs it, or why it is not fused."""
    launches: int
    flops: int
    bytes: int
    """Read plus written.  These three are of forward and, where it is explained, backward."""
    seconds: float
    """Roofline time: the sum over its kernels of the time that each needs at least.  Launches are not in it."""
    bound: str
    """The limit for most of that time: "memory" or "compute"."""
    measured: float | None = None
    """Seconds of its operators alone on random tensors; None if they were not measured."""

    @property
    def lost(self) -> float | None:
        """Seconds above the roofline; None if it was not measured."""
        return None if self.measured is None else self.measured - self.seconds


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over the operator calls of a model."""

    launches: int
    flops: int
    bytes: int
    seconds: float
    """The sum of the roofline times."""
    measured: float | None = None
    """The sum of the measured times; None if they were not measured."""

    @classmethod
    def of(cls, layers: Iterable[Layer]) -> Totals:
        """The sums over these."""
        layers = tuple(layers)
        times = [layer.measured for layer in layers if layer.measured is not None]
        return cls(
            sum(layer.launches for layer in layers),
            sum(layer.flops for layer in layers),
            sum(layer.bytes for layer in layers),
            sum(layer.seconds for layer in layers),
            sum(times) if times and len(times) == len(layers) else None,
        )


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The result of `resfuse.explain`.  `print` shows a table."""

    layers: tuple[Layer, ...]
    """The operator calls of the fused model that move data, in the order in which they run."""
    total: Totals
    """The sums over `layers`."""
    unfused: Totals
    """The same model in eager PyTorch, operator by operator, with weights in channels_last."""
    device: Device
    model: str
    """Its class."""
    inputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    """Shape and dtype of each."""
    training: bool
    """The model was in training mode."""
    backward: bool
    """Gradients are in the figures."""

    @property
    def slowest(self) -> tuple[Layer, ...]:
        """The layers by the time that they lose or, not measured, by their roofline time; the largest first."""
        return tuple(sorted(self.layers, key=_weight, reverse=True))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; dtypes by name, "bfloat16"."""
        inputs = [{"shape": shape, "dtype": dtype} for shape, dtype in self.inputs]
        plain: dict[str, Any] = _plain(dataclasses.asdict(self) | {"inputs": inputs})
        return plain

    def __str__(self) -> str:
        return self.table()

    def table(self, *, every_layer: bool = False, shown: int = 20, width: int = WIDTH) -> str:
        """Everything as text.

        Args:
            every_layer: each layer, in the order in which they run; otherwise equal layers together, those first that
                lose most or, not measured, need most.
            shown: at most so many groups of equal layers.
            width: columns of text; where they are few, the table leaves some of its own out.
        """
        groups = [[layer] for layer in self.layers] if every_layer else self._groups()
        kept = groups if every_layer else groups[:shown]
        slowest = max((layer.measured or layer.seconds for layer in self.layers), default=0.0)
        unit, factor = ("ms", 1e3) if slowest >= 5e-3 else ("us", 1e6)
        header = ["layer", "operation", "CxHxW", "backend", "n", "GFLOP", "MB", f"min {unit}", "by"]
        header += [unit, "lost"] if self.total.measured is not None else []
        rows = [header, *(_row(group, factor) for group in kept)]
        columns = list(zip(*rows, strict=True))
        for name in _DISPENSABLE:
            if sum(max(map(len, column)) + 2 for column in columns) - 2 > width:
                columns = [column for column in columns if column[0] != name]
        aligned = []
        for head, *cells in columns:
            size = max(map(len, (head, *cells)))
            side = "<" if head in _LEFT else ">"
            aligned.append([f"{cell:{side}{size}}" for cell in (head, "-" * size, *cells)])
        lines = [self._headline(), "", *("  ".join(row).rstrip() for row in zip(*aligned, strict=True))]
        if len(kept) < len(groups):
            rest = Totals.of(layer for group in groups[shown:] for layer in group)
            time = _number(factor * (rest.measured or rest.seconds))
            lines.append(f"... and {len(groups) - shown} more rows, together {time} {unit}")
        for line in ("", *self._summary(), "", *self._reasons()):
            lines += textwrap.wrap(line, width, subsequent_indent=9 * " ", break_on_hyphens=False) or [""]
        return "\n".join(lines)

    def _groups(self) -> list[list[Layer]]:
        """Layers that differ in nothing but their place, the largest group first."""
        found: dict[Layer, list[Layer]] = {}
        for layer in self.layers:
            found.setdefault(dataclasses.replace(layer, path=""), []).append(layer)
        return sorted(found.values(), key=lambda group: sum(map(_weight, group)), reverse=True)

    def _headline(self) -> str:
        inputs = ", ".join(f"{'x'.join(map(str, shape))} {_plain(dtype)}" for shape, dtype in self.inputs)
        passes = "forward and backward" if self.backward else "forward"
        return f"{self.model}, {'train' if self.training else 'eval'}(), {passes}, {inputs}, on {self.device.name}"

    def _summary(self) -> list[str]:
        fused, unfused = self.total, self.unfused
        saved = [
            f"{round(100 * (1 - after / before)) if before else 0} % of the {name}"
            for name, before, after in (
                ("launches", unfused.launches, fused.launches),
                ("bytes", unfused.bytes, fused.bytes),
                ("least time", unfused.seconds, fused.seconds),
                ("measured time", unfused.measured, fused.measured),
            )
            if before is not None and after is not None
        ]
        dtypes = dict.fromkeys(layer.dtype for layer in self.layers if layer.flops)
        rates = (f"{_number(self.device.rate(dtype) / 1e12)} TFLOP/s {_plain(dtype)}" for dtype in dtypes)
        ceilings = ", ".join((f"{_number(self.device.bandwidth / 1e9)} GB/s", *rates))
        return [
            self._total("fused", fused),
            self._total("unfused", unfused),
            f"saved    {', '.join(saved)}",
            f"ceilings {ceilings} ({self.device.source})",
            "n: kernel launches; min: least time, by memory or arithmetic (math); lost: measured time above it",
        ]

    def _total(self, name: str, total: Totals) -> str:
        line = f"{name:<8} {total.launches} launches, {_number(total.flops / 1e9)} GFLOP, "
        line += f"{_number(total.bytes / 1e6)} MB, at least {_number(1e3 * total.seconds)} ms"
        if self.device.launch:
            line += f" and {_number(1e3 * total.launches * self.device.launch)} ms of launching"
        return line if total.measured is None else f"{line}, measured {_number(1e3 * total.measured)} ms"

    def _reasons(self) -> list[str]:
        """A line for each backend and reason."""
        counts = Counter((layer.backend, layer.reason, layer.op) for layer in self.layers)
        grouped: dict[tuple[str, str], list[str]] = {}
        for (backend, reason, op), count in counts.items():
            grouped.setdefault((backend, reason), []).append(f"{op} x{count}" if count > 1 else op)
        return [f"{backend}: {', '.join(ops)}: {reason}" for (backend, reason), ops in grouped.items()]


def _row(group: list[Layer], factor: float) -> list[str]:
    layer, total = group[0], Totals.of(group)
    cells = [
        (layer.path or "(model)") + (f" x{len(group)}" if len(group) > 1 else ""),
        f"{layer.op} {layer.detail}".rstrip(),
        "x".join(map(str, layer.shape[1:])) or "-",
        layer.backend,
        str(total.launches),
        _number(total.flops / 1e9),
        _number(total.bytes / 1e6),
        _number(factor * total.seconds),
        "mem" if layer.bound == "memory" else "math",
    ]
    if total.measured is not None:
        cells += [_number(factor * total.measured), _number(factor * (total.measured - total.seconds))]
    return cells


def _weight(layer: Layer) -> float:
    return layer.seconds if layer.lost is None else layer.lost


def _plain(value: Any) -> Any:
    """JSON values for containers and dtypes."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _number(value: float) -> str:
    """Three digits, no exponent."""
    if abs(value) < 5e-4:
        return "0"
    places = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2 if abs(value) >= 0.9995 else 3
    return f"{value:.{places}f}"
