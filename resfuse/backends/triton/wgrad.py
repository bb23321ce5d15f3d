"""The gradient of a convolution's weight.

    dw[k, r, s, c] = sum over (n, oh, ow) of dz[n, oh, ow, k] x[n, h, w, c]
    with h = oh stride_h - pad_h + r dil_h and w = ow stride_w - pad_w + s dil_w

A GEMM whose inner dimension is the pixels of the output: few tiles, long loops.  So `split_k` programs share a tile,
each with a run of pixels; those of one run are next to each other and read the same dz and x, which L2 keeps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse.backends.triton import grad_plan
from resfuse.backends.triton.conv_plan import conv_problem
from resfuse.backends.triton.conv_tile import output_channels
from resfuse.backends.triton.grad_prologue import (
    BatchNormGrad,
    Grad,
    arguments,
    computed_grad,
    grad_coefficients,
)
from resfuse.backends.triton.launch import launch
from resfuse.backends.triton.split_sum import sum_splits

Pair = tuple[int, int]


@triton.jit
def wgrad_kernel(
    dz_ptr, z_ptr, y_ptr, weight_ptr, mean_ptr, invstd_ptr, sum_g_ptr, sum_g_xhat_ptr, count, x_ptr, dw_ptr,
    M, H, W, OH, OW, split_k,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, GROUPS: tl.constexpr, PACK_GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, INDEX64: tl.constexpr, PACK_TAPS: tl.constexpr,
):  # fmt: skip
    """A tile of dw over all M output pixels, or with SPLIT over part program_id(1) of split_k of them, in float32.

    A tile has BLOCK_M output channels and BLOCK_N input channels of one tap, or PACK_TAPS, where these are few, BLOCK_N
    neighbours in the filter.  Of PACK_GROUPS groups in a tile only the diagonal is stored.  Reads M x K of dz and
    M x C of x per tap and tile, from L2 but for the first time.
    """
    CG: tl.constexpr = C // GROUPS
    KG: tl.constexpr = K // GROUPS
    PACK_WIDTH: tl.constexpr = R * S * C if PACK_TAPS else PACK_GROUPS * CG
    TILES_M: tl.constexpr = (-(-GROUPS // PACK_GROUPS)) * (-(-PACK_GROUPS * KG // BLOCK_M))
    TILES_C: tl.constexpr = -(-PACK_WIDTH // BLOCK_N)
    POINTWISE: tl.constexpr = R == 1 and S == 1 and STRIDE_H == 1 and STRIDE_W == 1 and PAD_H == 0 and PAD_W == 0
    PADDED: tl.constexpr = PAD_H > 0 or PAD_W > 0

    tile_m, tile_n = tl.program_id(0) % TILES_M, tl.program_id(0) // TILES_M
    pack, k, k_mask = output_channels(tile_m, K, GROUPS, PACK_GROUPS, BLOCK_M)
    tap = tile_n // TILES_C
    column = (tile_n - tap * TILES_C) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = column < PACK_WIDTH
    if PACK_TAPS:  # vectors
        r, s = column // C // S, column // C % S
        x_column = (r * DIL_H * W + s * DIL_W) * C + column % C
    else:
        r, s = tap // S, tap % S
        x_column = (r * DIL_H * W + s * DIL_W) * C + pack * PACK_WIDTH + column
        if GROUPS % PACK_GROUPS != 0:
            column_mask = column_mask & (pack * PACK_WIDTH + column < C)
    if invstd_ptr is not None:
        scale, mean_g, mean, slope = grad_coefficients(
            weight_ptr, mean_ptr, invstd_ptr, sum_g_ptr, sum_g_xhat_ptr, count, k[:, None], k_mask[:, None]
        )

    offs_k = tl.arange(0, BLOCK_K)
    if INDEX64:
        offs_k = offs_k.to(tl.int64)
    steps = tl.cdiv(M, BLOCK_K)
    if SPLIT:
        steps_of_part = tl.cdiv(steps, split_k)
        begin = tl.program_id(1) * steps_of_part
        end = tl.minimum(begin + steps_of_part, steps)
    else:
        begin, end = 0, steps
    pixels = begin * BLOCK_K + offs_k
    image, oh, ow = pixels // OW // OH, pixels // OW % OH, pixels % OW
    images_of_step, oh_of_step, ow_of_step = BLOCK_K // OW // OH, BLOCK_K // OW % OH, BLOCK_K % OW
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(begin, end):
        inside = pixels < M
        offsets, mask = k[:, None] + pixels[None, :] * K, k_mask[:, None] & inside[None, :]
        if invstd_ptr is None:
            a = tl.load(dz_ptr + offsets, mask=mask, other=0.0)
        else:
            a = computed_grad(dz_ptr, z_ptr, y_ptr, mean_ptr, offsets, mask, scale, mean_g, mean, slope)
        if POINTWISE:
            x_row = pixels * C
            mask = inside[:, None] & column_mask[None, :]
        else:
            ih, iw = oh * STRIDE_H - PAD_H, ow * STRIDE_W - PAD_W
            x_row = ((image * H + ih) * W + iw) * C
            if PADDED and PACK_TAPS:
                ih, iw = ih[:, None] + (r * DIL_H)[None, :], iw[:, None] + (s * DIL_W)[None, :]
                mask = inside[:, None] & column_mask[None, :] & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
            elif PADDED:
                ih, iw = ih + r * DIL_H, iw + s * DIL_W
                mask = (inside & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W))[:, None] & column_mask[None, :]
            else:
                mask = inside[:, None] & column_mask[None, :]
        b = tl.load(x_ptr + x_row[:, None] + x_column[None, :], mask=mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

        pixels += BLOCK_K
        if not POINTWISE:  # with carries: divisions would take longer than the products
            ow += ow_of_step
            carry = ow >= OW
            ow = tl.where(carry, ow - OW, ow)
            oh += oh_of_step + carry.to(tl.int32)
            carry = oh >= OH
            oh = tl.where(carry, oh - OH, oh)
            image += images_of_step + carry.to(tl.int32)

    if PACK_TAPS:
        w_column = column
    else:
        w_column = tap * CG + column % CG
    mask = k_mask[:, None] & column_mask[None, :]
    if PACK_GROUPS > 1:
        mask = mask & ((k // KG - pack * PACK_GROUPS)[:, None] == (column // CG)[None, :])
    if SPLIT:
        dw_ptr += tl.program_id(1).to(tl.int64) * (K * R * S * CG)
    offsets = k.to(tl.int64)[:, None] * (R * S * CG) + w_column[None, :]
    tl.store(dw_ptr + offsets, acc.to(dw_ptr.dtype.element_ty), mask=mask)


def wgrad(dz: Grad, x: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int, dw: Tensor) -> None:
    """dw in one launch, or two where the pixels are split.  All in dense channels_last memory, of one dtype."""
    problem = conv_problem("wgrad", x, dw, stride, padding, dilation, groups)
    config = grad_plan.configuration(problem, x.device, fused=isinstance(dz, BatchNormGrad))
    plan = grad_plan.plan(problem, config)
    split = config.split_k > 1
    out = torch.empty((config.split_k, dw.numel()), dtype=torch.float32, device=x.device) if split else dw
    launch(
        wgrad_kernel, (plan.programs, config.split_k), *arguments(dz), x, out,
        plan.pixels, problem.h, problem.w, problem.oh, problem.ow, config.split_k,
        **plan.constants, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if split:
        sum_splits(out, dw)
