"""bn_act on the activations of the networks: batch norm, optional residual and ReLU."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import models
from benchmarks.case import Case


def cases(names: Sequence[str], batch: int, size: int | None = None) -> list[Case]:
    """The distinct batch norms with a ReLU behind them, each named by its first place."""
    found: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        for layer, paths in models.layers(name, size).items():
            if layer.relu:
                key = (layer.out_channels, *layer.output_extent, layer.residual)
                found.setdefault(key, []).extend(f"{name} {path}" for path in paths)
    made = []
    for (channels, height, width, residual), paths in found.items():
        shapes = ((batch, channels, height, width),) * (1 + residual)
        made.append(Case("bn_act", f"{paths[0]} x{len(paths)}", (channels,), shapes))
    return made


def build(channels: int) -> nn.Module:
    """The module of a case."""
    return BNAct(channels)


class BNAct(nn.Module):
    """relu(bn(input) [+ residual]), in place behind the batch norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        output = self.bn(input)
        if residual is not None:
            output += residual
        return F.relu(output, inplace=True)

    def fused(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """The same as one call of resfuse."""
        import resfuse

        bn = self.bn
        return resfuse.bn_act(
            input, bn.running_mean, bn.running_var, bn.weight, bn.bias,
            residual=residual, training=self.training, momentum=bn.momentum, eps=bn.eps,
        )  # fmt: skip


if __name__ == "__main__":
    from benchmarks import harness

    raise SystemExit(harness.main("bn_act"))
