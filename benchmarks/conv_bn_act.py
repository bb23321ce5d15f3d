"""conv_bn_act on every distinct layer of the networks: convolution, batch norm, optional residual and ReLU."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import models
from benchmarks.case import Case
from benchmarks.models import Layer


def cases(names: Sequence[str], batch: int, size: int | None = None) -> list[Case]:
    """The distinct layers of the networks, each named by its first place."""
    found = []
    for name in names:
        for layer, paths in models.layers(name, size).items():
            shapes = [(batch, layer.in_channels, *layer.extent)]
            if layer.residual:
                shapes.append((batch, layer.out_channels, *layer.output_extent))
            title = f"{name} {paths[0]} x{len(paths)}"
            found.append(Case("conv_bn_act", title, tuple(layer), tuple(shapes), image=layer.in_channels == 3))
    return found


def build(*arguments: object) -> nn.Module:
    """The layer of a case."""
    return ConvBNAct(Layer(*arguments))  # type: ignore[arg-type]


class ConvBNAct(nn.Module):
    """act(bn(conv(input)) [+ residual]), in place wherever torchvision's blocks are."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            layer.in_channels, layer.out_channels, layer.kernel, layer.stride, layer.padding,
            groups=layer.groups, bias=False,
        )  # fmt: skip
        self.bn = nn.BatchNorm2d(layer.out_channels)
        self.relu = layer.relu

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        output = self.bn(self.conv(input))
        if residual is not None:
            output += residual
        return F.relu(output, inplace=True) if self.relu else output

    def fused(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """The same as one call of resfuse."""
        import resfuse

        conv, bn = self.conv, self.bn
        return resfuse.conv_bn_act(
            input, conv.weight, bn.running_mean, bn.running_var, bn.weight, bn.bias,
            residual=residual, activation="relu" if self.relu else "identity",
            stride=conv.stride, padding=conv.padding, groups=conv.groups,
            training=self.training, momentum=bn.momentum, eps=bn.eps,
        )  # fmt: skip


if __name__ == "__main__":
    from benchmarks import harness

    raise SystemExit(harness.main("conv_bn_act"))
