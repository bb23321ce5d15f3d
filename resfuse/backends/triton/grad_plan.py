"""How the gradients of a convolution are cut into tiles, by shape and device."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch

from resfuse.backends.integers import cdiv, power_of_two_above, power_of_two_below
from resfuse.backends.triton.configs import ConvConfig, ConvProblem, conv_config
from resfuse.backends.triton.launch import interpreted, properties

# Channels of a tile that are worth having: of smaller groups, neighbours are multiplied as one, which costs products
# that nobody needs but reads whole cache lines.  The tiles of wgrad are that wide both ways.
_DGRAD_WIDTH, _WGRAD_WIDTH, _FMA_WIDTH = 32, 64, 16
_FEW_CHANNELS = 16
_SMALLEST_BLOCK = 16
_FUSED_ELEMENTS = 32
_INTERPRETED_PIXELS = 128
_INT32_ELEMENTS = 2**31


@dataclasses.dataclass(frozen=True)
class Phases:
    """The taps r with r dilation = phase + padding (mod stride), for one of the two dimensions of a convolution."""

    step: int
    """Distance of such taps: stride / gcd(stride, dilation)."""
    inverse: int
    """That of dilation / gcd modulo `step`."""


def phases(stride: int, dilation: int) -> Phases:
    """What dgrad has to know about a dimension, to find the taps of a phase."""
    gcd = math.gcd(stride, dilation)
    return Phases(stride // gcd, pow(dilation // gcd, -1, stride // gcd))


@functools.lru_cache(maxsize=4096)
def packed_groups(problem: ConvProblem) -> int:
    """Neighbouring groups that are multiplied as one, with a block-diagonal weight; 1 where groups are wide."""
    if problem.groups == 1:
        return 1
    width = _WGRAD_WIDTH if problem.kind == "wgrad" else _DGRAD_WIDTH
    if not problem.uses_tensor_cores:
        width = _FMA_WIDTH
    widest = max(problem.group_in, problem.group_out)
    return min(power_of_two_below(max(1, width // widest)), power_of_two_above(problem.groups))


def packs_taps(problem: ConvProblem) -> bool:
    """Whether a tile of wgrad has neighbours in the whole filter (7 x 7 x 3 of a stem), not in one of its taps."""
    return problem.kind == "wgrad" and problem.groups == 1 and problem.c < _FEW_CHANNELS and problem.taps > 1


@functools.lru_cache(maxsize=4096)
def tile_problem(problem: ConvProblem) -> ConvProblem:
    """The convolution whose taps and groups are those of the packed one: what `conv_config` is asked about."""
    if packs_taps(problem):
        return dataclasses.replace(
            problem, h=problem.oh, w=problem.ow, c=problem.taps * problem.c, r=1, s=1,
            stride=(1, 1), padding=(0, 0), dilation=(1, 1),
        )  # fmt: skip
    packed = packed_groups(problem)
    groups = cdiv(problem.groups, packed)
    wide = groups * packed
    return dataclasses.replace(problem, c=wide * problem.group_in, k=wide * problem.group_out, groups=groups)


def configuration(problem: ConvProblem, device: torch.device, *, fused: bool) -> ConvConfig:
    """How to run a problem, with dz computed while it is loaded (`fused`) or given."""
    found = properties(device)
    tiled = tile_problem(problem)
    if interpreted():
        # Programs run one after another: the fewer and larger their steps are, the faster.
        config = conv_config(tiled, dataclasses.replace(found, name="interpreter", num_sms=1))
        return _for_interpreter(tiled, config)
    config = conv_config(tiled, found)
    if fused:  # of three tensors per operand, more than 32 elements per thread and step do not stay in registers
        block_k = _FUSED_ELEMENTS * 32 * config.num_warps // config.block_m
        config = dataclasses.replace(config, block_k=max(_SMALLEST_BLOCK, min(config.block_k, block_k)))
    return config


def reads_of_dz(problem: ConvProblem, device: torch.device) -> int:
    """How often a gradient loads each element of dz that it computes: for every tap and tile of N."""
    tiled = tile_problem(problem)
    block_n = configuration(problem, device, fused=False).block_n  # the same as fused, but found in a cache
    return tiled.taps * cdiv(tiled.group_in, block_n)


def _for_interpreter(problem: ConvProblem, config: ConvConfig) -> ConvConfig:
    """The configuration without blocks beyond the (padded) tile problem, and with long steps over pixels."""
    rows, columns, inner, block_k = problem.gemm_m, problem.group_in, problem.group_out, config.block_k
    if problem.kind == "wgrad":
        inner = problem.gemm_k
        if problem.dtype.itemsize == 2:  # in float32 the short sums of short steps are the accurate ones
            block_k = _INTERPRETED_PIXELS
    else:
        rows = cdiv(rows, problem.stride[0] * problem.stride[1])
    return dataclasses.replace(
        config,
        block_m=min(config.block_m, _block(rows)),
        block_n=min(config.block_n, _block(columns)),
        block_k=min(block_k, _block(inner)),
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a kernel is launched with."""

    programs: int
    """Tiles: of all phases in dgrad, of all taps in wgrad."""
    tiles_m: int
    pixels: int
    """In dgrad of the input and of one phase, in wgrad of the output."""
    constants: dict[str, Any]
    """The compile-time parameters, in their order; not to be changed."""


@functools.lru_cache(maxsize=4096)
def plan(problem: ConvProblem, config: ConvConfig) -> Plan:
    """Worked out once per problem."""
    tiled = tile_problem(problem)
    columns = cdiv(tiled.group_in, config.block_n)
    (stride_h, stride_w), (dil_h, dil_w) = problem.stride, problem.dilation
    constants = {
        "C": problem.c, "K": problem.k, "R": problem.r, "S": problem.s, "STRIDE_H": stride_h, "STRIDE_W": stride_w,
        "PAD_H": problem.padding[0], "PAD_W": problem.padding[1], "DIL_H": dil_h, "DIL_W": dil_w,
        "GROUPS": problem.groups, "PACK_GROUPS": packed_groups(problem),
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "SPLIT": config.split_k > 1, "PRECISION": problem.precision, "INDEX64": _needs_index64(problem),
    }  # fmt: skip
    if problem.kind == "wgrad":
        tiles_m, tiles_n, pixels = (
            tiled.groups * cdiv(tiled.group_out, config.block_m),
            tiled.taps * columns,
            tiled.gemm_k,
        )
        return Plan(tiles_m * tiles_n, tiles_m, pixels, {**constants, "PACK_TAPS": packs_taps(problem)})
    pixels = problem.n * cdiv(problem.h, stride_h) * cdiv(problem.w, stride_w)
    tiles_m, tiles_n = stride_h * stride_w * cdiv(pixels, config.block_m), tiled.groups * columns
    vertical, horizontal = phases(stride_h, dil_h), phases(stride_w, dil_w)
    constants |= {"STEP_H": vertical.step, "STEP_W": horizontal.step}
    constants |= {"INVERSE_H": vertical.inverse, "INVERSE_W": horizontal.inverse, "GROUP_M": config.group_m}
    return Plan(tiles_m * tiles_n, tiles_m, pixels, constants)


def _needs_index64(problem: ConvProblem) -> bool:
    """Whether offsets in one of the tensors pass 32 bits."""
    input, output = problem.n * problem.h * problem.w * problem.c, problem.n * problem.oh * problem.ow * problem.k
    return max(input, output, problem.k * problem.taps * problem.group_in) >= _INT32_ELEMENTS


def _block(extent: int) -> int:
    return max(_SMALLEST_BLOCK, power_of_two_above(extent))
