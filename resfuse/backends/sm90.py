"""Convolutions on Hopper: the kernel of csrc/cuda/sm90, whose operands TMA loads and wgmma multiplies.

In training it is followed by the second half of the cuda backend's batch norm, which merges the statistics that the
convolution leaves.  `resfuse.backends.reference` specifies each function; memory is NHWC as in `cuda_conv`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resfuse import _extension
from resfuse.backends import cuda, stems
from resfuse.backends.cuda_conv import NO_VECTORS, numbers_of, packed, padded, processors_of
from resfuse.backends.integers import cdiv, round_up
from resfuse.layout import channels_last, conv_memory_format, conv_output_shape
from resfuse.types import BatchNorm, Convolution, Problem

KERNELS = ("conv_bn_act_forward", "conv_forward")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""The last as TF32, where PyTorch allows that."""
CAPABILITY = (9, 0)  # instructions of sm_90a run nowhere else

TILE_PIXELS = 128
TILES = (256, 128, 64)
"""Output channels of a tile: those of csrc/cuda/sm90/conv_launch.cuh."""
# What part of its peak a tile's main loop should reach: of fewer channels, wgmma waits for shared memory.  Estimates,
# not measured.
_EFFICIENCY = {256: 1.0, 128: 0.9, 64: 0.65}
_FEWEST_TILES = 64
# An image's channels are few for a step of the main loop, which has 128 bytes of those of one tap: so the taps of a
# filter row are packed into one pixel, by a launch each for input and weight.  Of the 7x7 stem in bfloat16, the loop
# multiplies 7 x 64 instead of 147 (padded to 8 channels, 49 x 64).  For 128 images on an H200, at 800 TFLOP/s and 4.8
# TB/s: 0.06 ms to pack (39 MB become 154), then 0.18 ms for 92 GFLOP at this tile's efficiency, against 0.32 ms in
# Triton by its own model.  Predicted, not measured.
_FEW_CHANNELS = 4
_INT32 = 2**31 - 1

# The implementation is in csrc/bindings_sm90.cpp.  It takes tensors in any layout, copies what TMA cannot read, and
# returns a new tensor or the residual.
_LIBRARY = torch.library.Library("resfuse_sm90", "DEF")
_LIBRARY.define(
    "conv_forward(Tensor input, Tensor conv_weight, Tensor? conv_bias, Tensor? running_mean, Tensor? running_var, "
    "Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? parts, Tensor settings) -> Tensor"
)
_conv_forward = torch.ops.resfuse_sm90.conv_forward.default


def unavailable_reason() -> str | None:
    return cuda.unavailable_reason() or _extension.load("_sm90")


def only_on_request_reason() -> str | None:
    return None


def unsupported_reasons(problem: Problem) -> list[str]:
    if problem.device.type != "cuda":
        return [f"sm90 needs tensors on a CUDA device, not on {problem.device}"]
    reasons = []
    if problem.capability != CAPABILITY:
        reasons.append(f"sm90 needs compute capability 9.0, not {'.'.join(map(str, problem.capability))}")
    if problem.dtype not in DTYPES:
        reasons.append(f"sm90 computes in bfloat16, float16 and TF32, not {problem.dtype}")
    elif problem.dtype == torch.float32 and not problem.tf32:
        reasons.append("sm90 multiplies float32 as TF32, which torch.backends.cudnn.conv.fp32_precision does not allow")
    assert problem.weight_shape is not None and problem.convolution is not None
    multiple = 16 // problem.dtype.itemsize
    return reasons + _unsupported_shapes(problem.shape, problem.weight_shape, problem.convolution, multiple)


def _unsupported_shapes(
    shape: torch.Size, weight_shape: torch.Size, convolution: Convolution, multiple: int
) -> list[str]:
    if len(shape) != 4 or len(weight_shape) != 4:
        return [f"sm90 convolves (N, C, H, W) tensors, not shape {tuple(shape)}"]
    n, k, oh, ow = conv_output_shape(shape, weight_shape, convolution)
    if 0 in (*shape, *weight_shape):
        return ["sm90 has no kernel for an empty tensor"]
    reasons = []
    if convolution.groups > 1:
        reasons.append("sm90 has no groups")
    packs = _row_channels(shape, weight_shape, convolution, multiple) > 0
    if (shape[1] % multiple and not packs) or k % multiple:
        reasons.append(f"sm90 needs multiples of {multiple} channels, 16 bytes for TMA, not {shape[1]} and {k}")
    axes = zip(*convolution[:3], weight_shape[2:], strict=True)
    if any(stride > 8 or pad > 127 or dilation * (taps - 1) > pad + 128 for stride, pad, dilation, taps in axes):
        reasons.append("TMA takes strides up to 8, a padding up to 127, and filters up to 128 pixels into the image")
    pixels = n * oh * ow
    if max(*shape, *weight_shape, pixels + TILE_PIXELS, _tiles(pixels, k, TILES[-1])) > _INT32:
        reasons.append("sm90 counts pixels and tiles in 31 bits")
    if _tiles(pixels, k, TILES[-1]) < _FEWEST_TILES:
        reasons.append(f"sm90 does not split sums: fewer than {_FEWEST_TILES} tiles leave most of the GPU idle")
    return reasons


def _row_channels(shape: torch.Size, weight_shape: torch.Size, convolution: Convolution, multiple: int) -> int:
    """Channels of a pixel into which the taps of a filter row are packed; 0 where they are not."""
    if shape[1] > _FEW_CHANNELS or weight_shape[3] == 1 or convolution.groups > 1:
        return 0
    n, _, oh, ow = conv_output_shape(shape, weight_shape, convolution)
    channels = round_up(shape[1] * weight_shape[3], multiple)
    return channels if channels <= 8 * multiple and n * oh * ow >= stems.PACKED_FROM else 0  # one step for a row


def _tiles(pixels: int, filters: int, tile: int) -> int:
    return cdiv(pixels, TILE_PIXELS) * cdiv(filters, tile)


class Plan(NamedTuple):
    """The part of a launch that follows from the shapes alone, worked out once per problem."""

    geometry: tuple[int, ...]
    """Stride, padding and dilation, each (vertical, horizontal), and groups."""
    tile: int
    """Output channels."""
    blocks: int
    tiles_per_part: int
    """Neighbouring tiles whose statistics a block merges in training; 0 in inference."""
    parts: int


def tile_for(pixels: int, filters: int, processors: int) -> int:
    """The tile with the shortest estimated time: the products of the busiest multiprocessor, by its efficiency."""
    return min(TILES, key=lambda tile: cdiv(_tiles(pixels, filters, tile), processors) * tile / _EFFICIENCY[tile])


@functools.lru_cache(maxsize=4096)
def planned(
    input_shape: torch.Size, weight_shape: torch.Size, convolution: Convolution, training: bool, processors: int
) -> Plan:
    """The launch of a convolution on a GPU with so many multiprocessors, which need not be there."""
    n, filters, height, width = conv_output_shape(input_shape, weight_shape, convolution)
    pixels = n * height * width
    tile = tile_for(pixels, filters, processors)
    tiles_per_part = parts = 0
    if training:  # a block keeps to its channels
        tiles = cdiv(pixels, TILE_PIXELS)
        tiles_per_part = cdiv(tiles, max(1, processors // cdiv(filters, tile)))
        parts = cdiv(tiles, tiles_per_part)
    stride, padding, dilation, groups = convolution
    return Plan((*stride, *padding, *dilation, groups), tile, processors, tiles_per_part, parts)


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
        output = _run(input, conv_weight, conv_bias, convolution, bn, residual, relu, overwrite_residual)
        return output, None, None, None
    memory_format = conv_memory_format(input, conv_weight)
    x, w, convolution = operands(input, conv_weight, convolution)
    plan = planned(x.shape, w.shape, convolution, True, processors_of(x.device))
    parts = torch.empty(2 * plan.parts * w.shape[0], dtype=torch.float32, device=x.device)
    z = _run(channels_last(x), w, conv_bias, convolution, None, None, False, False, parts)
    known_part = plan.tiles_per_part * TILE_PIXELS
    output, mean, invstd = cuda.bn_train_forward(z, bn, residual, relu, parts, known_part)
    return output.contiguous(memory_format=memory_format), z.contiguous(memory_format=memory_format), mean, invstd


def conv_forward(input: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, convolution: Convolution) -> Tensor:
    """conv2d(input, conv_weight) + conv_bias."""
    return _run(input, conv_weight, conv_bias, convolution, None, None, False, False)


def inference_route(
    problem: Problem, eps: float, relu: bool, overwrite_residual: bool
) -> tuple[Any, tuple[Any, ...]] | None:
    """The operator for inference, and what it takes after the tensors; None where taps have to be packed."""
    device, dtype, shape, weight_shape, convolution = problem[1:6]
    assert weight_shape is not None and convolution is not None and isinstance(device, torch.device)
    if _row_channels(shape, weight_shape, convolution, 16 // dtype.itemsize):
        return None
    settings = _settings(device, shape, weight_shape, convolution, eps, relu, overwrite_residual, False)
    return _conv_forward, (None, settings)


def operands(input: Tensor, conv_weight: Tensor, convolution: Convolution) -> tuple[Tensor, Tensor, Convolution]:
    """Those of the problem that the kernel runs, in one dtype."""
    if conv_weight.dtype is not input.dtype:  # under autocast
        conv_weight = conv_weight.to(input.dtype)
    channels = _row_channels(input.shape, conv_weight.shape, convolution, 16 // input.dtype.itemsize)
    return packed(input, conv_weight, convolution, channels) if channels else (input, conv_weight, convolution)


def _run(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    convolution: Convolution,
    bn: BatchNorm | None,
    residual: Tensor | None,
    relu: bool,
    overwrite_residual: bool,
    parts: Tensor | None = None,
) -> Tensor:
    """One launch: act(BN(conv(input)) + residual) with running statistics, or (bn None) the convolution alone.

    Packing takes two more, where it is done.  In training it leaves the statistics of its tiles in `parts`.
    """
    x, w, convolution = operands(input, conv_weight, convolution)
    if residual is not None and residual.shape[1] < conv_weight.shape[0]:
        residual, overwrite_residual = padded(residual, conv_weight.shape[0]), True
    settings = _settings(
        x.device, x.shape, w.shape, convolution, bn.eps if bn else 0.0, relu, overwrite_residual, parts is not None
    )
    vectors = bn[:4] if bn else NO_VECTORS
    output: Tensor = _conv_forward(x, w, conv_bias, *vectors, residual, parts, settings)
    return output if x is input else output.contiguous(memory_format=conv_memory_format(input, conv_weight))


@functools.lru_cache(maxsize=4096)
def _settings(
    device: torch.device,
    input_shape: torch.Size,
    weight_shape: torch.Size,
    convolution: Convolution,
    eps: float,
    relu: bool,
    overwrite_residual: bool,
    training: bool,
) -> Tensor:
    """The `settings` of the operator."""
    plan = planned(input_shape, weight_shape, convolution, training, processors_of(device))
    return numbers_of((*plan.geometry, eps, relu, overwrite_residual, plan.tile, plan.blocks, plan.tiles_per_part))
