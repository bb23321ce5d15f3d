"""How a forward convolution is cut into tiles and launched: pure functions of its shape and the device."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from resfuse.backends.integers import cdiv, power_of_two_above, power_of_two_below
from resfuse.backends.triton.configs import conv_config, is_forced
from resfuse.backends.triton.heuristics import shared_memory
from resfuse.backends.triton.launch import DeviceProperties, interpreted, resident_programs
from resfuse.backends.triton.problems import ConvConfig, ConvProblem, Kind, Precision

# Channels of one tap that a step of the main loop should at least find: of fewer, neighbours are packed.
_TENSOR_CORE_RUN, _FMA_RUN = 32, 16
_MAX_REGISTERS = 255
_SMALLEST_BLOCK = 16
_INTERPRETED_M, _INTERPRETED_N = 256, 64
_INT32_ELEMENTS = 2**31

Pair = tuple[int, int]


def conv_problem(
    kind: Kind, x: Tensor, w: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> ConvProblem:
    precision: Precision = "ieee"
    if x.dtype == torch.float32:  # reading torch's switch takes microseconds
        switch = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        precision = "tf32" if switch == "tf32" else "ieee"
    return _problem(kind, x.dtype, x.shape, w.shape, stride, padding, dilation, groups, precision)


@functools.lru_cache(maxsize=4096)
def _problem(
    kind: Kind, dtype: torch.dtype, x_shape: torch.Size, w_shape: torch.Size, stride: Pair, padding: Pair,
    dilation: Pair, groups: int, precision: Precision,
) -> ConvProblem:  # fmt: skip
    """The same object for the same problem, so that what is looked up by it is found at once."""
    n, c, h, w = x_shape
    k, _, r, s = w_shape
    return ConvProblem(kind, dtype, n, h, w, c, k, r, s, stride, padding, dilation, groups, precision)


@dataclasses.dataclass(frozen=True)
class Packing:
    """What makes up a step of the main loop where one tap of one group has few channels."""

    groups: int = 1
    """Neighbouring groups that are multiplied as one, with a block-diagonal weight (ResNeXt, depthwise)."""
    row: bool = False
    """The taps of a filter row, which NHWC memory has side by side (the 7x7 stem on 3 channels)."""


@functools.lru_cache(maxsize=4096)
def packing(problem: ConvProblem) -> Packing:
    """Pack the filter row of an ungrouped convolution, or groups, up to the width that fills a step."""
    run = _TENSOR_CORE_RUN if problem.uses_tensor_cores else _FMA_RUN
    if problem.groups == 1:
        return Packing(row=problem.group_in < 16 and problem.s > 1 and problem.dilation[1] == 1)
    widest = max(problem.group_in, problem.group_out)
    return Packing(groups=min(power_of_two_below(max(1, run // widest)), power_of_two_above(problem.groups)))


@functools.lru_cache(maxsize=4096)
def tile_problem(problem: ConvProblem) -> ConvProblem:
    """The convolution whose taps and groups are those of the packed one: what `conv_config` is asked about."""
    packed = packing(problem)
    if packed.row:
        return dataclasses.replace(
            problem, w=problem.ow, c=problem.s * problem.c, s=1,
            stride=(problem.stride[0], 1), padding=(problem.padding[0], 0),
        )  # fmt: skip
    if packed.groups > 1:
        groups = cdiv(problem.groups, packed.groups)
        wide = groups * packed.groups
        return dataclasses.replace(problem, c=wide * problem.group_in, k=wide * problem.group_out, groups=groups)
    return problem


def chosen_config(problem: ConvProblem, device: DeviceProperties) -> ConvConfig:
    """The configuration for a `tile_problem`, with no more split_k than a run of channels has steps."""
    config = conv_config(problem, device)
    if interpreted():
        config = _interpreters_config(problem, config)
    steps = cdiv(problem.group_in, config.block_k)
    return config if config.split_k <= steps else dataclasses.replace(config, split_k=power_of_two_below(steps))


def _interpreters_config(problem: ConvProblem, config: ConvConfig) -> ConvConfig:
    """With few large tiles, which take an interpreter less time, but none beyond the problem; and as it was forced."""
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    if not is_forced(problem.kind):
        block_m, block_n = max(block_m, _INTERPRETED_M), max(block_n, _INTERPRETED_N)
    return dataclasses.replace(
        config,
        block_m=min(block_m, _block(problem.gemm_m)),
        block_n=min(block_n, _block(problem.group_out)),
        block_k=min(block_k, _block(problem.group_in)),
    )


def tile_grid(problem: ConvProblem, config: ConvConfig) -> tuple[int, int]:
    """(tiles of M, tiles of N) of a `tile_problem`."""
    return cdiv(problem.gemm_m, config.block_m), problem.groups * cdiv(problem.group_out, config.block_n)


def resident(problem: ConvProblem, config: ConvConfig, device: DeviceProperties) -> int:
    """Programs that are certain to run at the same time, whatever number of registers the compiler takes."""
    return resident_programs(device, config.num_warps, _MAX_REGISTERS, shared_memory(problem, config))


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """How the tiles of a training forward pass are shared out."""

    tiles_per_program: int
    """Neighbouring tiles of M, whose statistics a program merges as it goes."""
    programs_m: int
    """Programs per tile of N; the last one may have fewer tiles."""
    resident: bool
    """All programs run at the same time: they may wait for each other, in one cooperative launch."""


@functools.lru_cache(maxsize=4096)
def train_plan(problem: ConvProblem, config: ConvConfig, device: DeviceProperties) -> TrainPlan:
    """As many programs as are resident, of a `tile_problem`; only with more tiles of N than that there are more."""
    tiles_m, tiles_n = tile_grid(problem, config)
    programs = resident(problem, config, device)
    tiles_per_program = cdiv(tiles_m, max(1, programs // tiles_n))
    return TrainPlan(tiles_per_program, cdiv(tiles_m, tiles_per_program), tiles_n <= programs)


@functools.lru_cache(maxsize=4096)
def geometry_constants(problem: ConvProblem, config: ConvConfig) -> dict[str, Any]:
    """The compile-time parameters that both kernels have, in their order; not to be changed."""
    elements = (
        problem.n * problem.h * problem.w * problem.c,
        problem.k * problem.taps * problem.group_in,
        problem.gemm_m * problem.k * config.split_k,
    )
    packed = packing(problem)
    return {
        "C": problem.c, "K": problem.k, "R": problem.r, "S": problem.s,
        "STRIDE_H": problem.stride[0], "STRIDE_W": problem.stride[1],
        "PAD_H": problem.padding[0], "PAD_W": problem.padding[1],
        "DIL_H": problem.dilation[0], "DIL_W": problem.dilation[1],
        "GROUPS": problem.groups, "PACK_GROUPS": packed.groups, "PACK_ROW": packed.row,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "PRECISION": problem.precision, "INDEX64": max(elements) >= _INT32_ELEMENTS,
    }  # fmt: skip


def _block(extent: int) -> int:
    return max(_SMALLEST_BLOCK, power_of_two_above(extent))
