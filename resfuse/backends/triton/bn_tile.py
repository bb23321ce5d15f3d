"""Tiles of an activation in NHWC or NCHW memory, for the batch norm kernels.

All kernels cut a tensor into tiles of BLOCK_M positions x BLOCK_N channels.  `images` and `positions` describe the
memory: NHWC is one image of N*H*W positions, each with its channels side by side; NCHW is N images, each channel with
its H*W positions side by side.  Tiles (TILE: `plan.BatchNormTile`) are counted by positions first, images second:

                 channels                             positions
              +----+----+----+                     +----+----+--
    positions | t0 |    |    |            image 0  | t0 | t2 |      (one channel block of two images)
              +----+----+----+                     +----+----+--
              | t1 |    |    |            image 1  | t1 | t3 |
              +----+----+----+                     +----+----+--

A reduction gives each program one block of channels and a part of the tiles, a row of which is one element of every
thread's own: the loop over tiles needs no communication.
"""

import triton
import triton.language as tl

from resfuse.backends.triton.reduce import affine, merge_parts, merge_rows, store_part

LOADS_AHEAD = tl.constexpr(32)  # bits: tiles of 2-byte elements are loaded in pairs, so that as much is under way


@triton.jit
def tile_at(t, images, positions, channels, channel, TILE: tl.constexpr):
    """(offset of the first element, offsets of all from there, mask) of tile t from `channel` on."""
    BLOCK_M: tl.constexpr = TILE.block_m
    row, column = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, TILE.block_n)[None, :]
    position = (t // images).to(tl.int64) * BLOCK_M
    if TILE.channels_last:
        offset = position * channels + channel
        offsets = row * channels + column
    else:
        offset = ((t % images).to(tl.int64) * channels + channel) * positions + position
        offsets = column * positions + row
    rows = tl.minimum(positions - position, BLOCK_M).to(tl.int32)
    return offset, offsets, (row < rows) & (column < channels - channel)


@triton.jit
def part_of(images, positions, channels, tiles_per_part, TILE: tl.constexpr):
    """This program's (part, first channel, first tile, number of tiles)."""
    blocks = tl.cdiv(channels, TILE.block_n)
    part = tl.program_id(0) // blocks
    first = part * tiles_per_part
    count = tl.minimum(tl.cdiv(positions, TILE.block_m) * images - first, tiles_per_part)
    return part, tl.program_id(0) % blocks * TILE.block_n, first, count


@triton.jit
def masked_gradient(dy_ptr, y_ptr, x, mean, scale, bias, offset, offsets, mask, RELU: tl.constexpr):
    """g = dy where not y <= 0, else 0, with the y that forward made of x where y_ptr is None; dy without a ReLU."""
    g = tl.load(dy_ptr + offset + offsets, mask, other=0.0).to(tl.float32)
    if RELU:
        if y_ptr is not None:
            y = tl.load(y_ptr + offset + offsets, mask, other=0.0)
        else:  # what is too small for the dtype is zero
            y = affine(x, mean, scale, bias).to(dy_ptr.dtype.element_ty)
        g = tl.where(y.to(tl.float32) <= 0, 0.0, g)
    return g


@triton.jit
def store(ptr, offset, offsets, value, mask):
    tl.store(ptr + offset + offsets, value.to(ptr.dtype.element_ty), mask)


@triton.jit
def activate_and_store(a, residual_ptr, y_ptr, offset, offsets, mask, RELU: tl.constexpr):
    """y = act(a [+ residual]), rounded once; NaN stays NaN."""
    if residual_ptr is not None:
        a += tl.load(residual_ptr + offset + offsets, mask, other=0.0).to(tl.float32)
    if RELU:
        a = tl.where(a <= 0, 0.0, a)
    store(y_ptr, offset, offsets, a, mask)


@triton.jit
def _value(x_ptr, image, position, positions, channels, column, mask, TILE: tl.constexpr):
    """One position of an image, for a vector of channels, in float32."""
    plane, position = tl.cast(image, tl.int64) * channels, tl.cast(position, tl.int64)
    if TILE.channels_last:
        offsets = position * channels + column
    else:
        offsets = (plane + column) * positions + position
    return tl.load(x_ptr + offsets, mask, other=0.0).to(tl.float32)


@triton.jit
def pivot_of(x_ptr, images, positions, channels, channel, TILE: tl.constexpr):
    """The median of three of a channel's values, the same for all parts.

    Deviations from it are as small as those from the mean, and, where the mean is large, exact.  A single outlier is
    never chosen; where two are, the variance is as large as they are.
    """
    column = channel + tl.arange(0, TILE.block_n)
    mask = column < channels
    a = _value(x_ptr, 0, 0, positions, channels, column, mask, TILE)
    b = _value(x_ptr, images // 2, positions // 2, positions, channels, column, mask, TILE)
    c = _value(x_ptr, images - 1, positions - 1, positions, channels, column, mask, TILE)
    return tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))


@triton.jit
def part_statistics(x_ptr, pivot, workspace_ptr, images, positions, channels, tiles_per_part, TILE: tl.constexpr):
    """Write (mean, M2) of this program's part to the workspace, the mean as its distance to the pivot.

    Each element of the tile is a Welford accumulator of its own: mean += d / n, M2 += d (u - mean), with u = x - pivot
    and d = u - old mean.  The n-th tile is everyone's n-th value: rows that do not exist come last.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    part, channel, first, count = part_of(images, positions, channels, tiles_per_part, TILE)
    mean, m2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.range(count, loop_unroll_factor=LOADS_AHEAD // x_ptr.dtype.element_ty.primitive_bitwidth):
        offset, offsets, mask = tile_at(first + i, images, positions, channels, channel, TILE)
        u = tl.load(x_ptr + offset + offsets, mask, other=0.0).to(tl.float32) - pivot[None, :]
        d = tl.where(mask, u - mean, 0.0)
        mean += d * (1.0 / (i + 1))
        m2 += d * (u - mean)
    full = tl.minimum(tl.maximum((positions // BLOCK_M) * images - first, 0), count)
    row = tl.arange(0, BLOCK_M)[:, None]
    counts = (full + tl.where(row < positions % BLOCK_M, count - full, 0)).to(tl.float32)
    _, part_mean, part_m2 = merge_rows(mean, m2, counts)
    column = channel + tl.arange(0, BLOCK_N)
    store_part(workspace_ptr, part, channels, column, column < channels, part_mean, part_m2)


@triton.jit
def whole_statistics(workspace_ptr, images, positions, channels, channel, parts, tiles_per_part, TILE: tl.constexpr):
    """(count, mean, M2) of a block of channels, from what `part_statistics` wrote."""
    column = channel + tl.arange(0, TILE.block_n)
    tiles, full_tiles = tl.cdiv(positions, TILE.block_m) * images, (positions // TILE.block_m) * images
    return merge_parts(
        workspace_ptr, parts, channels, column, column < channels, tiles_per_part, tiles, full_tiles,
        positions % TILE.block_m, TILE.block_m, TILE.block_n, TILE.block_parts,
    )  # fmt: skip
