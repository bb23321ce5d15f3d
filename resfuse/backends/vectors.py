"""Per-channel vectors (statistics, weights, biases) on their way into kernels and back."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from resfuse.types import BatchNorm


@overload
def kernel_vector(vector: Tensor, input: Tensor) -> Tensor: ...
@overload
def kernel_vector(vector: Tensor | None, input: Tensor) -> Tensor | None: ...
def kernel_vector(vector: Tensor | None, input: Tensor) -> Tensor | None:
    """The vector itself where it is contiguous and in float32 or in the dtype of `input`, else a copy."""
    if vector is None:
        return None
    if vector.dtype != torch.float32 and vector.dtype != input.dtype:
        vector = vector.float()
    return vector.contiguous()


def copy_back(bn: BatchNorm, means: Tensor | None, variances: Tensor | None) -> None:
    """Give running statistics that kernels could not write in place (a view, another dtype) their new values."""
    for statistic, value in ((bn.running_mean, means), (bn.running_var, variances)):
        if statistic is not None and value is not None and value is not statistic:
            statistic.copy_(value)
