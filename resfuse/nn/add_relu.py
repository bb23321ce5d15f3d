"""AddReLU: the end of a residual block as a module."""

from __future__ import annotations

from torch import Tensor, nn

from resfuse.functional import add_relu


class AddReLU(nn.Module):
    """`relu(input + residual)` in one pass over memory; see `resfuse.add_relu`.

    Shapes: input and residual have the same one, any; so has the output.

    Equivalent to `torch.relu(input + residual)`.
    """

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        return add_relu(input, residual)
