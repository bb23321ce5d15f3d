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
    network has no gradient of its input.
    """
