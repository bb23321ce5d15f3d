"""What happens to a tile [BLOCK_M, BLOCK_N] of a convolution before it is stored: bias, batch norm, residual, ReLU."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def per_channel(ptr, channels, mask, DEFAULT: tl.constexpr):
    """A tile's part [BLOCK_N] of a vector over the channels, in float32; the default where there is none (None)."""
    if ptr is None:
        vector = tl.full(channels.shape, DEFAULT, tl.float32)
    else:
        vector = tl.load(ptr + channels, mask=mask, other=0.0).to(tl.float32)
    return vector


@triton.jit
def activate(a, RELU: tl.constexpr):
    """relu(a) or a; NaN stays NaN."""
    if RELU:
        a = tl.where(a <= 0, 0.0, a)
    return a


@triton.jit
def normalize(z, mean, invstd, weight_ptr, bias_ptr, channels, mask):
    """(z - mean) invstd weight + bias for a tile z, with mean and invstd [BLOCK_N]."""
    scale = invstd * per_channel(weight_ptr, channels, mask, 1.0)
    bias = per_channel(bias_ptr, channels, mask, 0.0)
    return (z - mean[None, :]) * scale[None, :] + bias[None, :]


@triton.jit
def activate_and_store(y, residual_ptr, out_ptr, pixels, channels, M, mask, K: tl.constexpr, RELU: tl.constexpr):
    """out = act(y [+ residual]), rounded once."""
    offsets = pixels[:, None] * K + channels[None, :]
    inside = (pixels < M)[:, None] & mask[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    y = activate(y, RELU)
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=inside)
