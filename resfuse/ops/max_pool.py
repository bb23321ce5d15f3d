"""max_pool: 2-D max pooling that keeps for backward one byte per output, the position of the maximum in its window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resfuse.backends import dispatch, reference
from resfuse.backends.dispatch import backend_for, must_differentiate
from resfuse.types import Pooling

MOST_POSITIONS = 256


class MaxPoolFunction(torch.autograd.Function):
    """Saves the positions alone; PyTorch's own max pooling saves the input and int64 indices.

    It is not a registered operator: whoever has to see PyTorch's operators (compilers, exporters, modes) gets
    PyTorch's max pooling.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, pooling: Pooling) -> Tensor:
        output, positions = backend_for("max_pool_forward", input).max_pool_forward(input, pooling)
        ctx.request, ctx.pooling, ctx.shape = dispatch.requested_backend(), pooling, input.shape
        ctx.save_for_backward(positions)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        (positions,) = ctx.saved_tensors
        args = (grad_output, positions, ctx.shape, ctx.pooling)
        if must_differentiate(grad_output):
            return reference.max_pool_backward(*args), None
        backend = backend_for("max_pool_backward", grad_output, request=ctx.request)
        return backend.max_pool_backward(*args), None
