"""add_relu on the ends of the networks' residual blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import models
from benchmarks.case import Case


def cases(names: Sequence[str], batch: int, size: int | None = None) -> list[Case]:
    """The distinct shapes of block outputs, each named by its first place."""
    found: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        for layer, paths in models.layers(name, size).items():
            if layer.residual:
                key = (layer.out_channels, *layer.output_extent)
                found.setdefault(key, []).extend(f"{name} {path.rpartition('.')[0]}" for path in paths)
    return [Case("add_relu", f"{paths[0]} x{len(paths)}", (), ((batch, *shape),) * 2) for shape, paths in found.items()]


def build() -> nn.Module:
    """The module of a case."""
    return AddReLU()


class AddReLU(nn.Module):
    """relu(input + residual); the sum is a new tensor, as both operands belong to somebody else."""

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        return F.relu(input + residual, inplace=True)

    def fused(self, input: Tensor, residual: Tensor) -> Tensor:
        """The same as one call of resfuse."""
        import resfuse

        return resfuse.add_relu(input, residual)


if __name__ == "__main__":
    from benchmarks import harness

    raise SystemExit(harness.main("add_relu"))
