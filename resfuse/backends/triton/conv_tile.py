"""The tile of an implicit GEMM over NHWC memory that every forward convolution shares: main loop and epilogue.

    z[m, n] = sum over (r, s, c) of x[image, oh stride_h - pad_h + r dil_h, ow stride_w - pad_w + s dil_w, c]
                                    w[n, r, s, c]

with m = (image, oh, ow) a pixel of the output and n one of its channels.  A step of the loop takes BLOCK_K neighbours
in memory out of a run of RUN elements, which is all that one filter tap reads of a pixel:

    ordinary         the channels of the group                                        RUN = C / GROUPS
    pack_row         the taps of a filter row and their channels, as 7 x 3 of a stem  RUN = S C
    pack_groups > 1  the channels of neighbouring groups, with a block-diagonal w     RUN = pack_groups C / GROUPS

CONV is `plan.ConvConstants`: shape, tile and packing.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(index, tiles_m, CONV: tl.constexpr):
    """(tile of M, tile of N): group_m tiles of M share a tile of N before the next, so that both stay in L2."""
    if CONV.tiles_n == 1:
        return index, index * 0
    band = index // (CONV.group_m * CONV.tiles_n)
    first = band * CONV.group_m
    height = tl.minimum(tiles_m - first, CONV.group_m)
    within = index - first * CONV.tiles_n
    return first + within % height, within // height


@triton.jit
def output_channels(tile_n, CONV: tl.constexpr):
    """(pack of groups, its channels' numbers, which of them exist) of a tile of N; no tile spans two packs."""
    BLOCK_N: tl.constexpr = CONV.block_n
    WIDTH: tl.constexpr = CONV.k // CONV.groups * CONV.pack_groups
    PER_PACK: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    pack = tile_n // PER_PACK
    local = (tile_n - pack * PER_PACK) * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = pack * WIDTH + local
    return pack, channels, (local < WIDTH) & (channels < CONV.k)


@triton.jit
def output_pixels(tile_m, CONV: tl.constexpr):
    """Numbers of the BLOCK_M output pixels of a tile of M."""
    if CONV.index64:
        tile_m = tile_m.to(tl.int64)
    return tile_m * CONV.block_m + tl.arange(0, CONV.block_m)


@triton.jit
def rounded_to_tf32(x):
    """To 10 bits of fraction, ties away from zero: tensor cores cut off the other 13, and so lose twice as much."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, (bits + 0x1000) & -0x2000, bits).to(tl.float32, bitcast=True)


@triton.jit
def tap_sums(
    x_ptr, w_ptr, pixels, pack, channels, channel_mask, split, group, M, H, W, OH, OW,
    CONV: tl.constexpr, ISOLATE: tl.constexpr,
):  # fmt: skip
    """The sums [BLOCK_M, BLOCK_N], of what `group` of the pack contributes or (not ISOLATE) all of them."""
    SPLIT_K: tl.constexpr = CONV.split_k
    C: tl.constexpr = CONV.c
    S: tl.constexpr = CONV.s
    BLOCK_M: tl.constexpr = CONV.block_m
    BLOCK_N: tl.constexpr = CONV.block_n
    BLOCK_K: tl.constexpr = CONV.block_k
    PACK_GROUPS: tl.constexpr = CONV.pack_groups
    PACK_ROW: tl.constexpr = CONV.pack_row
    CG: tl.constexpr = C // CONV.groups
    KG: tl.constexpr = CONV.k // CONV.groups
    RUN: tl.constexpr = S * C if PACK_ROW else PACK_GROUPS * CG
    TAPS_W: tl.constexpr = 1 if PACK_ROW else S
    STEPS: tl.constexpr = (RUN + BLOCK_K - 1) // BLOCK_K
    STEPS_OF_SPLIT: tl.constexpr = (STEPS + SPLIT_K - 1) // SPLIT_K
    EVEN_RUN: tl.constexpr = RUN % (BLOCK_K * SPLIT_K) == 0 and CONV.groups % PACK_GROUPS == 0
    EVEN_N: tl.constexpr = (KG * PACK_GROUPS) % BLOCK_N == 0 and CONV.groups % PACK_GROUPS == 0
    PADDED: tl.constexpr = CONV.pad_h > 0 or CONV.pad_w > 0
    STRIDED: tl.constexpr = CONV.stride_h > 1 or CONV.stride_w > 1
    STAGES: tl.constexpr = 1 if ISOLATE else None  # seldom run: no registers for it

    offs_k = tl.arange(0, BLOCK_K)
    run_end = tl.minimum(RUN, C - pack * RUN) if CONV.groups > 1 else RUN
    in_range = pixels < M
    if CONV.r == 1 and S == 1 and not STRIDED and not PADDED:
        ih0, iw0 = pixels, pixels  # not used
        x_pixel = pixels
    else:
        ih0 = pixels // OW % OH * CONV.stride_h - CONV.pad_h
        iw0 = pixels % OW * CONV.stride_w - CONV.pad_w
        x_pixel = (pixels // OW // OH * H + ih0) * W + iw0  # of the first tap; outside of the image if padded
    w_row = channels.to(pixels.dtype) * (CONV.r * S * CG)
    group_of_channel = (channels - pack * (PACK_GROUPS * KG)) // KG

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r in tl.range(CONV.r, num_stages=STAGES):
        for s in tl.range(TAPS_W, num_stages=STAGES):
            row_mask = in_range
            if PADDED:
                ih = ih0 + r * CONV.dil_h
                row_mask = row_mask & (ih >= 0) & (ih < H)
                if not PACK_ROW:
                    iw = iw0 + s * CONV.dil_w
                    row_mask = row_mask & (iw >= 0) & (iw < W)
            x_tap = (x_pixel + (r * CONV.dil_h * W + s * CONV.dil_w)) * C + pack * RUN
            w_tap = w_row + (r * TAPS_W + s) * (S * CG // TAPS_W)
            for step in tl.range(STEPS_OF_SPLIT, num_stages=STAGES):
                k = (split * STEPS_OF_SPLIT + step) * BLOCK_K + offs_k
                x_mask = row_mask[:, None]
                if PACK_ROW and PADDED:
                    iw = iw0[:, None] + (k // C)[None, :]
                    x_mask = x_mask & (iw >= 0) & (iw < W)
                if not EVEN_RUN:
                    x_mask = x_mask & (k < run_end)[None, :]
                if ISOLATE:
                    x_mask = x_mask & (k // CG == group)[None, :]
                a = tl.load(x_ptr + (x_tap[:, None] + k[None, :]), mask=x_mask, other=0.0)

                w_k = k % CG if PACK_GROUPS > 1 else k
                w_ptrs = w_ptr + (w_tap[None, :] + w_k[:, None])
                if PACK_GROUPS > 1:  # zero off the diagonal, and where k is beyond the run: no channel is of that group
                    diagonal = (k // CG)[:, None] == group_of_channel[None, :]
                    b = tl.load(w_ptrs, mask=diagonal & channel_mask[None, :], other=0.0)
                elif EVEN_RUN and EVEN_N:
                    b = tl.load(w_ptrs)
                elif EVEN_RUN:
                    b = tl.load(w_ptrs, mask=channel_mask[None, :], other=0.0)
                else:
                    b = tl.load(w_ptrs, mask=channel_mask[None, :] & (k < RUN)[:, None], other=0.0)
                if CONV.precision == "tf32":
                    a, b = rounded_to_tf32(a), rounded_to_tf32(b)
                acc = tl.dot(a, b, acc, input_precision=CONV.precision)
    return acc


@triton.jit
def tile_sums(x_ptr, w_ptr, pixels, pack, channels, channel_mask, split, M, H, W, OH, OW, CONV: tl.constexpr):
    """The float32 sums [BLOCK_M, BLOCK_N]; of split_k programs per tile each takes its own part of every run.

    Reads M x RUN of x per tap and tile of N (from L2 but for the first), and w once per tile of M.  The loops are
    nested, not flattened: one over r*s*c has been miscompiled with 8 warps (pytorch issue 173068).

    The zeros of a block-diagonal w make NaN of another group's NaN and infinities.  So, seeing NaN, the tile is
    computed again with one group at a time.
    """
    acc = tap_sums(x_ptr, w_ptr, pixels, pack, channels, channel_mask, split, 0, M, H, W, OH, OW, CONV, False)
    if CONV.pack_groups > 1:  # noqa: SIM102 (known when compiling; the other is not)
        if tl.sum((acc != acc).to(tl.int32)) > 0:
            group_of_channel = channels // (CONV.k // CONV.groups) - pack * CONV.pack_groups
            for group in range(CONV.pack_groups):
                alone = tap_sums(
                    x_ptr, w_ptr, pixels, pack, channels, channel_mask, split, group, M, H, W, OH, OW,
                    CONV, True,
                )  # fmt: skip
                acc = tl.where((group_of_channel == group)[None, :], alone, acc)
    return acc


@triton.jit
def vector(ptr, channels, mask, DEFAULT: tl.constexpr):
    """A vector over the channels of a tile, in float32, loaded once; the default where the pointer is None.

    Triton repeats a load of fewer elements than there are threads in the layout of the accumulators, where each thread
    has many channels: 64 loads for four vectors.  So this one has more elements, all but a row of them masked.
    """
    if ptr is None:
        loaded = tl.full(channels.shape, DEFAULT, tl.float32)
    else:
        row = tl.arange(0, 512 // channels.shape[0])[:, None]
        rows = tl.load(ptr + (channels[None, :] + 0 * row), mask=mask[None, :] & (row == 0), other=0.0)
        loaded = tl.sum(rows.to(tl.float32), axis=0)
    return loaded


@triton.jit
def activate_and_store(y, residual_ptr, out_ptr, pixels, channels, M, mask, K: tl.constexpr, RELU: tl.constexpr):
    """out = act(y [+ residual]), rounded once; NaN stays NaN."""
    offsets = pixels[:, None] * K + channels[None, :]
    inside = (pixels < M)[:, None] & mask[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        y = tl.where(y <= 0, 0.0, y)
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=inside)
