"""The operator calls of a model as a list: shapes and options, no data."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from resfuse.costs import Operation


def operations(model: nn.Module, *inputs: Tensor | Sequence[int]) -> tuple[Operation, ...]:
    """The operator calls that a model makes for such inputs, in order, fused or not as the model is."""
    raise NotImplementedError
