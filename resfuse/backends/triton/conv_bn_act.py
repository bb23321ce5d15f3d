"""conv_bn_act, inference: convolution, batch norm with running statistics, residual and ReLU in one launch.

Also the convolution alone, by the same kernel.  conv_bn_act_train.py has the training forward pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse.backends.triton.conv_bn_act_train import train_forward
from resfuse.backends.triton.conv_plan import (
    Pair,
    chosen_config,
    conv_problem,
    geometry_constants,
    resident,
    tile_grid,
    tile_problem,
)
from resfuse.backends.triton.conv_tile import conv_tile, output_channels, output_pixels, tile_of
from resfuse.backends.triton.epilogue import activate_and_store, normalize, per_channel
from resfuse.backends.triton.launch import launch, properties
from resfuse.backends.triton.welford import inverse_deviation

__all__ = ["conv_forward", "eval_forward", "train_forward"]


@triton.jit
def conv_bn_act_kernel(
    x_ptr, w_ptr, running_mean_ptr, running_var_ptr, weight_ptr, bias_ptr, conv_bias_ptr, residual_ptr, out_ptr,
    partials_ptr, arrivals_ptr, eps, tiles_m, M, H, W, OH, OW,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    GROUPS: tl.constexpr, PACK_GROUPS: tl.constexpr, PACK_ROW: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, INDEX64: tl.constexpr,
    TILES_N: tl.constexpr, GROUP_M: tl.constexpr, SPLIT_K: tl.constexpr, PERSISTENT: tl.constexpr,
    RELU: tl.constexpr,
):  # fmt: skip
    """out = act((conv(x, w) + conv_bias - mean) / sqrt(var + eps) weight + bias + residual); without mean, conv alone.

    A program has a tile [BLOCK_M pixels, BLOCK_N channels], or, PERSISTENT, every num_programs-th of them.  With
    SPLIT_K as many programs share a tile: each stores its part of the sums, and the last to arrive adds all parts in
    their order and goes on; so the result does not depend on which one it was, and the counter is zero again.

    Reads x, w and the residual, writes out: itemsize (N H W C + K R S C / GROUPS + 2 M K) bytes at best.
    """
    tiles = tiles_m * TILES_N * SPLIT_K
    rounds = tl.cdiv(tiles - tl.program_id(0), tl.num_programs(0)) if PERSISTENT else 1
    for i in range(rounds):
        index = tl.program_id(0) + i * tl.num_programs(0)
        split = index % SPLIT_K
        tile_m, tile_n = tile_of(index // SPLIT_K, tiles_m, TILES_N, GROUP_M)
        pixels = output_pixels(tile_m, BLOCK_M, INDEX64)
        pack, channels, channel_mask = output_channels(tile_n, K, GROUPS, PACK_GROUPS, BLOCK_N)
        acc = conv_tile(
            x_ptr, w_ptr, pixels, pack, channels, channel_mask, split, M, H, W, OH, OW,
            C, K, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W, GROUPS, PACK_GROUPS, PACK_ROW,
            BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K, PRECISION,
        )  # fmt: skip
        last = True
        if SPLIT_K > 1:
            part = partials_ptr + pixels[:, None] * K + channels[None, :]
            inside = (pixels < M)[:, None] & channel_mask[None, :]
            stride = K * M.to(pixels.dtype)
            tl.store(part + split * stride, acc, mask=inside)
            tl.debug_barrier()  # all threads have written before one of them tells
            arrived = tl.atomic_add(arrivals_ptr + index // SPLIT_K, 1, sem="acq_rel", scope="gpu")
            last = arrived == SPLIT_K - 1
            if last:
                tl.debug_barrier()  # told before any thread reads
                acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                for other in range(SPLIT_K):
                    acc += tl.load(part + other * stride, mask=inside, other=0.0, cache_modifier=".cg")
                tl.store(arrivals_ptr + index // SPLIT_K, 0)
        if last:
            if conv_bias_ptr is not None:
                acc += per_channel(conv_bias_ptr, channels, channel_mask, 0.0)[None, :]
            if running_mean_ptr is not None:
                mean = per_channel(running_mean_ptr, channels, channel_mask, 0.0)
                invstd = inverse_deviation(per_channel(running_var_ptr, channels, channel_mask, 1.0), eps)
                acc = normalize(acc, mean, invstd, weight_ptr, bias_ptr, channels, channel_mask)
            activate_and_store(acc, residual_ptr, out_ptr, pixels, channels, M, channel_mask, K, RELU)


def eval_forward(
    x: Tensor,
    w: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    eps: float,
    out: Tensor,
) -> None:
    """One launch.  x, w, residual and out in dense channels_last memory and of one dtype, vectors in any."""
    vectors = (running_mean, running_var, weight, bias, conv_bias)
    _launch(x, w, vectors, residual, relu, stride, padding, dilation, groups, eps, out)


def conv_forward(
    x: Tensor,
    w: Tensor,
    conv_bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    out: Tensor,
) -> None:
    """out = conv(x, w) + conv_bias in one launch; x, w and out in dense channels_last memory and of one dtype."""
    _launch(x, w, (None, None, None, None, conv_bias), None, False, stride, padding, dilation, groups, 0.0, out)


def _launch(
    x: Tensor,
    w: Tensor,
    vectors: tuple[Tensor | None, ...],
    residual: Tensor | None,
    relu: bool,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    eps: float,
    out: Tensor,
) -> None:
    problem = conv_problem("forward", x, w, stride, padding, dilation, groups)
    device = properties(x.device)
    tiled = tile_problem(problem)
    config = chosen_config(tiled, device)
    tiles_m, tiles_n = tile_grid(tiled, config)
    programs = tiles_m * tiles_n * config.split_k
    if config.persistent:
        programs = min(programs, resident(tiled, config, device))
    partials = arrivals = None
    if config.split_k > 1:
        partials = torch.empty(config.split_k * out.numel(), dtype=torch.float32, device=x.device)
        arrivals = arrival_counters(x.device, tiles_m * tiles_n)
    launch(
        conv_bn_act_kernel, (programs,), x, w, *vectors, residual, out, partials, arrivals, eps, tiles_m,
        problem.gemm_m, problem.h, problem.w, problem.oh, problem.ow,
        **geometry_constants(problem, config), TILES_N=tiles_n, GROUP_M=config.group_m, SPLIT_K=config.split_k,
        PERSISTENT=config.persistent, RELU=relu, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


_counters: dict[tuple[int | None, int], Tensor] = {}


def arrival_counters(device: torch.device, size: int) -> Tensor:
    """`size` zeros of int32 that no launch on another stream uses; every launch leaves zeros behind."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(size, dtype=torch.int32, device=device)  # a graph may be replayed beside anything else
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    counters = _counters.get(key)
    if counters is None or counters.numel() < size:
        counters = _counters[key] = torch.zeros(max(size, 1024), dtype=torch.int32, device=device)
    return counters
