"""conv_bn_act, training: convolution, batch statistics, batch norm, residual and ReLU in one cooperative launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse.backends.triton.barrier import grid_barrier
from resfuse.backends.triton.conv_plan import (
    Pair,
    chosen_config,
    conv_problem,
    geometry_constants,
    tile_grid,
    tile_problem,
    train_plan,
)
from resfuse.backends.triton.conv_tile import conv_tile, output_channels, output_pixels
from resfuse.backends.triton.epilogue import activate_and_store, normalize, per_channel
from resfuse.backends.triton.launch import barrier, launch, phases, properties
from resfuse.backends.triton.welford import (
    inverse_deviation,
    merge_parts,
    store_part,
    tile_statistics,
    update_running,
)

_MERGED_AT_ONCE = 2048  # means in the workspace


@triton.jit
def merge(count, mean, m2, other_count, other_mean, other_m2):
    """Chan's formula: (count, mean, M2) of two sets as one."""
    total = count + other_count
    delta = other_mean - mean
    share = other_count / total
    return total, mean + delta * share, m2 + other_m2 + delta * delta * (count * share)


@triton.jit
def convolved_tile(
    x_ptr, w_ptr, conv_bias_ptr, z_ptr, tile_m, pack, channels, channel_mask, M, H, W, OH, OW,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    GROUPS: tl.constexpr, PACK_GROUPS: tl.constexpr, PACK_ROW: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, INDEX64: tl.constexpr,
):  # fmt: skip
    """A tile of z, stored and as it is rounded there, and its (count, mean, M2), the last two [BLOCK_N]."""
    pixels = output_pixels(tile_m, BLOCK_M, INDEX64)
    acc = conv_tile(
        x_ptr, w_ptr, pixels, pack, channels, channel_mask, 0, M, H, W, OH, OW,
        C, K, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W, GROUPS, PACK_GROUPS, PACK_ROW,
        BLOCK_M, BLOCK_N, BLOCK_K, 1, PRECISION,
    )  # fmt: skip
    if conv_bias_ptr is not None:
        acc += per_channel(conv_bias_ptr, channels, channel_mask, 0.0)[None, :]
    z = acc.to(z_ptr.dtype.element_ty)
    inside = (pixels < M)[:, None] & channel_mask[None, :]
    tl.store(z_ptr + (pixels[:, None] * K + channels[None, :]), z, mask=inside)
    rows = tl.sum((pixels < M).to(tl.float32), axis=0)
    mean, m2 = tile_statistics(z.to(tl.float32), inside, rows)
    return z, rows, mean, m2


@triton.jit
def conv_bn_act_train_kernel(
    x_ptr, w_ptr, running_mean_ptr, running_var_ptr, weight_ptr, bias_ptr, conv_bias_ptr, residual_ptr, z_ptr,
    out_ptr, mean_ptr, invstd_ptr, workspace_ptr, barrier_ptr, momentum, eps, tiles_m, tiles_per_program, M, H, W,
    OH, OW,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    GROUPS: tl.constexpr, PACK_GROUPS: tl.constexpr, PACK_ROW: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, INDEX64: tl.constexpr,
    TILES_N: tl.constexpr, BLOCK_PARTS: tl.constexpr, RELU: tl.constexpr, IN_REGISTERS: tl.constexpr,
    PHASE: tl.constexpr,
):  # fmt: skip
    """z = conv(x, w) + conv_bias; out = act((z - mean) invstd weight + bias + residual) with the statistics of z.

    Program (j, n) has `tiles_per_program` tiles of M in column n, merges their (mean, M2) by Chan's formula and leaves
    that in the workspace [programs_m, 2, K].  Past the barrier every program merges the whole column, in the order of
    j, and normalises its own tiles: from registers where it has one, else as it finds them in memory, the latest first,
    which is still in L2.  Program (0, n) writes mean, invstd and the running statistics.  z is rounded before its
    statistics are taken.

    Reads x, w and the residual, writes z and out: itemsize (N H W C + K R S C / GROUPS + 3 M K) bytes at best, and
    itemsize M K more where z stays neither in registers nor in L2.
    """
    tile_n = tl.program_id(0) % TILES_N
    program = tl.program_id(0) // TILES_N
    first = program * tiles_per_program
    own_tiles = tl.minimum(tiles_m - first, tiles_per_program)
    pack, channels, channel_mask = output_channels(tile_n, K, GROUPS, PACK_GROUPS, BLOCK_N)

    if PHASE != 2:
        if IN_REGISTERS:
            z, count, mean, m2 = convolved_tile(
                x_ptr, w_ptr, conv_bias_ptr, z_ptr, first, pack, channels, channel_mask, M, H, W, OH, OW,
                C, K, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W, GROUPS, PACK_GROUPS, PACK_ROW,
                BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, INDEX64,
            )  # fmt: skip
        else:
            count, mean, m2 = 0.0, tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
            for i in range(own_tiles):
                _, tile_count, tile_mean, tile_m2 = convolved_tile(
                    x_ptr, w_ptr, conv_bias_ptr, z_ptr, first + i, pack, channels, channel_mask, M, H, W, OH, OW,
                    C, K, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W, GROUPS, PACK_GROUPS, PACK_ROW,
                    BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, INDEX64,
                )  # fmt: skip
                count, mean, m2 = merge(count, mean, m2, tile_count, tile_mean, tile_m2)
        store_part(workspace_ptr, program, K, channels, channel_mask, mean, m2)

    if PHASE == 0:
        grid_barrier(barrier_ptr, tl.num_programs(0))

    if PHASE != 1:
        count, mean, m2 = merge_parts(
            workspace_ptr, tl.num_programs(0) // TILES_N, K, channels, channel_mask, tiles_per_program, tiles_m,
            M // BLOCK_M, M % BLOCK_M, BLOCK_M, BLOCK_N, BLOCK_PARTS,
        )  # fmt: skip
        invstd = inverse_deviation(m2 / count, eps)
        if program == 0:
            tl.store(mean_ptr + channels, mean, mask=channel_mask)
            tl.store(invstd_ptr + channels, invstd, mask=channel_mask)
            update_running(running_mean_ptr, running_var_ptr, channels, channel_mask, mean, m2, count, momentum)
        if IN_REGISTERS:
            pixels = output_pixels(program, BLOCK_M, INDEX64)
            y = normalize(z.to(tl.float32), mean, invstd, weight_ptr, bias_ptr, channels, channel_mask)
            activate_and_store(y, residual_ptr, out_ptr, pixels, channels, M, channel_mask, K, RELU)
        else:
            for i in range(own_tiles):
                pixels = output_pixels(first + own_tiles - 1 - i, BLOCK_M, INDEX64)
                inside = (pixels < M)[:, None] & channel_mask[None, :]
                z = tl.load(z_ptr + (pixels[:, None] * K + channels[None, :]), mask=inside, other=0.0)
                y = normalize(z.to(tl.float32), mean, invstd, weight_ptr, bias_ptr, channels, channel_mask)
                activate_and_store(y, residual_ptr, out_ptr, pixels, channels, M, channel_mask, K, RELU)


def train_forward(
    x: Tensor,
    w: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    momentum: float,
    eps: float,
    z: Tensor,
    out: Tensor,
    mean: Tensor,
    invstd: Tensor,
    *,
    launches: int | None = None,
) -> None:
    """x, w, residual, z and out in dense channels_last memory and of one dtype; mean and invstd in float32.

    `launches` asks for one (cooperative) or two; None is one wherever that works.

    Raises:
        ValueError: one launch is asked for and its programs can not all run at the same time.
    """
    problem = conv_problem("train", x, w, stride, padding, dilation, groups)
    device = properties(x.device)
    tiled = tile_problem(problem)
    config = chosen_config(tiled, device)
    tiles_m, tiles_n = tile_grid(tiled, config)
    plan = train_plan(tiled, config, device)
    forms = phases(launches, plan.resident)
    workspace = torch.empty((plan.programs_m, 2, problem.k), dtype=torch.float32, device=x.device)
    cooperative = forms == (0,)
    word = barrier(x.device) if cooperative else None
    constants = geometry_constants(problem, config)
    for phase in forms:
        launch(
            conv_bn_act_train_kernel, (plan.programs_m * tiles_n,), x, w, running_mean, running_var, weight, bias,
            conv_bias, residual, z, out, mean, invstd, workspace, word, momentum, eps, tiles_m,
            plan.tiles_per_program, problem.gemm_m, problem.h, problem.w, problem.oh, problem.ow,
            **constants, TILES_N=tiles_n, BLOCK_PARTS=_MERGED_AT_ONCE // config.block_n, RELU=relu,
            IN_REGISTERS=cooperative and plan.tiles_per_program == 1, PHASE=phase,
            num_warps=config.num_warps, num_stages=config.num_stages, cooperative=cooperative,
        )  # fmt: skip
