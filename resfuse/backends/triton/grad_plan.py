"""How the gradients of a convolution are cut into tiles, by shape and device."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

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
    return 1 << min(max(1, width // widest).bit_length() - 1, (problem.groups - 1).bit_length())


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
    groups = _cdiv(problem.groups, packed)
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


def _for_interpreter(problem: ConvProblem, config: ConvConfig) -> ConvConfig:
    """The configuration without blocks beyond the (padded) tile problem, and with long steps over pixels."""
    rows, columns, inner, block_k = problem.gemm_m, problem.group_in, problem.group_out, config.block_k
    if problem.kind == "wgrad":
        inner = problem.gemm_k
        if problem.dtype.itemsize == 2:  # in float32 the short sums of short steps are the accurate ones
            block_k = _INTERPRETED_PIXELS
    else:
        rows = _cdiv(rows, problem.stride[0] * problem.stride[1])
    return dataclasses.replace(
        config,
        block_m=min(config.block_m, _block(rows)),
        block_n=min(config.block_n, _block(columns)),
        block_k=min(block_k, _block(inner)),
    )


def tile_grid(problem: ConvProblem, config: ConvConfig) -> tuple[int, int]:
    """(tiles of M, tiles of N) of a tile problem: of all phases in dgrad, of all taps in wgrad."""
    columns = _cdiv(problem.group_in, config.block_n)
    if problem.kind == "wgrad":
        return problem.groups * _cdiv(problem.group_out, config.block_m), problem.taps * columns
    stride_h, stride_w = problem.stride
    rows = problem.n * _cdiv(problem.h, stride_h) * _cdiv(problem.w, stride_w)
    return stride_h * stride_w * _cdiv(rows, config.block_m), problem.groups * columns


def needs_index64(*elements: int) -> bool:
    """Whether offsets in tensors of so many elements pass 32 bits."""
    return max(elements) >= _INT32_ELEMENTS


def _block(extent: int) -> int:
    return max(_SMALLEST_BLOCK, 1 << (extent - 1).bit_length())


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
