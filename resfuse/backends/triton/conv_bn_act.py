"""conv_bn_act: convolution, batch norm, residual and ReLU, for inference and training; and the convolution alone.

Activations and weights lie in NHWC memory and have one dtype; vectors may have any, sums and statistics are float32.
`resfuse.backends.reference` specifies the functions below the kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse.backends.integers import cdiv
from resfuse.backends.triton import conv_tile, reduce
from resfuse.backends.triton.launch import in_phases, launch, properties, registers, shared_words, unstrided
from resfuse.backends.triton.plan import PADDED_CHANNELS, ConvPlan, conv_plan, pads
from resfuse.layout import channels_last, conv_memory_format, conv_output_shape, copy_back, residual_for
from resfuse.types import BatchNorm, Convolution

_PADDED_PIXELS = 512  # of a program


@triton.jit
def pad_channels_kernel(
    x_ptr, out_ptr, stride_n, stride_c, stride_h, stride_w, pixels, C, H, W,
    PADDED: tl.constexpr, BLOCK: tl.constexpr, INDEX64: tl.constexpr,
):  # fmt: skip
    """out = x in NHWC memory, with zeros behind its C channels up to PADDED; a block of pixels per program."""
    program = tl.program_id(0)
    if INDEX64:
        program = program.to(tl.int64)
    pixel, channel = program * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PADDED).to(tl.int64)
    image, row, column = pixel // W // H, pixel // W % H, pixel % W
    offsets = image.to(tl.int64) * stride_n + row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w
    inside = (pixel < pixels)[:, None]
    x = tl.load(
        x_ptr + (offsets[:, None] + channel[None, :] * stride_c), mask=inside & (channel < C)[None, :], other=0.0
    )
    tl.store(out_ptr + (pixel.to(tl.int64)[:, None] * PADDED + channel[None, :]), x, mask=inside)


@triton.jit
def conv_bn_act_kernel(
    x_ptr, w_ptr, running_mean_ptr, running_var_ptr, weight_ptr, bias_ptr, conv_bias_ptr, residual_ptr, out_ptr,
    partials_ptr, arrivals_ptr, eps, tiles_m, M, H, W, OH, OW,
    CONV: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """out = act((conv(x, w) + conv_bias - mean) / sqrt(var + eps) weight + bias + residual); without mean, conv alone.

    A program has a tile [BLOCK_M pixels, BLOCK_N channels], or, if persistent, every num_programs-th of them.  With
    split_k as many programs share a tile: each stores its part of the sums, and the last to arrive adds all parts in
    their order and goes on; so the result does not depend on which one it was, and the counter is zero again.

    Reads x, w and the residual, writes out: itemsize (N H W C + K R S C / GROUPS + 2 M K) bytes at best.
    """
    K: tl.constexpr = CONV.k
    BLOCK_M: tl.constexpr = CONV.block_m
    BLOCK_N: tl.constexpr = CONV.block_n
    SPLIT_K: tl.constexpr = CONV.split_k
    tiles = tiles_m * CONV.tiles_n * SPLIT_K
    rounds = tl.cdiv(tiles - tl.program_id(0), tl.num_programs(0)) if CONV.persistent else 1
    for i in range(rounds):
        index = tl.program_id(0) + i * tl.num_programs(0)
        split = index % SPLIT_K
        tile_m, tile_n = conv_tile.tile_of(index // SPLIT_K, tiles_m, CONV)
        pixels = conv_tile.output_pixels(tile_m, CONV)
        pack, channels, channel_mask = conv_tile.output_channels(tile_n, CONV)
        acc = conv_tile.tile_sums(x_ptr, w_ptr, pixels, pack, channels, channel_mask, split, M, H, W, OH, OW, CONV)
        last = True
        if SPLIT_K > 1:
            part = partials_ptr + pixels[:, None] * K + channels[None, :]
            inside = (pixels < M)[:, None] & channel_mask[None, :]
            stride = K * tl.cast(M, pixels.dtype)  # an M of 1 is a Python integer
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
            # Not before the loop over the sums, whose registers they would take (tf32 on sm_80 spilled).
            centre = conv_tile.vector(conv_bias_ptr, channels, channel_mask, 0.0)
            if running_mean_ptr is not None:
                centre = conv_tile.vector(running_mean_ptr, channels, channel_mask, 0.0) - centre
                scale = reduce.inverse_deviation(conv_tile.vector(running_var_ptr, channels, channel_mask, 1.0), eps)
                scale *= conv_tile.vector(weight_ptr, channels, channel_mask, 1.0)
                shift = conv_tile.vector(bias_ptr, channels, channel_mask, 0.0)
                acc = (acc - centre[None, :]) * scale[None, :] + shift[None, :]
            elif conv_bias_ptr is not None:
                acc += centre[None, :]
            conv_tile.activate_and_store(acc, residual_ptr, out_ptr, pixels, channels, M, channel_mask, K, RELU)


@triton.jit
def conv_bn_act_train_kernel(
    x_ptr, w_ptr, running_mean_ptr, running_var_ptr, weight_ptr, bias_ptr, conv_bias_ptr, residual_ptr, z_ptr,
    out_ptr, mean_ptr, invstd_ptr, workspace_ptr, barrier_ptr, momentum, eps, tiles_m, tiles_per_program, M, H, W,
    OH, OW,
    CONV: tl.constexpr, RELU: tl.constexpr, IN_REGISTERS: tl.constexpr, PHASE: tl.constexpr,
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
    K: tl.constexpr = CONV.k
    BLOCK_M: tl.constexpr = CONV.block_m
    BLOCK_N: tl.constexpr = CONV.block_n
    BLOCK_PARTS: tl.constexpr = 2048 // BLOCK_N
    tile_n = tl.program_id(0) % CONV.tiles_n
    program = tl.program_id(0) // CONV.tiles_n
    first = program * tiles_per_program
    own_tiles = 1 if IN_REGISTERS else tl.minimum(tiles_m - first, tiles_per_program)
    pack, channels, channel_mask = conv_tile.output_channels(tile_n, CONV)

    z = tl.zeros((BLOCK_M, BLOCK_N), z_ptr.dtype.element_ty)
    if PHASE != 2:
        count, mean, m2 = 0.0, tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
        for i in range(own_tiles):
            pixels = conv_tile.output_pixels(first + i, CONV)
            acc = conv_tile.tile_sums(x_ptr, w_ptr, pixels, pack, channels, channel_mask, 0, M, H, W, OH, OW, CONV)
            if conv_bias_ptr is not None:
                acc += conv_tile.vector(conv_bias_ptr, channels, channel_mask, 0.0)[None, :]
            z = acc.to(z_ptr.dtype.element_ty)
            inside = (pixels < M)[:, None] & channel_mask[None, :]
            tl.store(z_ptr + (pixels[:, None] * K + channels[None, :]), z, mask=inside)
            rows = tl.sum((pixels < M).to(tl.float32), axis=0)
            tile_mean, tile_m2 = reduce.tile_statistics(z.to(tl.float32), inside, rows)
            count, mean, m2 = reduce.merge(count, mean, m2, rows, tile_mean, tile_m2)
        reduce.store_part(workspace_ptr, program, K, channels, channel_mask, mean, m2)

    if PHASE == 0:
        reduce.grid_barrier(barrier_ptr, tl.num_programs(0))

    if PHASE != 1:
        count, mean, m2 = reduce.merge_parts(
            workspace_ptr, tl.num_programs(0) // CONV.tiles_n, K, channels, channel_mask, tiles_per_program, tiles_m,
            M // BLOCK_M, M % BLOCK_M, BLOCK_M, BLOCK_N, BLOCK_PARTS,
        )  # fmt: skip
        invstd = reduce.inverse_deviation(m2 / count, eps)
        if program == 0:
            tl.store(mean_ptr + channels, mean, mask=channel_mask)
            tl.store(invstd_ptr + channels, invstd, mask=channel_mask)
            reduce.update_running(running_mean_ptr, running_var_ptr, channels, channel_mask, mean, m2, count, momentum)
        scale = invstd * conv_tile.vector(weight_ptr, channels, channel_mask, 1.0)
        shift = conv_tile.vector(bias_ptr, channels, channel_mask, 0.0)
        for i in range(own_tiles):
            pixels = conv_tile.output_pixels(first + own_tiles - 1 - i, CONV)
            if not IN_REGISTERS:
                inside = (pixels < M)[:, None] & channel_mask[None, :]
                z = tl.load(z_ptr + (pixels[:, None] * K + channels[None, :]), mask=inside, other=0.0)
            y = reduce.affine(z.to(tl.float32), mean, scale, shift)
            conv_tile.activate_and_store(y, residual_ptr, out_ptr, pixels, channels, M, channel_mask, K, RELU)


def conv_bn_act_forward(
    input: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, convolution: Convolution, bn: BatchNorm,
    residual: Tensor | None, relu: bool, overwrite_residual: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    if not bn.training:
        output = _without_statistics(
            input, conv_weight, conv_bias, convolution, bn, residual, relu, overwrite_residual
        )  # fmt: skip
        return output, None, None, None
    x, w, output = _prepared(input, conv_weight, convolution)
    z = torch.empty_like(output)
    mean, invstd = (torch.empty(w.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    running_mean, running_var, *vectors = unstrided(*bn[:4], conv_bias)
    residual = residual_for(output, residual)

    def run(function: Callable[..., Any], plan: ConvPlan, workspace: Tensor, phase: int, word: Tensor | None) -> Any:
        return function(
            conv_bn_act_train_kernel, plan.programs, x, w, running_mean, running_var, *vectors, residual, z, output,
            mean, invstd, workspace, word, float(bn.momentum), float(bn.eps), plan.tiles_m, plan.tiles_per_program,
            *plan.sizes, CONV=plan.constants, RELU=relu,
            IN_REGISTERS=phase == 0 and plan.tiles_per_program == 1, PHASE=phase,
            num_warps=plan.config.num_warps, num_stages=plan.config.num_stages, cooperative=phase == 0,
        )  # fmt: skip

    def registers_of(plan: ConvPlan) -> int:  # any vector and word will do for compiling
        return run(registers, plan, mean, 0, shared_words("barrier", x.device, 1))

    plan = resident_plan(x, w, convolution, (relu, residual is None, conv_bias is None), registers_of)
    parts = plan.programs // plan.constants.tiles_n
    workspace = torch.empty((parts, 2, w.shape[0]), dtype=torch.float32, device=x.device)
    in_phases(plan.phases, x.device, functools.partial(run, launch, plan, workspace))
    copy_back(bn, running_mean, running_var)
    memory_format = conv_memory_format(input, conv_weight)
    return output.contiguous(memory_format=memory_format), z.contiguous(memory_format=memory_format), mean, invstd


_registers: dict[tuple[Any, ...], int] = {}


def resident_plan(
    x: Tensor, w: Tensor, convolution: Convolution, form: tuple[bool, ...], registers_of: Callable[[ConvPlan], int]
) -> ConvPlan:
    """The plan for training by what its kernel was compiled to, in a form of the call that decides what is compiled.

    A first kernel, planned for the most registers, tells how many it needs, with which more programs may be resident.
    That may make another kernel of it: until one needs no more than was assumed.
    """
    device = properties(x.device)
    plan = conv_plan("train", x, w, convolution, device)
    if device.interpreted or x.is_meta:
        return plan
    key = (plan, x.dtype, form)
    if key not in _registers:
        assumed = registers_of(plan)
        while (needed := registers_of(conv_plan("train", x, w, convolution, device, assumed))) > assumed:
            assumed = needed
        _registers[key] = assumed
    return conv_plan("train", x, w, convolution, device, _registers[key])


def conv_forward(input: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, convolution: Convolution) -> Tensor:
    return _without_statistics(input, conv_weight, conv_bias, convolution, None, None, False, False)


def _without_statistics(
    input: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, convolution: Convolution, bn: BatchNorm | None,
    residual: Tensor | None, relu: bool, overwrite_residual: bool,
) -> Tensor:  # fmt: skip
    """One launch: conv_bn_act with running statistics, or (bn None) the convolution alone."""
    if overwrite_residual and residual is not None:
        residual = channels_last(residual)
    x, w, output = _prepared(input, conv_weight, convolution, residual if overwrite_residual else None)
    vectors = unstrided(*((None,) * 4 if bn is None else bn[:4]), conv_bias)
    plan = conv_plan("forward", x, w, convolution, properties(x.device))
    config, partials, arrivals = plan.config, None, None
    if config.split_k > 1:
        partials = torch.empty(config.split_k * output.numel(), dtype=torch.float32, device=x.device)
        arrivals = shared_words("arrivals", x.device, plan.tiles_m * plan.constants.tiles_n)
    launch(
        conv_bn_act_kernel, plan.programs, x, w, *vectors, residual_for(output, residual), output, partials, arrivals,
        0.0 if bn is None else float(bn.eps), plan.tiles_m, *plan.sizes,
        CONV=plan.constants, RELU=relu, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return output.contiguous(memory_format=conv_memory_format(input, conv_weight))


def _prepared(
    input: Tensor, conv_weight: Tensor, convolution: Convolution, output: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Input and weight in NHWC memory, of one dtype and perhaps padded, and memory for the output."""
    w = conv_weight if conv_weight.dtype == input.dtype else conv_weight.to(input.dtype)  # inference under autocast
    if output is None:
        shape = conv_output_shape(input.shape, conv_weight.shape, convolution)
        output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)
    if pads(input.shape, w.shape, convolution):
        return padded(input), padded(w), output
    return channels_last(input), channels_last(w), output


def padded(tensor: Tensor) -> Tensor:
    """A copy in NHWC memory with zeros behind its channels, in one launch."""
    n, c, h, w = tensor.shape
    out = torch.empty(
        (n, PADDED_CHANNELS, h, w), dtype=tensor.dtype, device=tensor.device, memory_format=torch.channels_last
    )
    pixels = n * h * w
    launch(
        pad_channels_kernel, cdiv(pixels, _PADDED_PIXELS), tensor, out, *tensor.stride(), pixels, c, h, w,
        PADDED=PADDED_CHANNELS, BLOCK=_PADDED_PIXELS, INDEX64=pixels > 2**31 - _PADDED_PIXELS,
    )  # fmt: skip
    return out
