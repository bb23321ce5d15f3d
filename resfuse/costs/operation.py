"""One operator call of a model: shapes and options, no data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operator call of a traced model."""

    path: str
    """Of the module that it belongs to: "layer1.0.conv2"."""
    name: str
    """ "conv_bn_act", "bn_act", "add_relu", "sync_bn_act", or ATen's without in-place underscore: "conv2d", "relu"."""
    inputs: tuple[TensorInfo, ...]
    """Activations that it reads: the input first, then the residual."""
    parameters: tuple[TensorInfo, ...]
    """Weights, biases and running statistics; of a convolution or a linear layer the weight comes first."""
    output: TensorInfo
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """stride, padding, dilation, groups, kernel_size, relu, training, inplace, ...

    `training` of a batch norm that differs from the model's: frozen, or with batch statistics in eval.
    `needs_input_grad` (True) and `needs_parameter_grad` (True): whether backward computes them; the first layer of a
    network has no gradient of its input.  `requires_grad`, a set of names of resfuse's arguments, says it one by one.
    """

    @property
    def needs_input_grad(self) -> bool:
        return bool(self.options.get("needs_input_grad", True))

    @property
    def needs_parameter_grad(self) -> bool:
        return bool(self.options.get("needs_parameter_grad", True))

    def weight(self) -> TensorInfo:
        """The weight of a convolution or of a linear layer.

        Raises:
            ValueError: the first parameter is none.
        """
        dimensions = 2 if self.name == "linear" else 4
        if not self.parameters or len(self.parameters[0].shape) != dimensions:
            found = [parameter.shape for parameter in self.parameters]
            raise ValueError(
                f"parameters: expected a weight of {dimensions} dimensions first for {self.name} at {self.path!r}, "
                f"got shapes {found}"
            )
        return self.parameters[0]

    def pair(self, option: str, default: int) -> tuple[int, int]:
        """An option that is one integer or two: stride, padding, dilation."""
        value = self.options.get(option, default)
        if isinstance(value, int):
            return value, value
        values = tuple(value)
        if len(values) == 1:
            values *= 2
        if len(values) != 2 or not all(isinstance(item, int) for item in values):
            raise ValueError(f"{option}: expected one integer or two for {self.name} at {self.path!r}, got {value!r}")
        return values[0], values[1]
