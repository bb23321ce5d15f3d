"""The problems `resfuse verify` runs: ops on shapes of residual networks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from resfuse.backends import dispatch
from resfuse.layout import conv_output_shape
from resfuse.nn import AddReLU, BNAct2d, ConvBNAct2d
from resfuse.types import Convolution, Problem

KERNELS = {
    "add_relu": ("add_relu_forward", "add_relu_backward"),
    "bn_act": ("bn_act_forward", "bn_act_backward"),
    "conv_bn_act": ("conv_bn_act_forward", "conv_forward", "bn_act_backward", "conv_backward"),
}
"""The functions of the kernel API that each op needs."""


class Case(NamedTuple):
    """One op on one shape; the fields from `channels_out` on are those of a convolution."""

    op: str
    name: str
    shape: tuple[int, int, int, int]
    activation: str = "relu"
    residual: bool = False
    channels_out: int = 0
    kernel_size: int = 1
    stride: int = 1
    groups: int = 1
    bias: bool = False

    @property
    def weight_shape(self) -> torch.Size:
        return torch.Size((self.channels_out, self.shape[1] // self.groups, self.kernel_size, self.kernel_size))

    @property
    def convolution(self) -> Convolution:
        padding = self.kernel_size // 2
        return Convolution((self.stride, self.stride), (padding, padding), (1, 1), self.groups)

    @property
    def output_shape(self) -> torch.Size:
        if self.op != "conv_bn_act":
            return torch.Size(self.shape)
        return torch.Size(conv_output_shape(torch.Size(self.shape), self.weight_shape, self.convolution))

    def unsupported_reasons(self, backend: str, device: torch.device, dtype: torch.dtype) -> list[str]:
        """Why a backend cannot run this; empty if it can."""
        module, reasons = dispatch.backend(backend), []
        for kernel in KERNELS[self.op]:
            problem = Problem(kernel, device, dtype, self.output_shape)
            if "conv" in kernel:
                problem = Problem(kernel, device, dtype, torch.Size(self.shape), self.weight_shape, self.convolution)
                problem = problem._replace(tf32=dtype == torch.float32 and dispatch.uses_tf32())
            if kernel in module.KERNELS:  # dispatch leaves others to `reference`
                reasons += module.unsupported_reasons(problem)
        return reasons

    def build(self, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, list[Tensor], Tensor]:
        """The module with random parameters and statistics, its inputs, and grad_output; the same on every device."""
        torch.manual_seed(0)
        tensors = [torch.randn(self.shape), *([torch.randn(self.output_shape)] if self.residual else [])]
        tensors.append(torch.randn(self.output_shape))
        *inputs, grad_output = (tensor.to(device, dtype) for tensor in tensors)
        if self.op == "add_relu":
            return AddReLU(), inputs, grad_output
        channels = self.output_shape[1]
        if self.op == "bn_act":
            module: nn.Module = BNAct2d(channels, activation=self.activation)
        else:
            module = ConvBNAct2d(
                self.shape[1], channels, self.kernel_size, self.stride, self.kernel_size // 2,
                groups=self.groups, bias=self.bias, activation=self.activation,
            )  # fmt: skip
            nn.init.kaiming_normal_(module.conv.weight)
            module.conv.to(dtype)
        for name, tensor in module.state_dict().items():  # of batch norm, float32 as under autocast
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.randn(channels).abs())
            elif name.endswith("running_mean") or name in ("bias", "bn.bias"):
                tensor.normal_()
            elif name in ("weight", "bn.weight"):
                # Of either sign with magnitudes from 0.5 to 1.5: a single huge one would decide every norm.
                tensor.copy_((0.5 + torch.randn(channels).abs().clamp(max=1)) * torch.randn(channels).sign())
        return module.to(device), inputs, grad_output


CASES = (
    Case("add_relu", "stage 1", (2, 256, 28, 28), residual=True),
    Case("add_relu", "odd sizes", (3, 17, 5, 7), residual=True),
    Case("bn_act", "stem", (2, 64, 56, 56)),
    Case("bn_act", "end of a block", (2, 256, 14, 14), residual=True),
    Case("bn_act", "shortcut", (2, 512, 7, 7), "identity"),
    Case("bn_act", "odd sizes", (3, 17, 5, 7), residual=True),
    Case("conv_bn_act", "stem 7x7 / 2", (2, 3, 64, 64), channels_out=64, kernel_size=7, stride=2),
    Case("conv_bn_act", "3x3", (2, 64, 28, 28), channels_out=64, kernel_size=3),
    Case("conv_bn_act", "3x3 + residual", (2, 64, 28, 28), residual=True, channels_out=64, kernel_size=3),
    Case("conv_bn_act", "3x3 / 2", (2, 128, 15, 15), channels_out=128, kernel_size=3, stride=2),
    Case("conv_bn_act", "1x1", (2, 256, 14, 14), channels_out=64),
    Case("conv_bn_act", "1x1 + residual", (2, 64, 14, 14), residual=True, channels_out=256),
    Case("conv_bn_act", "1x1 / 2 shortcut", (2, 256, 14, 14), "identity", channels_out=512, stride=2),
    Case("conv_bn_act", "3x3 in 32 groups", (2, 128, 14, 14), channels_out=128, kernel_size=3, groups=32),
    Case("conv_bn_act", "odd sizes, biased", (3, 17, 9, 7), residual=True, channels_out=19, kernel_size=3, bias=True),
)
