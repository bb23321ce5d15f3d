"""What `explain` found: one entry per operator call, and the totals."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from resfuse.costs import Cost, Device

MEMORY, COMPUTE = "memory", "compute"


@dataclasses.dataclass(frozen=True)
class Layer:
    """One operator call of the fused model, with what it costs at least and, if asked for, how long it took."""

    path: str
    """Of the module it belongs to, as in `model.named_modules()`: "layer1.0.conv2"."""
    op: str
    """ "conv_bn_act", "bn_act", "add_relu", or ATen's name: "max_pool2d", "linear"."""
    shape: tuple[int, ...]
    """Of its input."""
    output_shape: tuple[int, ...]
    dtype: torch.dtype
    """Of its input."""
    backend: str
    """Of resfuse; "pytorch" for an operator that is not resfuse's."""
    reason: str
    """Why that backend runs it."""
    launches: int
    flops: int
    bytes: int
    """Read plus written; these three are of forward and, where it is explained, backward."""
    seconds: float
    """Roofline time: no machine with these ceilings is faster.  Launches are not in it."""
    bound: str
    """What limits it: "memory" or "compute"."""
    forward: Cost
    backward: Cost | None
    """None where backward is not explained."""
    measured: float | None = None
    """Seconds of this operator alone on random tensors; None if it was not measured."""

    @property
    def lost(self) -> float | None:
        """Seconds above the roofline; None if it was not measured."""
        return None if self.measured is None else self.measured - self.seconds

    @property
    def gap(self) -> float | None:
        """Measured time / roofline time; None if either is missing or zero."""
        return None if self.measured is None or self.seconds == 0 else self.measured / self.seconds


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over the operator calls of a model."""

    launches: int
    flops: int
    bytes: int
    seconds: float
    """Sum of the roofline times."""
    measured: float | None = None
    """Sum of the measured times; None if it was not measured."""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The result of `resfuse.explain`.  `print` shows a table, `rich.print` a coloured one."""

    layers: tuple[Layer, ...]
    """The operator calls of the fused model, in the order in which they run."""
    total: Totals
    """Of `layers`."""
    unfused: Totals
    """Of the same model after `unfuse_`: PyTorch's operators, one by one."""
    device: Device
    training: bool
    """Whether the model was in training mode."""
    backward: bool
    """Whether the figures have the backward pass in them."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        raise NotImplementedError
