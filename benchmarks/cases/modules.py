"""Parts of networks in plain PyTorch, in place wherever torchvision's blocks are.

A layer without a residual is an `nn.Sequential`.  One with a residual is no module of its own in torchvision: it is the
end of a block's forward.  Those ends are modules here, and `fuse_` is told about them as it knows torchvision's blocks,
so that they run through the same fused call as in a network, and through its checks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from resfuse.nn.fused_call import add_act, bn_act, conv_bn_act
from resfuse.surgery.fused import Fused
from resfuse.surgery.known import Known, Step, register


@dataclasses.dataclass(frozen=True)
class ConvSpec:
    """A convolution without bias and the batch norm behind it, on images of one size; what tells layers apart."""

    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    padding: int
    groups: int
    extent: tuple[int, int]
    """H and W of the input."""
    residual: bool = False
    relu: bool = True

    def shapes(self, batch: int) -> tuple[tuple[int, ...], ...]:
        """Of the input and, where there is one, the residual."""
        output = [(size + 2 * self.padding - self.kernel) // self.stride + 1 for size in self.extent]
        input = (batch, self.in_channels, *self.extent)
        return (input, (batch, self.out_channels, *output)) if self.residual else (input,)

    def build(self) -> nn.Module:
        """The layer."""
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel, self.stride, self.padding, groups=self.groups, bias=False
        )
        bn = nn.BatchNorm2d(self.out_channels)
        if self.residual:
            return ConvBNAddReLU(conv, bn)
        return nn.Sequential(conv, bn, nn.ReLU(inplace=True)) if self.relu else nn.Sequential(conv, bn)


class ConvBNAddReLU(nn.Module):
    """The end of a residual block."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = conv, bn, nn.ReLU(inplace=True)

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        output = self.bn(self.conv(input))
        output += residual
        return self.relu(output)


class BNAddReLU(nn.Module):
    """The same behind a convolution of somebody else."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        output = self.bn(input)
        output += residual
        return self.relu(output)


class AddReLU(nn.Module):
    """The addition and the ReLU; the addition is not in place, as both operands are somebody else's."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        return self.relu(input + residual)


def bn_relu(channels: int) -> nn.Module:
    """Batch norm and ReLU, as before a convolution of a pre-activation block."""
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


class PreActBlock(nn.Module):
    """A pre-activation block (He et al. 2016, arXiv:1603.05027): basic, or with a bottleneck where `mid` is given.

    Its shortcut, where the shape changes, is a convolution of the pre-activated input.
    """

    def __init__(self, inplanes: int, outplanes: int, stride: int = 1, mid: int | None = None) -> None:
        super().__init__()
        self.preact = bn_relu(inplanes)
        if mid is None:
            self.body = nn.Sequential(
                nn.Conv2d(inplanes, outplanes, 3, stride, 1, bias=False),
                *_modules(bn_relu(outplanes)),
                nn.Conv2d(outplanes, outplanes, 3, 1, 1, bias=False),
            )
        else:
            self.body = nn.Sequential(
                nn.Conv2d(inplanes, mid, 1, bias=False),
                *_modules(bn_relu(mid)),
                nn.Conv2d(mid, mid, 3, stride, 1, bias=False),
                *_modules(bn_relu(mid)),
                nn.Conv2d(mid, outplanes, 1, bias=False),
            )
        projects = stride != 1 or inplanes != outplanes
        self.shortcut = nn.Conv2d(inplanes, outplanes, 1, stride, bias=False) if projects else None

    def forward(self, input: Tensor) -> Tensor:
        preactivated = self.preact(input)
        residual = input if self.shortcut is None else self.shortcut(preactivated)
        return self.body(preactivated) + residual


class _FusedConvBNAddReLU(Fused):
    def forward(self: Any, input: Tensor, residual: Tensor) -> Tensor:
        return conv_bn_act(self.conv, self.bn, input, residual, self.relu)


class _FusedBNAddReLU(Fused):
    def forward(self: Any, input: Tensor, residual: Tensor) -> Tensor:
        return bn_act(self.bn, input, residual, self.relu)


class _FusedAddReLU(Fused):
    def forward(self: Any, input: Tensor, residual: Tensor) -> Tensor:
        return add_act(input, residual, self.relu)


def _modules(sequential: nn.Module) -> list[nn.Module]:
    return list(sequential.children())


register(
    ConvBNAddReLU,
    Known(
        "end of a residual block",
        _FusedConvBNAddReLU,
        {"forward": "conv bn relu"},
        lambda module: [Step("conv", "bn", "relu", residual=True)],
    ),
)
register(
    BNAddReLU,
    Known(
        "end of a residual block",
        _FusedBNAddReLU,
        {"forward": "bn relu"},
        lambda module: [Step(None, "bn", "relu", residual=True)],
    ),
)
register(
    AddReLU,
    Known(
        "end of a residual block",
        _FusedAddReLU,
        {"forward": "relu"},
        lambda module: [Step(None, None, "relu", residual=True)],
    ),
)
