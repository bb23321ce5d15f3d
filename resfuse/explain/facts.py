"""What there is to know of a model: one entry per operator call, and the totals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from resfuse.costs import Cost, Device, TensorInfo

MEMORY, COMPUTE = "memory", "compute"
PYTORCH = "pytorch"


@dataclasses.dataclass(frozen=True)
class Layer:
    """One operator call of the fused model: what it costs at least and, where that was asked for, how long it took."""

    path: str
    """Of the module it belongs to, as in `model.named_modules()`: "layer1.0.conv2"."""
    op: str
    """ "conv_bn_act", "bn_act", "add_relu", or ATen's name: "max_pool2d", "linear"."""
    detail: str
    """Kernel, stride, groups and residual: "3x3/2", "3x3 g32", "1x1 +res"."""
    shape: tuple[int, ...]
    """Of its input."""
    output_shape: tuple[int, ...]
    dtype: torch.dtype
    """Of its input."""
    backend: str
    """Of resfuse; "pytorch" for an operator that is not resfuse's."""
    backward_backend: str | None
    """What computes the gradients; None where they are not explained."""
    reason: str
    """Why that backend runs it, or why it is not fused."""
    launches: int
    flops: int
    bytes: int
    """Read plus written.  These three are of forward and, where it is explained, backward."""
    seconds: float
    """Roofline time: the sum over its kernels of the time that each needs at least.  Launches are not in it."""
    bound: str
    """What limits most of that time: "memory" or "compute"."""
    forward: Cost
    backward: Cost | None
    """None where backward is not explained."""
    estimated: bool = False
    """`resfuse.costs` does not know the operator: it has no FLOPs, and reads its inputs and writes its output once."""
    measured: float | None = None
    """Seconds of this operator alone on random tensors; None if it was not measured."""

    @property
    def lost(self) -> float | None:
        """Seconds above the roofline; None if it was not measured."""
        return None if self.measured is None else self.measured - self.seconds

    @property
    def gap(self) -> float | None:
        """Measured time / roofline time; None if it was not measured."""
        return None if self.measured is None or self.seconds == 0 else self.measured / self.seconds


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over the operator calls of a model."""

    launches: int
    flops: int
    bytes: int
    seconds: float
    """Of the roofline times."""
    measured: float | None = None
    """Of the measured times; None if they were not measured."""

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
            sum(times) if len(times) == len(layers) else None,
        )

    @property
    def lost(self) -> float | None:
        """Seconds above the roofline; None if it was not measured."""
        return None if self.measured is None else self.measured - self.seconds


@dataclasses.dataclass(frozen=True)
class Facts:
    """Of a model on a machine."""

    layers: tuple[Layer, ...]
    """The operator calls of the fused model that move data, in the order in which they run."""
    total: Totals
    """Of `layers`."""
    unfused: Totals
    """Of the same model when PyTorch's operators run one by one."""
    device: Device
    model: str
    """Its class."""
    inputs: tuple[TensorInfo, ...]
    training: bool
    """Whether the model was in training mode."""
    backward: bool
    """Whether backward is in the figures."""

    @property
    def slowest(self) -> tuple[Layer, ...]:
        """The layers by the time that they lose or, not measured, by their roofline time; the largest first."""
        return tuple(
            sorted(self.layers, key=lambda layer: layer.seconds if layer.lost is None else layer.lost, reverse=True)
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; dtypes by name, "bfloat16"."""
        device = {field.name: getattr(self.device, field.name) for field in dataclasses.fields(self.device)}
        device["rates"] = {_name(dtype): rate for dtype, rate in self.device.rates.items()}
        device["capability"] = list(self.device.capability) if self.device.capability else None
        return {
            "model": self.model,
            "inputs": [{"shape": list(info.shape), "dtype": _name(info.dtype)} for info in self.inputs],
            "training": self.training,
            "backward": self.backward,
            "device": device,
            "total": dataclasses.asdict(self.total),
            "unfused": dataclasses.asdict(self.unfused),
            "layers": [_layer_to_dict(layer) for layer in self.layers],
        }


def _layer_to_dict(layer: Layer) -> dict[str, Any]:
    values = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
    values["dtype"] = _name(layer.dtype)
    for shape in ("shape", "output_shape"):
        values[shape] = list(values[shape])
    for cost in ("forward", "backward"):
        values[cost] = None if values[cost] is None else values[cost]._asdict()
    return values


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
