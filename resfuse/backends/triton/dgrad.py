"""The gradient of a convolution's input.

    dx[n, h, w, c] = sum over (r, s, k) of dz[n, oh, ow, k] w[k, r, s, c]
    with oh stride_h = h + pad_h - r dil_h and ow stride_w = w + pad_w - s dil_w

Under a stride a pixel meets only the taps for which these divide.  Pixels with the same (h mod stride_h, w mod
stride_w), a phase, meet the same ones; oh - h div stride_h is then one number per tap, and a phase is a convolution of
stride 1 with part of the filter.  A tile is BLOCK_M pixels of one phase by BLOCK_N channels, and one launch has the
tiles of all phases, those of the same place next to each other: they read the same dz, which L2 keeps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse.backends.triton import grad_plan
from resfuse.backends.triton.conv_plan import conv_problem
from resfuse.backends.triton.conv_tile import output_channels, tile_of
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
def taps_of_phase(
    phase, TAPS: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr,
    STEP: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """(first tap, number of taps) that meet the pixels of a phase; they are STEP apart.

    r DIL = phase + PAD (mod STRIDE) has solutions where gcd(DIL, STRIDE) divides the right side; with all divided by
    it, INVERSE is that of DIL modulo STEP = STRIDE / gcd.
    """
    if STRIDE == 1:
        first, count = phase * 0, phase * 0 + TAPS
    else:
        GCD: tl.constexpr = STRIDE // STEP
        shift = phase + PAD
        first = shift // GCD * INVERSE % STEP
        count = (TAPS + STEP - 1 - first) // STEP
        if GCD > 1:
            count = tl.where(shift % GCD == 0, count, 0)
    return first, count


@triton.jit
def tap_sums(
    dz_ptr, z_ptr, y_ptr, weight_ptr, mean_ptr, invstd_ptr, sum_g_ptr, sum_g_xhat_ptr, count, w_ptr,
    dz_row, h, w, inside, pack, local, channel_mask, begin, end, group,
    first_r, first_s, count_s, shift_h, shift_w, OH, OW,
    CG: tl.constexpr, K: tl.constexpr, KG: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, PACK_GROUPS: tl.constexpr, EVEN_K: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, ISOLATE: tl.constexpr,
):  # fmt: skip
    """The sums [BLOCK_M, BLOCK_N] over steps `begin` to `end` of a phase; ISOLATE: of one group of the pack alone."""
    RUN: tl.constexpr = PACK_GROUPS * KG
    STEPS: tl.constexpr = -(-RUN // BLOCK_K)
    STAGES: tl.constexpr = 1 if ISOLATE else None  # seldom run: no registers for it
    offs_k = tl.arange(0, BLOCK_K)
    run_end = tl.minimum(RUN, K - pack * RUN)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for tap in tl.range(begin // STEPS, tl.cdiv(end, STEPS), num_stages=STAGES):
        r, s = first_r + tap // count_s * STEP_H, first_s + tap % count_s * STEP_W
        down, right = (shift_h - r * DIL_H) // STRIDE_H, (shift_w - s * DIL_W) // STRIDE_W
        row_mask = inside
        if not WHOLE:
            oh, ow = h + down, w + right
            row_mask = row_mask & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW)
        dz_tap = dz_row + (down * OW + right) * K
        w_tap = (r * S + s) * CG
        if SPLIT:
            first_step, end_step = tl.maximum(begin - tap * STEPS, 0), tl.minimum(end - tap * STEPS, STEPS)
        else:
            first_step, end_step = 0, STEPS
        for step in tl.range(first_step, end_step, num_stages=STAGES):
            k = step * BLOCK_K + offs_k
            k_mask = k < run_end
            mask = row_mask[:, None]
            if not EVEN_K:
                mask = mask & k_mask[None, :]
            if ISOLATE:
                mask = mask & (k // KG == group)[None, :]
            offsets = dz_tap[:, None] + k[None, :]
            if invstd_ptr is None:
                a = tl.load(dz_ptr + offsets, mask=mask, other=0.0)
            else:
                scale, mean_g, mean, slope = grad_coefficients(
                    weight_ptr, mean_ptr, invstd_ptr, sum_g_ptr, sum_g_xhat_ptr, count, pack * RUN + k, k_mask
                )
                a = computed_grad(
                    dz_ptr, z_ptr, y_ptr, mean_ptr, offsets, mask,
                    scale[None, :], mean_g[None, :], mean[None, :], slope[None, :],
                )  # fmt: skip

            w_row = (pack * RUN + k).to(dz_row.dtype) * (R * S * CG) + w_tap
            if PACK_GROUPS > 1:  # zero off the diagonal
                diagonal = (k // KG)[:, None] == (local // CG)[None, :]
                offsets = w_row[:, None] + (local % CG)[None, :]
                b = tl.load(w_ptr + offsets, mask=diagonal & k_mask[:, None] & channel_mask[None, :], other=0.0)
            elif EVEN_K and CG % BLOCK_N == 0:
                b = tl.load(w_ptr + w_row[:, None] + local[None, :])
            else:
                offsets = w_row[:, None] + local[None, :]
                b = tl.load(w_ptr + offsets, mask=k_mask[:, None] & channel_mask[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def dgrad_kernel(
    dz_ptr, z_ptr, y_ptr, weight_ptr, mean_ptr, invstd_ptr, sum_g_ptr, sum_g_xhat_ptr, count, w_ptr, dx_ptr,
    M, H, W, OH, OW, tiles_m, part_size, split_k,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, GROUPS: tl.constexpr, PACK_GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, INDEX64: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, INVERSE_H: tl.constexpr, INVERSE_W: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """A tile of dx, or with SPLIT its part number program_id(1) of split_k, in float32.

    The main loop has the taps of the phase, and in each of them the output channels by steps of BLOCK_K.  Reads, from
    L2 but for the first time, M x K of dz per tap and tile of N, and the taps' part of w per tile of M; writes M x C.
    M is the number of pixels of a phase, part_size the number of elements of dx.
    """
    CG: tl.constexpr = C // GROUPS
    KG: tl.constexpr = K // GROUPS
    RUN: tl.constexpr = PACK_GROUPS * KG
    TILES_N: tl.constexpr = (-(-GROUPS // PACK_GROUPS)) * (-(-PACK_GROUPS * CG // BLOCK_N))
    STEPS: tl.constexpr = -(-RUN // BLOCK_K)
    EVEN_K: tl.constexpr = RUN % BLOCK_K == 0 and GROUPS % PACK_GROUPS == 0
    STRIDED: tl.constexpr = STRIDE_H > 1 or STRIDE_W > 1
    WHOLE: tl.constexpr = R == 1 and S == 1 and PAD_H == 0 and PAD_W == 0 and not STRIDED

    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, TILES_N, GROUP_M)
    pack, channels, channel_mask = output_channels(tile_n, C, GROUPS, PACK_GROUPS, BLOCK_N)
    local = channels - pack * (PACK_GROUPS * CG)

    phase = tile_m % (STRIDE_H * STRIDE_W)
    phase_h, phase_w = phase // STRIDE_W, phase % STRIDE_W
    tile_m = tile_m // (STRIDE_H * STRIDE_W)
    if INDEX64:
        tile_m = tile_m.to(tl.int64)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    phase_height, phase_width = tl.cdiv(H, STRIDE_H), tl.cdiv(W, STRIDE_W)
    image, h, w = rows // phase_width // phase_height, rows // phase_width % phase_height, rows % phase_width
    inside = rows < M
    if STRIDED:
        inside = inside & (h * STRIDE_H + phase_h < H) & (w * STRIDE_W + phase_w < W)

    first_r, count_r = taps_of_phase(phase_h, R, STRIDE_H, PAD_H, DIL_H, STEP_H, INVERSE_H)
    first_s, count_s = taps_of_phase(phase_w, S, STRIDE_W, PAD_W, DIL_W, STEP_W, INVERSE_W)
    begin, end = 0, count_r * count_s * STEPS
    if SPLIT:
        part = tl.program_id(1)
        begin, end = end * part // split_k, end * (part + 1) // split_k

    dz_row = ((image * OH + h) * OW + w) * K + pack * RUN
    acc = tap_sums(
        dz_ptr, z_ptr, y_ptr, weight_ptr, mean_ptr, invstd_ptr, sum_g_ptr, sum_g_xhat_ptr, count, w_ptr,
        dz_row, h, w, inside, pack, local, channel_mask, begin, end, 0,
        first_r, first_s, count_s, phase_h + PAD_H, phase_w + PAD_W, OH, OW,
        CG, K, KG, R, S, STRIDE_H, STRIDE_W, DIL_H, DIL_W, STEP_H, STEP_W, PACK_GROUPS, EVEN_K, WHOLE,
        BLOCK_M, BLOCK_N, BLOCK_K, SPLIT, PRECISION, False,
    )  # fmt: skip
    if PACK_GROUPS > 1:  # noqa: SIM102 (known when compiling; the other is not)
        # The zeros of a block-diagonal w make NaN of another group's NaN and infinities: one group at a time, then.
        if tl.sum((acc != acc).to(tl.int32)) > 0:
            for group in range(PACK_GROUPS):
                alone = tap_sums(
                    dz_ptr, z_ptr, y_ptr, weight_ptr, mean_ptr, invstd_ptr, sum_g_ptr, sum_g_xhat_ptr, count, w_ptr,
                    dz_row, h, w, inside, pack, local, channel_mask, begin, end, group,
                    first_r, first_s, count_s, phase_h + PAD_H, phase_w + PAD_W, OH, OW,
                    CG, K, KG, R, S, STRIDE_H, STRIDE_W, DIL_H, DIL_W, STEP_H, STEP_W, PACK_GROUPS, EVEN_K, WHOLE,
                    BLOCK_M, BLOCK_N, BLOCK_K, SPLIT, PRECISION, True,
                )  # fmt: skip
                acc = tl.where((local // CG == group)[None, :], alone, acc)

    pixels = (image * H + h * STRIDE_H + phase_h) * W + w * STRIDE_W + phase_w
    if SPLIT:
        dx_ptr += tl.program_id(1).to(tl.int64) * part_size
    offsets = pixels[:, None] * C + channels[None, :]
    tl.store(dx_ptr + offsets, acc.to(dx_ptr.dtype.element_ty), mask=inside[:, None] & channel_mask[None, :])


def dgrad(dz: Grad, w: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int, dx: Tensor) -> None:
    """dx in one launch, or two where the sum is split.  All in dense channels_last memory, of one dtype."""
    problem = conv_problem("dgrad", dx, w, stride, padding, dilation, groups)
    config = grad_plan.configuration(problem, dx.device, fused=isinstance(dz, BatchNormGrad))
    plan = grad_plan.plan(problem, config)
    split = config.split_k > 1
    out = torch.empty((config.split_k, dx.numel()), dtype=torch.float32, device=dx.device) if split else dx
    launch(
        dgrad_kernel, (plan.programs, config.split_k), *arguments(dz), w, out,
        plan.pixels, problem.h, problem.w, problem.oh, problem.ow, plan.tiles_m, dx.numel(), config.split_k,
        **plan.constants, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if split:
        sum_splits(out, dx)
