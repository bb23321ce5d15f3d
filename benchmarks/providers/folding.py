"""Batch norm with running statistics, folded into the convolution before it: what other systems' fused calls want."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Folded(NamedTuple):
    """A convolution that does the work of its batch norm too."""

    weight: Tensor
    """(K, C / groups, R, S), dtype and memory format of the convolution's."""
    bias: Tensor
    """(K,), the same dtype."""


def fold(
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Folded:
    """The convolution that computes batch_norm(conv(input)) in inference.

    With s = weight / sqrt(running_var + eps) per output channel, its weight is s * conv_weight and its bias is
    bias + s * (conv_bias - running_mean); computed in float64, rounded once.

    Args:
        conv_weight: (K, C / groups, R, S).
        conv_bias: (K,) or None.
        running_mean, running_var: (K,).
        weight, bias: (K,) or None, of the batch norm.
        eps: what is added to the variance.
    """
    scale = (running_var.double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    shift = -running_mean.double() * scale
    if conv_bias is not None:
        shift = shift + conv_bias.double() * scale
    if bias is not None:
        shift = shift + bias.double()
    folded = torch.empty_like(conv_weight)  # keeps the strides
    folded.copy_(conv_weight.double() * scale[:, None, None, None])
    return Folded(folded.detach(), shift.to(conv_weight.dtype).detach())
