"""Launch plans: tensors cut into tiles, tiles shared out among programs, as a function of the problem and the device.

The configuration of a convolution is what `forced` asks for, else what a table of measurements has (measured.py), else
what the heuristics rank first (config.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from resfuse.backends import measured, stems
from resfuse.backends.integers import cdiv, power_of_two_above, power_of_two_below
from resfuse.backends.triton.config import (
    MAX_REGISTERS,
    ConvConfig,
    ConvProblem,
    DeviceProperties,
    Kind,
    Precision,
    every_config,
    heuristic_config,
)
from resfuse.layout import conv_output_shape
from resfuse.types import Convolution

# Channels of one tap that a step of the main loop should at least find: with fewer, neighbours are packed.
_TENSOR_CORE_RUN, _FMA_RUN = 32, 16
PADDED_CHANNELS = 4
"""Of an image, with zeros: a multiple of 8 bytes, which are copied asynchronously; one channel of three at a time is
loaded and waited for."""
_SMALLEST_BLOCK = 16
_INTERPRETED_M, _INTERPRETED_N = 256, 64
_INTERPRETED_THREADS = 4  # times as many: the cost of a tile hardly depends on its size there
_INT32_ELEMENTS = 2**31

COOPERATIVE, TWO_LAUNCHES = (0,), (1, 2)
"""Values of PHASE that a kernel with a grid barrier is launched with."""


# --- convolutions ----------------------------------------------------------------------------------------------------


class ConvConstants(NamedTuple):
    """The compile-time parameters that all convolution kernels share, passed as one."""

    c: int
    k: int
    r: int
    s: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dil_h: int
    dil_w: int
    groups: int
    pack_groups: int
    """Neighbouring groups that are multiplied as one, with a block-diagonal weight (ResNeXt, depthwise)."""
    pack_row: bool
    """A step covers the taps of a filter row, which are neighbours in NHWC memory (the 7x7 stem on 3 channels)."""
    block_m: int
    block_n: int
    block_k: int
    tiles_n: int
    split_k: int
    group_m: int
    persistent: bool
    precision: Precision
    index64: bool


class ConvPlan(NamedTuple):
    """Everything about a launch that does not depend on the data."""

    config: ConvConfig
    sizes: tuple[int, int, int, int, int]  # (M, H, W, OH, OW)
    constants: ConvConstants
    tiles_m: int
    programs: int  # size of the grid
    tiles_per_program: int  # in training: neighbouring tiles of M whose statistics a program merges as it goes
    phases: tuple[int, ...]  # in training


def conv_plan(
    kind: Kind, x: Tensor, w: Tensor, convolution: Convolution, device: DeviceProperties,
    registers: int = MAX_REGISTERS,
) -> ConvPlan:  # fmt: skip
    """The plan for x and w in NHWC memory, for a kernel with so many registers at most; cached."""
    precision: Precision = "ieee"
    if x.dtype == torch.float32:  # reading torch's switch takes microseconds
        switch = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        precision = "tf32" if switch == "tf32" else "ieee"
    return _conv_plan(kind, x.dtype, x.shape, w.shape, convolution, precision, device, registers, _forced.get(kind))


@functools.lru_cache(maxsize=4096)
def _conv_plan(
    kind: Kind, dtype: torch.dtype, x_shape: torch.Size, w_shape: torch.Size, convolution: Convolution,
    precision: Precision, device: DeviceProperties, registers: int, forced: ConvConfig | None,
) -> ConvPlan:  # fmt: skip
    n, c, h, w = x_shape
    k, _, r, s = w_shape
    problem = ConvProblem(kind, dtype, n, h, w, c, k, r, s, *convolution, precision)
    tiled = tile_problem(problem)
    config = forced or chosen_config(problem, device)
    if device.interpreted:
        config = _interpreters_config(tiled, config, keep_tile=forced is not None)
    most_splits = 1 if kind == "train" else power_of_two_below(config.steps(tiled))  # batch statistics need whole sums
    config = config._replace(split_k=min(config.split_k, most_splits))
    tiles_m, tiles_n = config.tiles(tiled)
    resident = device.resident_programs(config.num_warps, registers, config.shared_memory(tiled))
    programs, tiles_per_program = tiles_m * tiles_n * config.split_k, 1
    if kind == "train":
        tiles_per_program = cdiv(tiles_m, max(1, resident // tiles_n))
        programs = cdiv(tiles_m, tiles_per_program) * tiles_n
    elif config.persistent:
        programs = min(programs, resident)
    m = problem.gemm[0]
    elements = max(n * c * h * w, k * problem.taps * problem.group_in, m * k * config.split_k)
    groups, row = packing(problem)
    constants = ConvConstants(
        c, k, r, s, *convolution.stride, *convolution.padding, *convolution.dilation, convolution.groups, groups, row,
        *config[:3], tiles_n, config.split_k, config.group_m, config.persistent, precision,
        index64=elements >= _INT32_ELEMENTS,
    )  # fmt: skip
    return ConvPlan(
        config, (m, h, w, problem.oh, problem.ow), constants, tiles_m, programs, tiles_per_program,
        _phases(tiles_n <= resident, device),
    )  # fmt: skip


def pads(x_shape: torch.Size, w_shape: torch.Size, convolution: Convolution) -> bool:
    """Whether the channels of input and weight are padded before the convolution."""
    if x_shape[1] >= PADDED_CHANNELS or w_shape[3] == 1 or convolution.groups > 1:
        return False
    n, _, oh, ow = conv_output_shape(x_shape, w_shape, convolution)
    return n * oh * ow >= stems.PADDED_FROM


def packing(problem: ConvProblem) -> tuple[int, bool]:
    """(`pack_groups`, `pack_row`): as many neighbours as fill a step where one tap of one group has few channels."""
    run = _TENSOR_CORE_RUN if problem.uses_tensor_cores else _FMA_RUN
    if problem.groups == 1:
        return 1, problem.c < 16 and problem.s > 1 and problem.dilation[1] == 1
    widest = max(problem.group_in, problem.group_out)
    return min(power_of_two_below(max(1, run // widest)), power_of_two_above(problem.groups)), False


def tile_problem(problem: ConvProblem) -> ConvProblem:
    """The convolution whose taps and groups are those of the packed one: configurations are chosen for this one."""
    packed, row = packing(problem)
    if row:
        return problem._replace(
            w=problem.ow, c=problem.s * problem.c, s=1, stride=(problem.stride[0], 1), padding=(problem.padding[0], 0)
        )
    if packed > 1:
        groups = cdiv(problem.groups, packed)
        wide = groups * packed
        return problem._replace(c=wide * problem.group_in, k=wide * problem.group_out, groups=groups)
    return problem


def chosen_config(problem: ConvProblem, device: DeviceProperties) -> ConvConfig:
    """The measured configuration, of those that are possible for the problem, or that of the heuristics."""
    tiled = tile_problem(problem)
    near = measured.configs(problem, device.name)
    possible = every_config(tiled, device) if near else []
    return next((config for config in near if config in possible), None) or heuristic_config(tiled, device)


_forced: dict[Kind, ConvConfig | None] = {}


@contextmanager
def forced(kind: Kind, config: ConvConfig | None) -> Iterator[None]:
    """Inside, in every thread of the process, all problems of a kind run with this configuration (None: as chosen)."""
    before = _forced.get(kind)
    _forced[kind] = config
    try:
        yield
    finally:
        _forced[kind] = before


def forget() -> None:
    """Read the tables and choose again at the next launch."""
    measured.forget()
    _conv_plan.cache_clear()


def _interpreters_config(problem: ConvProblem, config: ConvConfig, keep_tile: bool) -> ConvConfig:
    """Few large tiles, which an interpreter runs through faster, but none larger than the (padded) problem."""
    block_m, block_n, block_k = config[:3]
    if not keep_tile:
        block_m, block_n = max(block_m, _INTERPRETED_M), max(block_n, _INTERPRETED_N)
    return config._replace(
        block_m=min(block_m, _block(problem.gemm[0])),
        block_n=min(block_n, _block(problem.group_out)),
        block_k=min(block_k, _block(problem.group_in)),
    )


def _block(extent: int) -> int:
    return max(_SMALLEST_BLOCK, power_of_two_above(extent))


def _phases(resident: bool, device: DeviceProperties) -> tuple[int, ...]:
    return COOPERATIVE if resident and not device.interpreted else TWO_LAUNCHES


# --- batch norm ------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """Threads of a program, and elements of a tile that each of them has."""

    threads: int
    elements: int
    scattered: int  # elements where they have to be addressed one by one


REDUCTION, ELEMENTWISE = Work(512, 16, 8), Work(128, 32, 8)


class BatchNormTile(NamedTuple):
    """The compile-time parameters that all batch norm kernels share, passed as one."""

    channels_last: bool
    block_m: int
    block_n: int
    block_parts: int  # parts of a reduction that are merged at a time


class BatchNormPlan(NamedTuple):
    """The tiles of a tensor, and in a reduction their parts, a program each."""

    images: int
    positions: int
    channels: int
    tiles: int  # programs of an elementwise kernel
    programs: int  # programs of a reduction
    parts: int
    tiles_per_part: int
    num_warps: int
    phases: tuple[int, ...]
    tile: BatchNormTile


def batch_norm_plan(x: Tensor, work: Work, device: DeviceProperties) -> BatchNormPlan:
    """The plan for a dense tensor; cached.  All parts of a reduction are resident if the channels allow it."""
    return _batch_norm_plan(x.shape, x.is_contiguous(memory_format=torch.channels_last), x.dtype, work, device)


@functools.lru_cache(maxsize=4096)
def _batch_norm_plan(
    shape: torch.Size, channels_last: bool, dtype: torch.dtype, work: Work, device: DeviceProperties
) -> BatchNormPlan:
    """Tiles of 256 bytes or more side by side, where the tensor has them."""
    n, channels, h, w = shape
    images, positions = (1, n * h * w) if channels_last else (n, h * w)
    elements = work.scattered if (channels if channels_last else positions) % 16 else work.elements
    threads = work.threads * (_INTERPRETED_THREADS if device.interpreted else 1)
    if channels_last:
        block_n = min(power_of_two_above(channels), 256 // dtype.itemsize)
        block_m = min(power_of_two_above(positions), threads * elements // block_n)
    else:
        block_m = min(power_of_two_above(positions), 512 // dtype.itemsize)
        block_n = min(power_of_two_above(channels), threads * elements // block_m)
    while block_m > 1 and channels_last and block_m * channels >= _INT32_ELEMENTS:  # offsets in a tile have 32 bits
        block_m //= 2
    while block_n > 1 and not channels_last and block_n * positions >= _INT32_ELEMENTS:
        block_n //= 2
    tiles, channel_blocks = cdiv(positions, block_m) * images, cdiv(channels, block_n)
    most_programs = 1 if work == ELEMENTWISE else device.num_sms
    tiles_per_part = cdiv(tiles, max(1, most_programs // channel_blocks))
    parts = cdiv(tiles, tiles_per_part)
    block_parts = min(power_of_two_above(parts), threads * work.elements // block_n)
    return BatchNormPlan(
        images, positions, channels,
        tiles=tiles * channel_blocks,
        programs=parts * channel_blocks,
        parts=parts,
        tiles_per_part=tiles_per_part,
        num_warps=max(1, block_m * block_n // (32 * elements)),
        phases=_phases(parts * channel_blocks <= device.num_sms, device),
        tile=BatchNormTile(channels_last, block_m, block_n, block_parts),
    )  # fmt: skip
