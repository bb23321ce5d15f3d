"""bn_act: batch norm, residual and activation, over NHWC or NCHW memory as it lies (bn_tile.py has the tiles).

The grid of a reduction is as large as is resident, and the programs meet at a grid barrier (PHASE 0) before they use
the sums; PHASE 1 and 2 are the parts before and after it, for two launches.

x, residual, y, dy, dx: float32, bfloat16 or float16, all of one memory order.  Arithmetic and statistics: float32.
`resfuse.backends.reference` specifies the functions below the kernels.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse.backends.triton import bn_tile, reduce
from resfuse.backends.triton.launch import in_phases, launch, properties, unstrided
from resfuse.backends.triton.plan import ELEMENTWISE, REDUCTION, batch_norm_plan
from resfuse.layout import copy_back, dense, ordered_like, residual_for
from resfuse.types import BatchNorm


@triton.jit
def bn_statistics_kernel(
    x_ptr, mean_ptr, m2_ptr, workspace_ptr, barrier_ptr, images, positions, channels, parts, tiles_per_part,
    TILE: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """mean = sum x / n, M2 = sum (x - mean)^2 per channel.  Reads x once."""
    part, channel, _, _ = bn_tile.part_of(images, positions, channels, tiles_per_part, TILE)
    pivot = bn_tile.pivot_of(x_ptr, images, positions, channels, channel, TILE)
    if PHASE != 2:
        bn_tile.part_statistics(x_ptr, pivot, workspace_ptr, images, positions, channels, tiles_per_part, TILE)
    if PHASE == 0:
        reduce.grid_barrier(barrier_ptr, tl.num_programs(0))
    if PHASE != 1 and part == 0:
        _count, mean, m2 = bn_tile.whole_statistics(
            workspace_ptr, images, positions, channels, channel, parts, tiles_per_part, TILE
        )
        column = channel + tl.arange(0, TILE.block_n)
        tl.store(mean_ptr + column, pivot + mean, column < channels)
        tl.store(m2_ptr + column, m2, column < channels)


@triton.jit
def bn_train_forward_kernel(
    x_ptr, residual_ptr, y_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, mean_ptr, invstd_ptr,
    workspace_ptr, barrier_ptr, images, positions, channels, parts, tiles_per_part, momentum, eps,
    RELU: tl.constexpr, TILE: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """y = act(weight (x - mean) invstd + bias [+ residual]), by the statistics of x itself.

    Reads x twice (the second time backwards: what was read last is still in L2) and the residual, writes y.
    """
    part, channel, first, tile_count = bn_tile.part_of(images, positions, channels, tiles_per_part, TILE)
    pivot = bn_tile.pivot_of(x_ptr, images, positions, channels, channel, TILE)
    if PHASE != 2:
        bn_tile.part_statistics(x_ptr, pivot, workspace_ptr, images, positions, channels, tiles_per_part, TILE)
    if PHASE == 0:
        reduce.grid_barrier(barrier_ptr, tl.num_programs(0))
    if PHASE != 1:
        column = channel + tl.arange(0, TILE.block_n)
        inside = column < channels
        count, mean, m2 = bn_tile.whole_statistics(
            workspace_ptr, images, positions, channels, channel, parts, tiles_per_part, TILE
        )
        mean += pivot
        invstd = reduce.inverse_deviation(m2 / count, eps)
        if part == 0:
            tl.store(mean_ptr + column, mean, inside)
            tl.store(invstd_ptr + column, invstd, inside)
            reduce.update_running(running_mean_ptr, running_var_ptr, column, inside, mean, m2, count, momentum)
        scale = invstd * reduce.per_channel(weight_ptr, column, inside, 1.0)
        bias = reduce.per_channel(bias_ptr, column, inside, 0.0)
        last = first + tile_count - 1
        for i in tl.range(
            tile_count, loop_unroll_factor=bn_tile.LOADS_AHEAD // x_ptr.dtype.element_ty.primitive_bitwidth
        ):
            offset, offsets, mask = bn_tile.tile_at(last - i, images, positions, channels, channel, TILE)
            x = tl.load(x_ptr + offset + offsets, mask, other=0.0).to(tl.float32)
            a = reduce.affine(x, mean, scale, bias)
            bn_tile.activate_and_store(a, residual_ptr, y_ptr, offset, offsets, mask, RELU)


@triton.jit
def bn_apply_kernel(
    x_ptr, residual_ptr, y_ptr, mean_ptr, spread_ptr, weight_ptr, bias_ptr, images, positions, channels, eps,
    VARIANCE: tl.constexpr, RELU: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """y = act(weight (x - mean) invstd + bias [+ residual]), by given statistics; a tile per program.

    `spread` is the variance (VARIANCE) or invstd.  Reads x and the residual, writes y.
    """
    tile, channel, _, _ = bn_tile.part_of(images, positions, channels, 1, TILE)
    column = channel + tl.arange(0, TILE.block_n)
    inside = column < channels
    mean, invstd = (
        reduce.per_channel(mean_ptr, column, inside, 0.0),
        reduce.per_channel(spread_ptr, column, inside, 1.0),
    )
    if VARIANCE:
        invstd = reduce.inverse_deviation(invstd, eps)
    scale = invstd * reduce.per_channel(weight_ptr, column, inside, 1.0)
    bias = reduce.per_channel(bias_ptr, column, inside, 0.0)
    offset, offsets, mask = bn_tile.tile_at(tile, images, positions, channels, channel, TILE)
    x = tl.load(x_ptr + offset + offsets, mask, other=0.0).to(tl.float32)
    a = reduce.affine(x, mean, scale, bias)
    bn_tile.activate_and_store(a, residual_ptr, y_ptr, offset, offsets, mask, RELU)


@triton.jit
def bn_backward_kernel(
    dy_ptr, x_ptr, y_ptr, weight_ptr, bias_ptr, mean_ptr, invstd_ptr, dx_ptr, dresidual_ptr, sum_g_ptr, sum_g_xhat_ptr,
    workspace_ptr, barrier_ptr, images, positions, channels, parts, tiles_per_part, count,
    RELU: tl.constexpr, BATCH_STATISTICS: tl.constexpr, TILE: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """With g = dy [not y <= 0] (RELU) and xhat = (x - mean) invstd: sum g, sum g xhat, dresidual = g, and

        dx = weight invstd (g - sum g / count - xhat sum g xhat / count)     with BATCH_STATISTICS
        dx = weight invstd g                                                 without

    dx and dresidual may be None, and y, which is then computed from x.  Reads dy, x and y, and once more (or dresidual
    for dy and y) where dx needs the sums; writes dx and dresidual.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    part, channel, first, tile_count = bn_tile.part_of(images, positions, channels, tiles_per_part, TILE)
    column = channel + tl.arange(0, BLOCK_N)
    inside = column < channels
    mean, invstd = (
        reduce.per_channel(mean_ptr, column, inside, 0.0),
        reduce.per_channel(invstd_ptr, column, inside, 0.0),
    )
    scale = invstd * reduce.per_channel(weight_ptr, column, inside, 1.0)
    bias = reduce.per_channel(bias_ptr, column, inside, 0.0)
    if PHASE != 2:
        tile_g, tile_g_centred = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in range(tile_count):
            offset, offsets, mask = bn_tile.tile_at(first + i, images, positions, channels, channel, TILE)
            x = tl.load(x_ptr + offset + offsets, mask, other=0.0).to(tl.float32)
            g = bn_tile.masked_gradient(dy_ptr, y_ptr, x, mean, scale, bias, offset, offsets, mask, RELU)
            tile_g += g
            tile_g_centred += tl.where(mask, g * (x - mean[None, :]), 0.0)
            if dresidual_ptr is not None:
                bn_tile.store(dresidual_ptr, offset, offsets, g, mask)
            if dx_ptr is not None and not BATCH_STATISTICS:
                bn_tile.store(dx_ptr, offset, offsets, g * scale[None, :], mask)
        part_g, part_g_xhat = tl.sum(tile_g, axis=0), tl.sum(tile_g_centred, axis=0) * invstd
        reduce.store_part(workspace_ptr, part, channels, column, inside, part_g, part_g_xhat)
    if PHASE == 0:
        reduce.grid_barrier(barrier_ptr, tl.num_programs(0))
    if PHASE != 1:
        NEEDS_SUMS: tl.constexpr = dx_ptr is not None and BATCH_STATISTICS
        if NEEDS_SUMS or part == 0:
            sum_g, sum_g_xhat = reduce.sum_parts(
                workspace_ptr, parts, channels, column, inside, TILE.block_n, TILE.block_parts
            )
            if part == 0:
                tl.store(sum_g_ptr + column, sum_g, inside)
                tl.store(sum_g_xhat_ptr + column, sum_g_xhat, inside)
            if NEEDS_SUMS:
                shift, slope = sum_g / count, sum_g_xhat / count * invstd
                last = first + tile_count - 1
                for i in range(tile_count):
                    offset, offsets, mask = bn_tile.tile_at(last - i, images, positions, channels, channel, TILE)
                    x = tl.load(x_ptr + offset + offsets, mask, other=0.0).to(tl.float32)
                    if dresidual_ptr is not None:
                        g = tl.load(dresidual_ptr + offset + offsets, mask, other=0.0).to(tl.float32)
                    else:
                        g = bn_tile.masked_gradient(dy_ptr, y_ptr, x, mean, scale, bias, offset, offsets, mask, RELU)
                    dx = scale[None, :] * (g - shift[None, :] - (x - mean[None, :]) * slope[None, :])
                    bn_tile.store(dx_ptr, offset, offsets, dx, mask)


@triton.jit
def bn_backward_apply_kernel(
    g_ptr, x_ptr, weight_ptr, mean_ptr, invstd_ptr, sum_g_ptr, sum_g_xhat_ptr, dx_ptr,
    images, positions, channels, count, BATCH_STATISTICS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dx as in `bn_backward_kernel`, by given g and sums; a tile per program.  Reads g and x, writes dx."""
    tile, channel, _, _ = bn_tile.part_of(images, positions, channels, 1, TILE)
    column = channel + tl.arange(0, TILE.block_n)
    inside = column < channels
    mean, invstd = (
        reduce.per_channel(mean_ptr, column, inside, 0.0),
        reduce.per_channel(invstd_ptr, column, inside, 0.0),
    )
    scale = invstd * reduce.per_channel(weight_ptr, column, inside, 1.0)
    offset, offsets, mask = bn_tile.tile_at(tile, images, positions, channels, channel, TILE)
    g = tl.load(g_ptr + offset + offsets, mask, other=0.0).to(tl.float32)
    if BATCH_STATISTICS:
        shift = reduce.per_channel(sum_g_ptr, column, inside, 0.0) / count
        slope = reduce.per_channel(sum_g_xhat_ptr, column, inside, 0.0) / count * invstd
        x = tl.load(x_ptr + offset + offsets, mask, other=0.0).to(tl.float32)
        g = g - shift[None, :] - (x - mean[None, :]) * slope[None, :]
    bn_tile.store(dx_ptr, offset, offsets, scale[None, :] * g, mask)


def bn_act_forward(
    input: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    input = dense(input)
    output = torch.empty_like(input)
    residual = residual_for(output, residual)
    running_mean, running_var, weight, bias = unstrided(*bn[:4])
    if not bn.training:
        _apply(input, residual, output, (running_mean, running_var, weight, bias), bn.eps, relu)
        return output, None, None
    mean, invstd = _vector_like(input), _vector_like(input)
    pointers = (input, residual, output, weight, bias, running_mean, running_var, mean, invstd)
    _reduce(bn_train_forward_kernel, input, pointers, (float(bn.momentum), float(bn.eps)), RELU=relu)
    copy_back(bn, running_mean, running_var)
    return output, mean, invstd


def bn_act_backward(
    grad_output: Tensor, input: Tensor, output: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor, invstd: Tensor, relu: bool, training: bool, needs_input_grad: bool, needs_residual_grad: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:  # fmt: skip
    input = dense(input)
    grad_output, output = ordered_like(grad_output, input), ordered_like(output, input)
    grad_input = torch.empty_like(input) if needs_input_grad else None
    grad_residual = torch.empty_like(input) if needs_residual_grad and relu else None
    sum_g, sum_g_xhat = torch.empty_like(mean), torch.empty_like(mean)
    vectors = unstrided(weight, bias, mean, invstd)
    pointers = (grad_output, input, output, *vectors, grad_input, grad_residual, sum_g, sum_g_xhat)
    count = input.numel() // input.shape[1]
    _reduce(bn_backward_kernel, input, pointers, (float(count),), RELU=relu, BATCH_STATISTICS=training)
    if needs_residual_grad and not relu:
        grad_residual = grad_output
    return grad_input, sum_g_xhat, sum_g, grad_residual


def bn_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    input = dense(input)
    mean, m2 = _vector_like(input), _vector_like(input)
    _reduce(bn_statistics_kernel, input, (input, mean, m2), ())
    return mean, m2


def bn_apply(
    input: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    relu: bool,
) -> Tensor:  # fmt: skip
    input = dense(input)
    output = torch.empty_like(input)
    _apply(input, residual_for(output, residual), output, unstrided(mean, invstd, weight, bias), None, relu)
    return output


def bn_backward_reduce(
    grad_output: Tensor, input: Tensor, output: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor, invstd: Tensor, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _, sum_g_xhat, sum_g, masked = bn_act_backward(
        grad_output, input, output, weight, bias, mean, invstd, relu, False, False, True
    )
    assert masked is not None
    return sum_g, sum_g_xhat, masked


def bn_backward_apply(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor,
    sum_g: Tensor, sum_g_xhat: Tensor, count: int | None,
) -> Tensor:  # fmt: skip
    input = dense(input)
    grad_input = torch.empty_like(input)
    vectors = unstrided(weight, mean, invstd, sum_g, sum_g_xhat)
    plan = batch_norm_plan(input, ELEMENTWISE, properties(input.device))
    launch(
        bn_backward_apply_kernel, plan.tiles, ordered_like(grad_output, input), input, *vectors, grad_input,
        plan.images, plan.positions, plan.channels, float(count or 1),
        BATCH_STATISTICS=count is not None, TILE=plan.tile, num_warps=plan.num_warps,
    )  # fmt: skip
    return grad_input


def _apply(x: Tensor, residual: Tensor | None, y: Tensor, vectors: Any, eps: float | None, relu: bool) -> None:
    """Fill y by the vectors (mean, variance, weight, bias), or by invstd for the variance where eps is None."""
    plan = batch_norm_plan(x, ELEMENTWISE, properties(x.device))
    launch(
        bn_apply_kernel, plan.tiles, x, residual, y, *vectors, plan.images, plan.positions, plan.channels,
        float(eps or 0), VARIANCE=eps is not None, RELU=relu, TILE=plan.tile, num_warps=plan.num_warps,
    )  # fmt: skip


def _reduce(kernel: Any, x: Tensor, pointers: tuple[Any, ...], scalars: tuple[float, ...], **flags: bool) -> None:
    plan = batch_norm_plan(x, REDUCTION, properties(x.device))
    workspace = torch.empty((plan.parts, 2, plan.channels), dtype=torch.float32, device=x.device)

    def run(phase: int, word: Tensor | None) -> None:
        launch(
            kernel, plan.programs, *pointers, workspace, word, plan.images, plan.positions, plan.channels,
            plan.parts, plan.tiles_per_part, *scalars, **flags, TILE=plan.tile,
            PHASE=phase, num_warps=plan.num_warps, cooperative=phase == 0,
        )  # fmt: skip

    in_phases(plan.phases, x.device, run)


def _vector_like(input: Tensor) -> Tensor:
    return torch.empty(input.shape[1], dtype=torch.float32, device=input.device)
