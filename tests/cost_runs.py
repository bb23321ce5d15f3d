"""Fused operators that run, each with the operation that describes it: launches are held against the model's."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import resfuse
from resfuse import costs
from resfuse.costs import Device, Operation, TensorInfo

CPU = Device("a processor", "cpu", 50e9, {torch.float32: 1e12}, 1 << 34, 0.0, "made up")
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any], bool]] = {
    "3x3": ((2, 16, 8, 8), (32, 16, 3, 3), {"padding": 1}, False),
    "3x3, stride 2": ((2, 16, 9, 9), (32, 16, 3, 3), {"padding": 1, "stride": 2}, False),
    "1x1 and residual": ((2, 16, 8, 8), (32, 16, 1, 1), {}, True),
    "deep": ((1, 128, 4, 4), (32, 128, 3, 3), {"padding": 1}, False),
    "grouped": ((2, 16, 8, 8), (32, 4, 3, 3), {"padding": 1, "groups": 4}, False),
}


class Run:
    """A fused operator on tensors of ones, and the operation that describes it."""

    def __init__(self, name: str, case: str, training: bool, device: str = "cpu") -> None:
        shape, weight_shape, conv, with_residual = CASES[case]
        self.name, self.training = name, training
        self.conv = conv if name == "conv_bn_act" else {}
        weight = ones(weight_shape, device)
        z = F.conv2d(ones(shape, device), weight, **conv)
        self.input = ones(tuple(z.shape) if name != "conv_bn_act" else shape, device).requires_grad_()
        self.weight = weight.requires_grad_()
        channels = z.shape[1]
        self.vectors = [torch.zeros(channels, device=device), torch.ones(channels, device=device)]
        self.vectors += [torch.ones(channels, device=device).requires_grad_() for _ in range(2)]
        self.residual = ones(tuple(z.shape), device).requires_grad_() if with_residual or name == "add_relu" else None
        activations = [self.input] if self.residual is None else [self.input, self.residual]
        vectors = [] if name == "add_relu" else self.vectors
        parameters = [self.weight, *vectors] if name == "conv_bn_act" else vectors
        self.operation = Operation(
            "", name, tuple(map(described, activations)), tuple(map(described, parameters)), described(z),
            {**self.conv, "relu": True, "training": training},
        )  # fmt: skip

    def forward(self) -> Tensor:
        if self.name == "add_relu":
            assert self.residual is not None
            return resfuse.add_relu(self.input, self.residual)
        options = {"residual": self.residual, "training": self.training, **self.conv}
        if self.name == "bn_act":
            return resfuse.bn_act(self.input, *self.vectors, **options)
        return resfuse.conv_bn_act(self.input, self.weight, *self.vectors, **options)

    def backward(self, output: Tensor, grad_output: Tensor) -> object:
        wanted = [self.input] if self.residual is None else [self.input, self.residual]
        if self.name != "add_relu":
            wanted += self.vectors[2:]
        if self.name == "conv_bn_act":
            wanted.append(self.weight)
        return torch.autograd.grad(output, wanted, grad_output, retain_graph=True)

    def modelled(self, backend: str, device: Device, least: int = 0) -> tuple[int, int]:
        """Launches of forward and backward, without the addition where the residual's path meets the other one.

        `least`: bytes of those that count.
        """
        options: Any = {"training": self.training, "backend": backend, "device": device}
        both = (kernels(self.operation, **options) for kernels in (costs.forward_kernels, costs.backward_kernels))
        forward, backward = (sum(kernel.bytes >= least for kernel in kernels) for kernels in both)
        return forward, backward - (self.residual is not None)


def ones(shape: tuple[int, ...], device: str) -> Tensor:
    return torch.ones(shape, device=device).contiguous(memory_format=torch.channels_last)


def described(tensor: Tensor) -> TensorInfo:
    return TensorInfo(tuple(tensor.shape), tensor.dtype)


runs = pytest.mark.parametrize(
    ("name", "case", "training"),
    [
        *itertools.product(["conv_bn_act"], CASES, [True, False]),
        *itertools.product(["bn_act"], ["3x3", "1x1 and residual"], [True, False]),
        ("add_relu", "3x3", False),
    ],
)
