"""AddReLU: the end of a residual block as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resfuse.functional import add_relu
from resfuse.nn.fused_call import must_decompose


class AddReLU(nn.Module):
    """`relu(input + residual)` in one pass over memory; see `resfuse.add_relu`.

    Shapes: input, residual and output have the same shape, of any rank.

    Equivalent to `torch.relu(input + residual)`.
    """

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        if must_decompose(input):
            return torch.relu(input + residual)
        return add_relu(input, residual)
