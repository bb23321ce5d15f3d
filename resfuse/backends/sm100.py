"""Convolutions on Blackwell in inference, on request: the kernel of csrc/cuda/sm100, whose products tcgen05 computes.

No GPU has run it yet, and nothing here emulates tcgen05.  `resfuse.backends.reference` specifies each function; memory
is NHWC as in `cuda_conv`, and TMA has the limits that it has in `sm90`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from resfuse import _extension
from resfuse.backends import cuda, sm90
from resfuse.backends.cuda_conv import NO_VECTORS, numbers_of, padded, processors_of
from resfuse.layout import conv_memory_format, conv_output_shape
from resfuse.types import AbsentDevice, BatchNorm, Convolution, Problem

KERNELS = ("conv_bn_act_forward", "conv_forward")
DTYPES = (torch.bfloat16, torch.float16)
CAPABILITY = (10, 0)  # instructions of sm_100a run nowhere else
TILES = (128, 64)
"""Output channels of a tile: those of csrc/cuda/sm100/conv.cu."""
_GRID = 2**16 - 1  # blocks in its second dimension, of which one is a tile of channels

# The implementation is in csrc/bindings_sm100.cpp.
_LIBRARY = torch.library.Library("resfuse_sm100", "DEF")
_LIBRARY.define(
    "conv_forward(Tensor input, Tensor conv_weight, Tensor? conv_bias, Tensor? running_mean, Tensor? running_var, "
    "Tensor? weight, Tensor? bias, Tensor? residual, Tensor settings) -> Tensor"
)
_conv_forward = torch.ops.resfuse_sm100.conv_forward.default


def unavailable_reason() -> str | None:
    return cuda.unavailable_reason() or _extension.load("_sm100")


def only_on_request_reason() -> str | None:
    return "sm100 has never run on a GPU: only use_backend takes it"


def unsupported_reasons(problem: Problem) -> list[str]:
    if problem.device.type != "cuda":
        return [f"sm100 needs tensors on a CUDA device, not on {problem.device}"]
    reasons = []
    if problem.capability != CAPABILITY:
        reasons.append(f"sm100 needs compute capability 10.0, not {'.'.join(map(str, problem.capability))}")
    if problem.dtype not in DTYPES:
        reasons.append(f"sm100 computes in bfloat16 and float16, not {problem.dtype}")
    if problem.training:
        reasons.append("sm100 has no kernel for training")
    assert problem.weight_shape is not None
    if problem.weight_shape[0] > _GRID * TILES[-1]:
        reasons.append(f"sm100 has up to {_GRID * TILES[-1]} filters")
    on_hopper = problem._replace(device=AbsentDevice(sm90.CAPABILITY), dtype=DTYPES[0])
    return reasons + [reason.replace("sm90", "sm100") for reason in sm90.unsupported_reasons(on_hopper)]


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
    """(output, None, None, None): without `training`."""
    if bn.training:
        raise RuntimeError("sm100 has no kernel for training")
    return _run(input, conv_weight, conv_bias, convolution, bn, residual, relu, overwrite_residual), None, None, None


def conv_forward(input: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, convolution: Convolution) -> Tensor:
    """conv2d(input, conv_weight) + conv_bias."""
    return _run(input, conv_weight, conv_bias, convolution, None, None, False, False)


def _run(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    convolution: Convolution,
    bn: BatchNorm | None,
    residual: Tensor | None,
    relu: bool,
    overwrite_residual: bool,
) -> Tensor:
    """One launch: act(BN(conv(input)) + residual) with running statistics, or (bn None) the convolution alone."""
    x, w, convolution = sm90.operands(input, conv_weight, convolution)
    if residual is not None and residual.shape[1] < conv_weight.shape[0]:
        residual, overwrite_residual = padded(residual, conv_weight.shape[0]), True
    eps, vectors = (bn.eps, bn[:4]) if bn else (0.0, NO_VECTORS)
    settings = _settings(x.device, x.shape, w.shape, convolution, eps, relu, overwrite_residual)
    output: Tensor = _conv_forward(x, w, conv_bias, *vectors, residual, settings)
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
) -> Tensor:
    """The `settings` of the operator."""
    n, filters, height, width = conv_output_shape(input_shape, weight_shape, convolution)
    tile = min(sm90.tile_for(n * height * width, filters, processors_of(device)), TILES[0])
    stride, padding, dilation, groups = convolution
    return numbers_of((*stride, *padding, *dilation, groups, eps, relu, overwrite_residual, tile))
