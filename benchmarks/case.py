"""Cases and settings: plain data that a worker process can be sent."""

from __future__ import annotations

import importlib
from typing import NamedTuple

import torch
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODES = {
    "models": ("inference", "train"),
    "conv_bn_act": ("inference", "forward", "backward", "full"),
    "bn_act": ("inference", "forward", "backward", "full"),
    "add_relu": ("inference", "forward", "backward", "full"),
}
"""Modes by op.

- inference: eval mode, no gradients.
- forward: training mode, with what backward needs saved.
- backward: the gradients of inputs and parameters, from the graph of one forward.
- full: forward and backward.
- train: a whole training step of a model: forward, cross entropy, backward, SGD with momentum.
"""


class Setting(NamedTuple):
    """The conditions that all providers of a comparison share.

    In bfloat16 and float16, inference runs with parameters and inputs of that dtype; the other modes run under autocast
    with float32 parameters.
    """

    mode: str
    dtype: torch.dtype
    device: str
    threads: int

    @property
    def trains(self) -> bool:
        return self.mode != "inference"

    @property
    def parameter_dtype(self) -> torch.dtype:
        """The dtype of parameters and images."""
        return torch.float32 if self.trains and self.dtype.itemsize < 4 else self.dtype

    def autocast(self) -> torch.autocast:
        """The context of a forward pass in training."""
        enabled = self.dtype != self.parameter_dtype
        return torch.autocast(self.device.partition(":")[0], self.dtype if enabled else torch.bfloat16, enabled=enabled)


class Case(NamedTuple):
    """A module of plain PyTorch, which `benchmarks.<op>.build(*arguments)` makes, and the shapes of its inputs."""

    op: str
    name: str
    """An op's case carries the first place where it occurs: "resnet50 layer1.0.conv2 x3" (x3: in three places)."""
    arguments: tuple[object, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Input (N, C, H, W) and, where there is one, residual."""
    image: bool = False
    """The input is an image, which needs no gradient."""

    def build(self) -> nn.Module:
        """A new module with random weights."""
        module: nn.Module = importlib.import_module(f"benchmarks.{self.op}").build(*self.arguments)
        return module

    @property
    def shape(self) -> str:
        """Shape of the input as text: 16x3x224x224."""
        return "x".join(map(str, self.shapes[0]))


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")
