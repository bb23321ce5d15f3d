"""Convolutions on Hopper: the kernel of csrc/cuda/sm90, whose operands TMA loads and wgmma multiplies.

In training it is followed by the second half of the cuda backend's batch norm, which merges the statistics that the
convolution leaves.  `resfuse.backends.reference` specifies each function; memory is NHWC as in `cuda_conv`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from resfuse import _extension
from resfuse.backends import cuda
from resfuse.backends.cuda_conv import nhwc_operands, output_and_residual, processors_of
from resfuse.backends.integers import cdiv
from resfuse.layout import conv_memory_format, conv_output_shape, kernel_vector
from resfuse.types import BatchNorm, Convolution, Problem

KERNELS = ("conv_bn_act_forward", "conv_forward")
DTYPES = (torch.bfloat16, torch.float16)
"""Not float32: TMA can hand wgmma TF32 operands, but whether it rounds them is not documented."""
CAPABILITY = (9, 0)  # instructions of sm_90a run nowhere else
MULTIPLE = 8  # channels and filters: 16 bytes

TILE_PIXELS = 128
TILES = (256, 128, 64)
"""Output channels of a tile: those of csrc/cuda/sm90/conv_launch.cuh."""
# What part of its peak a tile's main loop should reach: of fewer channels, wgmma waits for shared memory.  Estimates,
# not measured.
_EFFICIENCY = {256: 1.0, 128: 0.9, 64: 0.65}
_FEWEST_TILES = 64
_INT32 = 2**31 - 1

# The implementation is in csrc/bindings_sm90.cpp.
_LIBRARY = torch.library.Library("resfuse_sm90", "DEF")
_LIBRARY.define(
    "conv_forward(Tensor input, Tensor conv_weight, Tensor? conv_bias, Tensor? running_mean, Tensor? running_var, "
    "Tensor? weight, Tensor? bias, Tensor? residual, bool relu, float eps, int stride_h, int stride_w, int padding_h, "
    "int padding_w, int dilation_h, int dilation_w, int groups, int tile_n, int blocks, int tiles_per_part, "
    "Tensor(a!)? parts, Tensor(b!) output) -> ()"
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
        reasons.append(f"sm90 computes in bfloat16 and float16, not {problem.dtype}")
    assert problem.weight_shape is not None and problem.convolution is not None
    return reasons + _unsupported_shapes(problem.shape, problem.weight_shape, problem.convolution)


def _unsupported_shapes(shape: torch.Size, weight_shape: torch.Size, convolution: Convolution) -> list[str]:
    if len(shape) != 4 or len(weight_shape) != 4:
        return [f"sm90 convolves (N, C, H, W) tensors, not shape {tuple(shape)}"]
    n, k, oh, ow = conv_output_shape(shape, weight_shape, convolution)
    if 0 in (*shape, *weight_shape):
        return ["sm90 has no kernel for an empty tensor"]
    reasons = []
    if convolution.groups > 1:
        reasons.append("sm90 has no groups")
    if shape[1] % MULTIPLE or k % MULTIPLE:
        reasons.append(f"sm90 needs multiples of {MULTIPLE} channels, 16 bytes for TMA, not {shape[1]} and {k}")
    axes = zip(*convolution[:3], weight_shape[2:], strict=True)
    if any(stride > 8 or pad > 127 or dilation * (taps - 1) > pad + 128 for stride, pad, dilation, taps in axes):
        reasons.append("TMA takes strides up to 8, a padding up to 127, and filters up to 128 pixels into the image")
    pixels = n * oh * ow
    if max(*shape, *weight_shape, pixels + TILE_PIXELS, _tiles(pixels, k, TILES[-1])) > _INT32:
        reasons.append("sm90 counts pixels and tiles in 31 bits")
    if _tiles(pixels, k, TILES[-1]) < _FEWEST_TILES:
        reasons.append(f"sm90 does not split sums: fewer than {_FEWEST_TILES} tiles leave most of the GPU idle")
    return reasons


def _tiles(pixels: int, filters: int, tile: int) -> int:
    return cdiv(pixels, TILE_PIXELS) * cdiv(filters, tile)


class Plan(NamedTuple):
    """The part of a launch that follows from the shapes alone, worked out once per problem."""

    output: tuple[int, int, int, int]
    geometry: tuple[int, ...]
    """The operator's arguments from stride_h to groups."""
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
    output = conv_output_shape(input_shape, weight_shape, convolution)
    pixels, filters = output[0] * output[2] * output[3], output[1]
    tile = tile_for(pixels, filters, processors)
    tiles_per_part = parts = 0
    if training:  # a block keeps to its channels
        tiles = cdiv(pixels, TILE_PIXELS)
        tiles_per_part = cdiv(tiles, max(1, processors // cdiv(filters, tile)))
        parts = cdiv(tiles, tiles_per_part)
    stride, padding, dilation, groups = convolution
    return Plan(output, (*stride, *padding, *dilation, groups), tile, processors, tiles_per_part, parts)


def _planned(input: Tensor, conv_weight: Tensor, convolution: Convolution, training: bool) -> Plan:
    return planned(input.shape, conv_weight.shape, convolution, training, processors_of(input.device))


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
    memory_format = conv_memory_format(input, conv_weight)
    plan = _planned(input, conv_weight, convolution, bn.training)
    x, w = _operands(input, conv_weight)
    if bn.training:
        z, _ = output_and_residual(x, plan.output)
        parts = torch.empty(2 * plan.parts * z.shape[1], dtype=torch.float32, device=x.device)
        _run(x, w, conv_bias, None, None, False, plan, parts, z)
        known_part = plan.tiles_per_part * TILE_PIXELS
        output, mean, invstd = cuda.bn_train_forward(z, bn, residual, relu, parts, known_part)
        return output.contiguous(memory_format=memory_format), z.contiguous(memory_format=memory_format), mean, invstd
    output, residual = output_and_residual(x, plan.output, residual, overwrite_residual)
    if residual is not None and not _is_aligned(residual):
        output, residual = torch.empty_like(output), residual.clone()
    _run(x, w, conv_bias, bn, residual, relu, plan, None, output)
    return output.contiguous(memory_format=memory_format), None, None, None


def conv_forward(input: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, convolution: Convolution) -> Tensor:
    """conv2d(input, conv_weight) + conv_bias."""
    plan = _planned(input, conv_weight, convolution, training=False)
    x, w = _operands(input, conv_weight)
    output, _ = output_and_residual(x, plan.output)
    _run(x, w, conv_bias, None, None, False, plan, None, output)
    return output.contiguous(memory_format=conv_memory_format(input, conv_weight))


def _run(
    x: Tensor,
    w: Tensor,
    conv_bias: Tensor | None,
    bn: BatchNorm | None,
    residual: Tensor | None,
    relu: bool,
    plan: Plan,
    parts: Tensor | None,
    output: Tensor,
) -> None:
    vectors = (kernel_vector(vector, x) for vector in (conv_bias, *(bn[:4] if bn else (None,) * 4)))
    _conv_forward(
        x, w, *vectors, residual, relu, bn.eps if bn else 0.0, *plan.geometry, plan.tile, plan.blocks,
        plan.tiles_per_part, parts, output,
    )  # fmt: skip


def _operands(input: Tensor, conv_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in NHWC memory, in the input's dtype, and where TMA can read them."""
    x, w = nhwc_operands(input, conv_weight)
    return x if _is_aligned(x) else x.clone(), w if _is_aligned(w) else w.clone()


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0
