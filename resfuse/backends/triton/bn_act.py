"""bn_act: batch norm, residual and activation, over NHWC or NCHW memory as it lies.

All kernels cut a tensor into tiles of BLOCK_M positions x BLOCK_N channels.  `images` and `positions` describe the
memory: NHWC is one image of N*H*W positions, each with its channels side by side; NCHW is N images, each channel with
its H*W positions side by side.  Tiles are counted blocks of positions first, images second:

                 channels                             positions
              +----+----+----+                     +----+----+--
    positions | t0 |    |    |            image 0  | t0 | t2 |      (one channel block of two images)
              +----+----+----+                     +----+----+--
              | t1 |    |    |            image 1  | t1 | t3 |
              +----+----+----+                     +----+----+--

A reduction gives each program one block of channels and a part of the tiles, a row of which is one element of every
thread's own: the loop over tiles needs no communication.  The grid is as large as is resident, and the programs meet
at a grid barrier (PHASE 0) before they use the sums; PHASE 1 and 2 are what lies before and after it, for two launches.

x, residual, y, dy, dx: float32, bfloat16 or float16, all of one memory order.  Arithmetic and statistics: float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse.backends.triton import bn_plan
from resfuse.backends.triton.barrier import grid_barrier
from resfuse.backends.triton.epilogue import activate, per_channel
from resfuse.backends.triton.launch import barrier, launch, phases, properties, resident_programs
from resfuse.backends.triton.welford import (
    inverse_deviation,
    merge_parts,
    merge_rows,
    store_part,
    sum_parts,
    update_running,
)

LOADS_AHEAD = tl.constexpr(32)  # bits: tiles of 2-byte elements are loaded in pairs, to have as much under way


@triton.jit
def _tile(
    t, images, positions, channels, channel,
    CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of tile t from `channel` on: the offset of its first element, those of the others to it, and which exist."""
    row, column = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    position = (t // images).to(tl.int64) * BLOCK_M
    if CHANNELS_LAST:
        offset = position * channels + channel
        offsets = row * channels + column
    else:
        offset = ((t % images).to(tl.int64) * channels + channel) * positions + position
        offsets = column * positions + row
    rows = tl.minimum(positions - position, BLOCK_M).to(tl.int32)
    return offset, offsets, (row < rows) & (column < channels - channel)


@triton.jit
def _part(images, positions, channels, tiles_per_part, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's part, first channel, first tile and number of tiles; and the number of all tiles."""
    blocks = tl.cdiv(channels, BLOCK_N)
    tiles = tl.cdiv(positions, BLOCK_M) * images
    part = tl.program_id(0) // blocks
    first = part * tiles_per_part
    return part, tl.program_id(0) % blocks * BLOCK_N, first, tl.minimum(tiles - first, tiles_per_part), tiles


@triton.jit
def _masked_gradient(dy_ptr, y_ptr, offset, offsets, mask):
    """g = dy where not y <= 0, else 0; dy without a ReLU (y_ptr None)."""
    g = tl.load(dy_ptr + offset + offsets, mask, other=0.0).to(tl.float32)
    if y_ptr is not None:
        g = tl.where(tl.load(y_ptr + offset + offsets, mask, other=0.0).to(tl.float32) <= 0, 0.0, g)
    return g


@triton.jit
def _store(ptr, offset, offsets, value, mask):
    tl.store(ptr + offset + offsets, value.to(ptr.dtype.element_ty), mask)


@triton.jit
def _value(x_ptr, image, position, positions, channels, column, mask, CHANNELS_LAST: tl.constexpr):
    """One position of an image, for a vector of channels, in float32."""
    plane, position = tl.cast(image, tl.int64) * channels, tl.cast(position, tl.int64)
    if CHANNELS_LAST:
        offsets = position * channels + column
    else:
        offsets = (plane + column) * positions + position
    return tl.load(x_ptr + offsets, mask, other=0.0).to(tl.float32)


@triton.jit
def _pivot(x_ptr, images, positions, channels, channel, CHANNELS_LAST: tl.constexpr, BLOCK_N: tl.constexpr):
    """The median of three of a channel's values, the same for all parts.

    Deviations from it are as small as those from the mean, and, where the mean is large, exact.  A single outlier is
    never chosen; where two are, the variance is as large as they are.
    """
    column = channel + tl.arange(0, BLOCK_N)
    mask = column < channels
    a = _value(x_ptr, 0, 0, positions, channels, column, mask, CHANNELS_LAST)
    b = _value(x_ptr, images // 2, positions // 2, positions, channels, column, mask, CHANNELS_LAST)
    c = _value(x_ptr, images - 1, positions - 1, positions, channels, column, mask, CHANNELS_LAST)
    return tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))


@triton.jit
def _part_statistics(
    x_ptr, pivot, workspace_ptr, images, positions, channels, tiles_per_part,
    CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write (mean, M2) of this program's part to the workspace, the mean as its distance to the pivot.

    Each element of the tile is a Welford accumulator of its own: mean += d / n, M2 += d (u - mean), with u = x - pivot
    and d = u - old mean.  The n-th tile is everyone's n-th value: rows that are not there come last.
    """
    part, channel, first, count, _ = _part(images, positions, channels, tiles_per_part, BLOCK_M, BLOCK_N)
    mean, m2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.range(count, loop_unroll_factor=LOADS_AHEAD // x_ptr.dtype.element_ty.primitive_bitwidth):
        offset, offsets, mask = _tile(first + i, images, positions, channels, channel, CHANNELS_LAST, BLOCK_M, BLOCK_N)
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
def _whole_statistics(
    workspace_ptr, images, positions, channels, channel, parts, tiles_per_part, tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """(count, mean, M2) of a block of channels, from what `_part_statistics` wrote."""
    column = channel + tl.arange(0, BLOCK_N)
    return merge_parts(
        workspace_ptr, parts, channels, column, column < channels, tiles_per_part, tiles,
        (positions // BLOCK_M) * images, positions % BLOCK_M, BLOCK_M, BLOCK_N, BLOCK_PARTS,
    )  # fmt: skip


@triton.jit
def bn_statistics_kernel(
    x_ptr, mean_ptr, m2_ptr, workspace_ptr, barrier_ptr, images, positions, channels, parts, tiles_per_part,
    CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    PHASE: tl.constexpr,
):  # fmt: skip
    """mean = sum x / n, M2 = sum (x - mean)^2 per channel.  Reads x once."""
    part, channel, _, _, tiles = _part(images, positions, channels, tiles_per_part, BLOCK_M, BLOCK_N)
    pivot = _pivot(x_ptr, images, positions, channels, channel, CHANNELS_LAST, BLOCK_N)
    if PHASE != 2:
        _part_statistics(
            x_ptr, pivot, workspace_ptr, images, positions, channels, tiles_per_part, CHANNELS_LAST, BLOCK_M, BLOCK_N
        )
    if PHASE == 0:
        grid_barrier(barrier_ptr, tl.num_programs(0))
    if PHASE != 1 and part == 0:
        _count, mean, m2 = _whole_statistics(
            workspace_ptr, images, positions, channels, channel, parts, tiles_per_part, tiles,
            BLOCK_M, BLOCK_N, BLOCK_PARTS,
        )  # fmt: skip
        column = channel + tl.arange(0, BLOCK_N)
        tl.store(mean_ptr + column, pivot + mean, column < channels)
        tl.store(m2_ptr + column, m2, column < channels)


@triton.jit
def bn_train_forward_kernel(
    x_ptr, residual_ptr, y_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, mean_ptr, invstd_ptr,
    workspace_ptr, barrier_ptr, images, positions, channels, parts, tiles_per_part, momentum, eps,
    RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_PARTS: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """y = act(weight (x - mean) invstd + bias [+ residual]), by the statistics of x itself.

    Reads x twice (the second time backwards: what was read last is still in L2) and the residual, writes y.
    """
    part, channel, first, tile_count, tiles = _part(images, positions, channels, tiles_per_part, BLOCK_M, BLOCK_N)
    pivot = _pivot(x_ptr, images, positions, channels, channel, CHANNELS_LAST, BLOCK_N)
    if PHASE != 2:
        _part_statistics(
            x_ptr, pivot, workspace_ptr, images, positions, channels, tiles_per_part, CHANNELS_LAST, BLOCK_M, BLOCK_N
        )
    if PHASE == 0:
        grid_barrier(barrier_ptr, tl.num_programs(0))
    if PHASE != 1:
        column = channel + tl.arange(0, BLOCK_N)
        there = column < channels
        count, mean, m2 = _whole_statistics(
            workspace_ptr, images, positions, channels, channel, parts, tiles_per_part, tiles,
            BLOCK_M, BLOCK_N, BLOCK_PARTS,
        )  # fmt: skip
        invstd = inverse_deviation(m2 / count, eps)
        if part == 0:
            tl.store(mean_ptr + column, pivot + mean, there)
            tl.store(invstd_ptr + column, invstd, there)
            update_running(running_mean_ptr, running_var_ptr, column, there, pivot + mean, m2, count, momentum)
        scale = invstd * per_channel(weight_ptr, column, there, 1.0)
        bias = per_channel(bias_ptr, column, there, 0.0)
        for i in tl.range(tile_count, loop_unroll_factor=LOADS_AHEAD // x_ptr.dtype.element_ty.primitive_bitwidth):
            offset, offsets, mask = _tile(
                first + tile_count - 1 - i, images, positions, channels, channel, CHANNELS_LAST, BLOCK_M, BLOCK_N
            )
            u = tl.load(x_ptr + offset + offsets, mask, other=0.0).to(tl.float32) - pivot[None, :]
            a = (u - mean[None, :]) * scale[None, :] + bias[None, :]
            if residual_ptr is not None:
                a += tl.load(residual_ptr + offset + offsets, mask, other=0.0).to(tl.float32)
            _store(y_ptr, offset, offsets, activate(a, RELU), mask)


@triton.jit
def bn_apply_kernel(
    x_ptr, residual_ptr, y_ptr, mean_ptr, spread_ptr, weight_ptr, bias_ptr, images, positions, channels, eps,
    VARIANCE: tl.constexpr, RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = act(weight (x - mean) invstd + bias [+ residual]), by given statistics; a tile per program.

    `spread` is the variance (VARIANCE) or invstd.  Reads x and the residual, writes y.
    """
    blocks = tl.cdiv(channels, BLOCK_N)
    channel = tl.program_id(0) % blocks * BLOCK_N
    column = channel + tl.arange(0, BLOCK_N)
    there = column < channels
    mean, invstd = per_channel(mean_ptr, column, there, 0.0), per_channel(spread_ptr, column, there, 1.0)
    if VARIANCE:
        invstd = inverse_deviation(invstd, eps)
    scale = invstd * per_channel(weight_ptr, column, there, 1.0)
    bias = per_channel(bias_ptr, column, there, 0.0)
    offset, offsets, mask = _tile(
        tl.program_id(0) // blocks, images, positions, channels, channel, CHANNELS_LAST, BLOCK_M, BLOCK_N
    )
    x = tl.load(x_ptr + offset + offsets, mask, other=0.0).to(tl.float32)
    a = (x - mean[None, :]) * scale[None, :] + bias[None, :]
    if residual_ptr is not None:
        a += tl.load(residual_ptr + offset + offsets, mask, other=0.0).to(tl.float32)
    _store(y_ptr, offset, offsets, activate(a, RELU), mask)


@triton.jit
def bn_backward_kernel(
    dy_ptr, x_ptr, y_ptr, weight_ptr, mean_ptr, invstd_ptr, dx_ptr, dresidual_ptr, sum_g_ptr, sum_g_xhat_ptr,
    workspace_ptr, barrier_ptr, images, positions, channels, parts, tiles_per_part, count,
    BATCH_STATISTICS: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_PARTS: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """With g = dy [not y <= 0] and xhat = (x - mean) invstd: sum g, sum g xhat, dresidual = g, and

        dx = weight invstd (g - sum g / count - xhat sum g xhat / count)     with BATCH_STATISTICS
        dx = weight invstd g                                                 without

    y, dx and dresidual may be None.  Reads dy, x and y, and once more (or dresidual for dy and y) where dx needs the
    sums; writes dx and dresidual.
    """
    part, channel, first, tile_count, _ = _part(images, positions, channels, tiles_per_part, BLOCK_M, BLOCK_N)
    column = channel + tl.arange(0, BLOCK_N)
    there = column < channels
    mean, invstd = per_channel(mean_ptr, column, there, 0.0), per_channel(invstd_ptr, column, there, 0.0)
    scale = invstd * per_channel(weight_ptr, column, there, 1.0)
    if PHASE != 2:
        tile_g, tile_g_centred = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in range(tile_count):
            offset, offsets, mask = _tile(
                first + i, images, positions, channels, channel, CHANNELS_LAST, BLOCK_M, BLOCK_N
            )
            g = _masked_gradient(dy_ptr, y_ptr, offset, offsets, mask)
            x = tl.load(x_ptr + offset + offsets, mask, other=0.0).to(tl.float32)
            tile_g += g
            tile_g_centred += tl.where(mask, g * (x - mean[None, :]), 0.0)
            if dresidual_ptr is not None:
                _store(dresidual_ptr, offset, offsets, g, mask)
            if dx_ptr is not None and not BATCH_STATISTICS:
                _store(dx_ptr, offset, offsets, g * scale[None, :], mask)
        part_g, part_g_xhat = tl.sum(tile_g, axis=0), tl.sum(tile_g_centred, axis=0) * invstd
        store_part(workspace_ptr, part, channels, column, there, part_g, part_g_xhat)
    if PHASE == 0:
        grid_barrier(barrier_ptr, tl.num_programs(0))
    if PHASE != 1:
        if dx_ptr is not None and BATCH_STATISTICS:
            sum_g, sum_g_xhat = sum_parts(workspace_ptr, parts, channels, column, there, BLOCK_N, BLOCK_PARTS)
            if part == 0:
                tl.store(sum_g_ptr + column, sum_g, there)
                tl.store(sum_g_xhat_ptr + column, sum_g_xhat, there)
            shift, slope = sum_g / count, sum_g_xhat / count * invstd
            for i in range(tile_count):
                offset, offsets, mask = _tile(
                    first + tile_count - 1 - i, images, positions, channels, channel, CHANNELS_LAST, BLOCK_M, BLOCK_N
                )
                if dresidual_ptr is not None:
                    g = tl.load(dresidual_ptr + offset + offsets, mask, other=0.0).to(tl.float32)
                else:
                    g = _masked_gradient(dy_ptr, y_ptr, offset, offsets, mask)
                x = tl.load(x_ptr + offset + offsets, mask, other=0.0).to(tl.float32)
                dx = scale[None, :] * (g - shift[None, :] - (x - mean[None, :]) * slope[None, :])
                _store(dx_ptr, offset, offsets, dx, mask)
        elif part == 0:
            sum_g, sum_g_xhat = sum_parts(workspace_ptr, parts, channels, column, there, BLOCK_N, BLOCK_PARTS)
            tl.store(sum_g_ptr + column, sum_g, there)
            tl.store(sum_g_xhat_ptr + column, sum_g_xhat, there)


@triton.jit
def bn_backward_apply_kernel(
    dy_ptr, x_ptr, y_ptr, weight_ptr, mean_ptr, invstd_ptr, sum_g_ptr, sum_g_xhat_ptr, dx_ptr,
    images, positions, channels, count,
    BATCH_STATISTICS: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx as in `bn_backward_kernel`, by given sums; a tile per program.  Reads dy, x and y, writes dx."""
    blocks = tl.cdiv(channels, BLOCK_N)
    channel = tl.program_id(0) % blocks * BLOCK_N
    column = channel + tl.arange(0, BLOCK_N)
    there = column < channels
    mean, invstd = per_channel(mean_ptr, column, there, 0.0), per_channel(invstd_ptr, column, there, 0.0)
    scale = invstd * per_channel(weight_ptr, column, there, 1.0)
    offset, offsets, mask = _tile(
        tl.program_id(0) // blocks, images, positions, channels, channel, CHANNELS_LAST, BLOCK_M, BLOCK_N
    )
    g = _masked_gradient(dy_ptr, y_ptr, offset, offsets, mask)
    if BATCH_STATISTICS:
        shift = per_channel(sum_g_ptr, column, there, 0.0) / count
        slope = per_channel(sum_g_xhat_ptr, column, there, 0.0) / count * invstd
        x = tl.load(x_ptr + offset + offsets, mask, other=0.0).to(tl.float32)
        g = g - shift[None, :] - (x - mean[None, :]) * slope[None, :]
    _store(dx_ptr, offset, offsets, scale[None, :] * g, mask)


def train_forward(
    x: Tensor,
    residual: Tensor | None,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    momentum: float,
    eps: float,
    relu: bool,
    *,
    launches: int | None = None,
) -> None:
    """Fill y, mean and invstd, and update the running statistics.  x, residual and y are dense, in one memory order.

    `launches` is 1 (cooperative) or 2; None takes one launch where the grid is resident.
    """
    pointers = (x, residual, y, weight, bias, running_mean, running_var, mean, invstd)
    _reduce(bn_train_forward_kernel, x, pointers, (float(momentum), float(eps)), launches, RELU=relu)


def apply(
    x: Tensor,
    residual: Tensor | None,
    y: Tensor,
    mean: Tensor,
    spread: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    relu: bool,
) -> None:
    """Fill y by given statistics; `spread` is the variance, or, where eps is None, already invstd."""
    cut = bn_plan.elementwise(x)
    launch(
        bn_apply_kernel, (cut.tiles * cut.channel_blocks,),
        x, residual, y, mean, spread, weight, bias, cut.images, cut.positions, cut.channels,
        float(eps or 0),
        VARIANCE=eps is not None, RELU=relu, **cut.constants, num_warps=cut.num_warps,
    )  # fmt: skip


def statistics(x: Tensor, mean: Tensor, m2: Tensor, *, launches: int | None = None) -> None:
    """Fill mean and m2, float32."""
    _reduce(bn_statistics_kernel, x, (x, mean, m2), (), launches)


def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    dx: Tensor | None,
    dresidual: Tensor | None,
    sum_g: Tensor,
    sum_g_xhat: Tensor,
    batch_statistics: bool,
    *,
    launches: int | None = None,
) -> None:
    """Fill the float32 sums, and dx and dresidual where they are given."""
    pointers = (dy, x, y, weight, mean, invstd, dx, dresidual, sum_g, sum_g_xhat)
    count = x.numel() // x.shape[1]
    _reduce(bn_backward_kernel, x, pointers, (float(count),), launches, BATCH_STATISTICS=batch_statistics)


def backward_apply(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    sum_g: Tensor,
    sum_g_xhat: Tensor,
    dx: Tensor,
    count: int | None,
) -> None:
    """Fill dx by given sums over `count` values; None: by running statistics."""
    cut = bn_plan.elementwise(x)
    launch(
        bn_backward_apply_kernel, (cut.tiles * cut.channel_blocks,),
        dy, x, y, weight, mean, invstd, sum_g, sum_g_xhat, dx, cut.images, cut.positions, cut.channels,
        float(count or 1), BATCH_STATISTICS=count is not None, **cut.constants, num_warps=cut.num_warps,
    )  # fmt: skip


def _reduce(
    kernel: Any, x: Tensor, pointers: tuple[Any, ...], scalars: tuple[float, ...], launches: int | None, **flags: bool
) -> None:
    cut = bn_plan.reduction(x)
    resident = resident_programs(properties(x.device), cut.num_warps)
    workspace = torch.empty((cut.parts, 2, cut.channels), dtype=torch.float32, device=x.device)
    for phase in phases(launches, cut.programs <= resident):
        launch(
            kernel, (cut.programs,),
            *pointers, workspace, None if phase else barrier(x.device), cut.images, cut.positions, cut.channels,
            cut.parts, cut.tiles_per_part, *scalars,
            **flags, **cut.constants, BLOCK_PARTS=cut.block_parts, PHASE=phase,
            num_warps=cut.num_warps, cooperative=phase == 0,
        )  # fmt: skip
