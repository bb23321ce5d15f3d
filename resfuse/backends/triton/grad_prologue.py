"""The gradient dz of a convolution's output: given, or computed while it is loaded.

Behind the convolution stand a batch norm, perhaps a residual, and perhaps a ReLU.  With z the convolution's output, y
the block's, dy its gradient, n values per channel and xhat = (z - mean) invstd,

    g = dy where y > 0 or y is NaN, else 0 (dy itself without a ReLU)
    dz = weight invstd (g - sum_g / n - xhat sum_g_xhat / n)    with batch statistics
    dz = weight invstd g                                        with running statistics

rounded to the dtype, as it would be in memory.  Computed here it is neither written nor read.
"""

from __future__ import annotations

import dataclasses

import triton
import triton.language as tl
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class BatchNormGrad:
    """What dz is computed from: activations in NHWC memory, the vectors over channels (all but `weight` float32)."""

    dy: Tensor
    z: Tensor
    y: Tensor | None
    """The source of the ReLU's mask; None without one."""
    weight: Tensor | None
    mean: Tensor
    invstd: Tensor
    sum_g: Tensor | None
    sum_g_xhat: Tensor | None
    count: int | None
    """Values per channel that the sums are over; None: running statistics were used, and z and the sums are not."""


Grad = Tensor | BatchNormGrad


def arguments(grad: Grad) -> tuple[Tensor | float | None, ...]:
    """The kernels' parameters (dz or dy, z, y, weight, mean, invstd, sum_g, sum_g_xhat, count)."""
    if not isinstance(grad, BatchNormGrad):
        return grad, None, None, None, None, None, None, None, None
    if grad.count is None:
        return grad.dy, None, grad.y, grad.weight, None, grad.invstd, None, None, None
    vectors = grad.weight, grad.mean, grad.invstd, grad.sum_g, grad.sum_g_xhat
    return grad.dy, grad.z, grad.y, *vectors, float(grad.count)


@triton.jit
def grad_coefficients(weight_ptr, mean_ptr, invstd_ptr, sum_g_ptr, sum_g_xhat_ptr, count, channels, mask):
    """Vectors (scale, mean_g, mean, slope) over channels with dz = scale (g - mean_g - (z - mean) slope)."""
    invstd = tl.load(invstd_ptr + channels, mask=mask, other=0.0)
    scale, mean_g, mean, slope = invstd, invstd, invstd, invstd
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + channels, mask=mask, other=0.0).to(tl.float32)
    if mean_ptr is not None:  # else running statistics, where the other three are not used
        mean = tl.load(mean_ptr + channels, mask=mask, other=0.0)
        mean_g = tl.load(sum_g_ptr + channels, mask=mask, other=0.0) / count
        slope = invstd * (tl.load(sum_g_xhat_ptr + channels, mask=mask, other=0.0) / count)
    return scale, mean_g, mean, slope


@triton.jit
def computed_grad(dy_ptr, z_ptr, y_ptr, mean_ptr, offsets, mask, scale, mean_g, mean, slope):
    """A tile of dz, zero outside of the mask; the coefficients are broadcast over it."""
    g = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if y_ptr is not None:
        g = tl.where(tl.load(y_ptr + offsets, mask=mask, other=0.0) <= 0, 0.0, g)
    if mean_ptr is not None:
        z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        g = g - mean_g - (z - mean) * slope
    return tl.where(mask, scale * g, 0.0).to(dy_ptr.dtype.element_ty)
