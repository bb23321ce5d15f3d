"""The convolutions of the cuda backend: layouts, allocation, and the choice of a tile.

The kernels are those of csrc/cuda/conv_kernels.cuh; `resfuse.backends.reference` specifies each function.  They read
and write NHWC memory, so a tensor in another layout is copied, and the output gets the format of `conv_memory_format`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resfuse.backends import dispatch, stems
from resfuse.backends.integers import cdiv, round_up
from resfuse.layout import (
    channels_last,
    conv_memory_format,
    conv_output_shape,
    copy_back,
    kernel_vector,
    residual_for,
)
from resfuse.types import BatchNorm, Convolution, Pair, Problem

# Implementations are in csrc/bindings_cuda_conv.cpp.  `launches` 0 is one wherever its blocks are all resident.
_LIBRARY = torch.library.Library("resfuse_cuda", "FRAGMENT")
# The first takes tensors in any layout, copies what its kernels cannot read, and returns a new tensor or the residual.
_LIBRARY.define(
    "conv_inference_forward(Tensor input, Tensor conv_weight, Tensor? conv_bias, Tensor? running_mean, "
    "Tensor? running_var, Tensor? weight, Tensor? bias, Tensor? residual, Tensor settings) -> Tensor"
)
_LIBRARY.define(
    "conv_train_forward(Tensor input, Tensor conv_weight, Tensor? conv_bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor? weight, Tensor? bias, Tensor? residual, bool relu, float momentum, float eps, "
    "int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, int dilation_w, int groups, bool tf32, "
    "int block_m, int block_n, int launches, Tensor(c!) workspace, Tensor(d!) z, Tensor(e!) output, Tensor(f!) mean, "
    "Tensor(g!) invstd) -> ()"
)
_LIBRARY.define(
    "pad_channels(Tensor input, int channels, int width, int taps, int stride, int padding, int dilation) -> Tensor"
)
# Looked up once: `torch.ops.a.b.default` takes half a microsecond.
_conv_inference_forward = torch.ops.resfuse_cuda.conv_inference_forward.default
_conv_train_forward = torch.ops.resfuse_cuda.conv_train_forward.default
_pad_channels = torch.ops.resfuse_cuda.pad_channels.default


class ConvConfig(NamedTuple):
    """The tiling of a convolution that the kernels are asked for."""

    block_m: int
    """Output pixels of a tile."""
    block_n: int
    """Output channels of a tile."""
    splits: int = 1
    """Blocks that share the sum of a tile; in training always one: a batch has tiles enough, and statistics want all
    of a tile in one place."""
    launches: int = 0
    """1 or 2: the form to run in where there is a choice; 0 is one launch wherever all its blocks are resident."""


TILES = ((128, 128), (128, 64), (64, 64), (32, 64))
"""Those of csrc/cuda/conv_launch.cuh, which has its own where channels or addresses do not fit 16-byte copies."""

# What part of its peak a tile's main loop should reach: of 128 x 128 an mma takes 2.5 instructions, of 32 x 64 12, and
# a byte from L2 serves the fewer products the smaller the tile.  Estimates, not measured.
_EFFICIENCY = {(128, 128): 1.0, (128, 64): 0.85, (64, 64): 0.65, (32, 64): 0.45}
_SMALLEST_M, _SMALLEST_N = 32, 64
_STEPS_PER_SPLIT = 8
_MOST_SPLITS = 16
_MOST_BLOCKS_PER_PROCESSOR = 16  # of 128 threads
_LARGEST_BLOCK = 128
# Channels of a tap from which on the kernels take the taps one by one; of fewer, a filter row at a time.
_MANY_CHANNELS = 16
_COPIED_BYTES = 8
_INT32 = 2**31 - 1

NO_VECTORS = (None,) * 4

_forced: ContextVar[ConvConfig | None] = ContextVar("resfuse_cuda_conv_config", default=None)


@contextlib.contextmanager
def use_config(config: ConvConfig | None) -> Iterator[None]:
    """Every convolution inside the context runs with this configuration; None is the heuristic's choice."""
    token = _forced.set(config)
    dispatch.forget_choices()  # with which routes are kept
    try:
        yield
    finally:
        _forced.reset(token)
        dispatch.forget_choices()


def unsupported_reasons(problem: Problem) -> list[str]:
    """Convolution shapes that the kernels cannot run; dtype and device are the backend's to judge."""
    weight_shape, convolution = problem.weight_shape, problem.convolution
    assert weight_shape is not None and convolution is not None
    if len(problem.shape) != 4 or len(weight_shape) != 4:
        return [f"cuda convolves (N, C, H, W) tensors, not shape {tuple(problem.shape)}"]
    n, k, oh, ow = conv_output_shape(problem.shape, weight_shape, convolution)
    groups = convolution.groups
    reasons = []
    if cdiv(n * oh * ow, _SMALLEST_M) * groups * cdiv(k // groups, _SMALLEST_N) > _INT32:
        reasons.append("cuda counts the tiles of a convolution in 31 bits")
    if oh * ow > _INT32 - _LARGEST_BLOCK or max(*problem.shape, *weight_shape) > _INT32:
        reasons.append("cuda counts the pixels of an image, and every dimension, in 31 bits")
    return reasons


def heuristic_config(pixels: int, filters: int, depth: int, groups: int, training: bool, processors: int) -> ConvConfig:
    """The tile with the shortest estimated time: the products of the busiest multiprocessor, by the tile's efficiency.

    Args:
        pixels: GEMM M, N * OH * OW.
        filters: GEMM N, output channels of a group.
        depth: steps of the main loop: filter taps times blocks of 64 bytes of channels.
        groups: of the convolution.
        training: no splits.
        processors: multiprocessors of the device.
    """

    def tiles(tile: Pair) -> int:
        return cdiv(pixels, tile[0]) * cdiv(filters, tile[1]) * groups

    def time(tile: Pair) -> float:
        return cdiv(tiles(tile), processors) * tile[0] * tile[1] / _EFFICIENCY[tile]

    best = min(TILES, key=time)
    idle = processors // tiles(best)  # further blocks that would still find a multiprocessor
    splits = 1 if training else max(1, min(idle, depth // _STEPS_PER_SPLIT, _MOST_SPLITS))
    return ConvConfig(*best, splits)


def conv_bn_act_forward(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    convolution: Convolution,
    bn: BatchNorm,
    residual: Tensor | None,
    relu: bool,
    overwrite_residual: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(output, z, mean, invstd); the last three are None without `training`."""
    if not bn.training:
        output = _inference(input, conv_weight, conv_bias, convolution, bn, residual, relu, overwrite_residual)
        return output, None, None, None
    memory_format = conv_memory_format(input, conv_weight)
    plan = planned(
        input.shape, conv_weight.shape, convolution, True, input.dtype, processors_of(input.device), _forced.get()
    )
    x, w = input, conv_weight.to(input.dtype)
    if plan.channels != x.shape[1]:
        x, w = padded(x, plan.channels), padded(w, plan.channels)
    x, w = channels_last(x), channels_last(w)
    output = torch.empty(plan.output, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    residual = residual_for(output, residual)
    vectors = tuple(kernel_vector(vector, input) for vector in (conv_bias, *bn[:4]))
    z = torch.empty_like(output)
    mean, invstd = (torch.empty(w.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    workspace = torch.empty(plan.workspace, dtype=torch.float32, device=x.device)
    block_m, block_n, _, launches = plan.config
    _conv_train_forward(
        x, w, *vectors, residual, relu, bn.momentum, bn.eps, *plan.geometry, uses_tf32(x), block_m, block_n, launches,
        workspace, z, output, mean, invstd,
    )  # fmt: skip
    copy_back(bn, *vectors[1:3])
    return output.contiguous(memory_format=memory_format), z.contiguous(memory_format=memory_format), mean, invstd


def conv_forward(input: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, convolution: Convolution) -> Tensor:
    """conv2d(input, conv_weight) + conv_bias."""
    return _inference(input, conv_weight, conv_bias, convolution, None, None, False, False)


def _inference(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    convolution: Convolution,
    bn: BatchNorm | None,
    residual: Tensor | None,
    relu: bool,
    overwrite_residual: bool,
) -> Tensor:
    """act(BN(conv(input)) + residual) with running statistics, or (bn None) the convolution alone.

    Host time counts: it is most of what a small batch takes.
    """
    dtype, x, w = input.dtype, input, conv_weight
    if w.dtype is not dtype:  # under autocast
        w = w.to(dtype)
    if residual is not None and residual.shape[1] < w.shape[0]:
        residual, overwrite_residual = padded(residual, w.shape[0]), True
    channels, settings = _settings(
        x.device, dtype, x.shape, w.shape, convolution, bn.eps if bn else 0.0, relu, overwrite_residual,
        uses_tf32(x), _forced.get(),
    )  # fmt: skip
    if channels != x.shape[1]:
        x, w = padded(x, channels), padded(w, channels)
    vectors = bn[:4] if bn else NO_VECTORS
    output: Tensor = _conv_inference_forward(x, w, conv_bias, *vectors, residual, settings)
    return output if x is input else output.contiguous(memory_format=conv_memory_format(input, conv_weight))


def inference_route(
    problem: Problem, eps: float, relu: bool, overwrite_residual: bool
) -> tuple[Any, tuple[Any, ...]] | None:
    """The operator for inference, and what it takes after the tensors; None where channels have to be padded."""
    device, dtype, shape, weight_shape, convolution = problem[1:6]
    assert weight_shape is not None and convolution is not None and isinstance(device, torch.device)
    channels, settings = _settings(
        device, dtype, shape, weight_shape, convolution, eps, relu, overwrite_residual, problem.tf32, _forced.get()
    )
    return (_conv_inference_forward, (settings,)) if channels == shape[1] else None


class Plan(NamedTuple):
    """The part of a launch that follows from the shapes alone, worked out once per problem."""

    output: tuple[int, int, int, int]
    channels: int
    """Input channels that the kernels read, with padding."""
    geometry: tuple[int, ...]
    """Stride, padding and dilation, each (vertical, horizontal), and groups."""
    config: ConvConfig
    workspace: int
    """Float32 values, or 0."""


@functools.lru_cache(maxsize=4096)
def _settings(
    device: torch.device,
    dtype: torch.dtype,
    input_shape: torch.Size,
    weight_shape: torch.Size,
    convolution: Convolution,
    eps: float,
    relu: bool,
    overwrite_residual: bool,
    tf32: bool,
    forced: ConvConfig | None,
) -> tuple[int, Tensor]:
    """Input channels with padding, and the `settings` of the operator for inference."""
    plan = planned(input_shape, weight_shape, convolution, False, dtype, processors_of(device), forced)
    numbers = (*plan.geometry, eps, relu, overwrite_residual, tf32, *plan.config, plan.workspace)
    return plan.channels, numbers_of(numbers)


def numbers_of(numbers: tuple[float, ...]) -> Tensor:
    """The numbers in one tensor on the CPU, which PyTorch passes on to an operator faster than numbers."""
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


@functools.lru_cache(maxsize=4096)
def planned(
    input_shape: torch.Size,
    weight_shape: torch.Size,
    convolution: Convolution,
    training: bool,
    dtype: torch.dtype,
    processors: int,
    forced: ConvConfig | None = None,
) -> Plan:
    """The launch of a convolution on a GPU with so many multiprocessors, which need not be there."""
    stride, padding, dilation, groups = convolution
    output = conv_output_shape(input_shape, weight_shape, convolution)
    pixels, filters = output[0] * output[2] * output[3], output[1]
    channels = input_shape[1]
    multiple = _COPIED_BYTES // dtype.itemsize
    if groups == 1 and channels < _MANY_CHANNELS and weight_shape[3] > 1 and pixels >= stems.PADDED_FROM:
        channels = round_up(channels, multiple)
    depth = weight_shape[2] * weight_shape[3] * cdiv(channels // groups, 64 // dtype.itemsize)
    config = forced or heuristic_config(pixels, filters // groups, depth, groups, training, processors)
    if training:  # a mean and an M2 of each channel for each block that works on it
        resident = processors * _MOST_BLOCKS_PER_PROCESSOR
        parts = min(cdiv(pixels, _SMALLEST_M) * filters, max(filters, resident * _LARGEST_BLOCK))
        workspace = 2 * parts
    else:
        rows, columns = round_up(pixels, _LARGEST_BLOCK), groups * round_up(filters // groups, _LARGEST_BLOCK)
        workspace = config.splits * rows * columns if config.splits > 1 else 0
    return Plan(output, channels, (*stride, *padding, *dilation, groups), config, workspace)


@functools.cache
def processors_of(device: torch.device) -> int:
    """Multiprocessors of a GPU; the emulator, which has CPU tensors, keeps four blocks resident."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def uses_tf32(x: Tensor) -> bool:
    return x.dtype is torch.float32 and dispatch.uses_tf32()


def padded(tensor: Tensor, channels: int) -> Tensor:
    """A copy in NHWC memory with zeros for further channels, in one launch."""
    copy: Tensor = _pad_channels(tensor, channels, tensor.shape[3], 1, 1, 0, 1)
    return copy


def packed(
    input: Tensor, conv_weight: Tensor, convolution: Convolution, channels: int
) -> tuple[Tensor, Tensor, Convolution]:
    """The same convolution with filters one pixel wide: a pixel has all channels that a filter row reads, and zeros.

    The padding becomes zeros, so that what is not finite meets the same weights as before.
    """
    width, taps = conv_output_shape(input.shape, conv_weight.shape, convolution)[3], conv_weight.shape[3]
    (down, across), (above, beside), (apart, aside), groups = convolution
    x: Tensor = _pad_channels(input, channels, width, taps, across, beside, aside)
    w: Tensor = _pad_channels(conv_weight, channels, 1, taps, 0, 0, 1)
    return x, w, Convolution((down, 1), (above, 0), (apart, 1), groups)
