"""Shapes and memory formats, shared by all layers of the package."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from resfuse.types import BatchNorm, Convolution, Pooling


def is_channels_last(tensor: Tensor) -> bool:
    """True if a 4-D tensor's strides are those of NHWC memory (sliced or not), by PyTorch's own reading of strides.

    A tensor that is both (one channel, or one pixel) counts as channels_last only if its strides say so.
    """
    stride = tensor.stride()
    return stride[1] == 1 and stride[3] >= tensor.shape[1] and (stride[3] > 1 or stride[2] > 1)


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """`channels_last` or `contiguous_format`, whichever the 4-D tensor's strides follow."""
    return torch.channels_last if is_channels_last(tensor) else torch.contiguous_format


def share_storage(one: Tensor, other: Tensor) -> bool:
    """True if two tensors are parts of the same memory, whether or not they overlap."""
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def conv_memory_format(input: Tensor, conv_weight: Tensor) -> torch.memory_format:
    """Memory format of a convolution's output: channels_last if the input or the weight is (PyTorch's own rule)."""
    if is_channels_last(input) or is_channels_last(conv_weight):
        return torch.channels_last
    return torch.contiguous_format


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself if it is dense in NCHW or NHWC order, else a copy that is."""
    return tensor if _is_dense(tensor) else tensor.contiguous(memory_format=memory_format_of(tensor))


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)


def channels_last(tensor: Tensor) -> Tensor:
    """The tensor itself if it is dense in NHWC order, as the convolution kernels require, else a copy that is."""
    return tensor.contiguous(memory_format=torch.channels_last)


def gapless(tensor: Tensor) -> Tensor:
    """The tensor itself, of any rank, if its memory has no gaps or overlaps, else a copy that has none."""
    if tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        return tensor  # fast path
    if torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return tensor
    return torch.empty_like(tensor).copy_(tensor)


@overload
def ordered_like(tensor: Tensor, like: Tensor) -> Tensor: ...
@overload
def ordered_like(tensor: Tensor | None, like: Tensor) -> Tensor | None: ...
def ordered_like(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """The tensor with the element order of `like`, which is gapless; copied if its own order differs."""
    if tensor is None or tensor.stride() == like.stride():
        return tensor
    strides = zip(tensor.shape, tensor.stride(), like.stride(), strict=True)
    if all(size <= 1 or stride == wanted for size, stride, wanted in strides):  # size 1: any stride will do
        return tensor
    return torch.empty_like(like).copy_(tensor)


def empty_result(input: Tensor) -> Tensor:
    """An uninitialised result of batch norm, with the strides of `input` if that is dense, else dense."""
    if _is_dense(input):
        return torch.empty_like(input)
    return torch.empty_like(input, memory_format=memory_format_of(input))


def as_result(tensor: Tensor, input: Tensor) -> Tensor:
    """The tensor, or a copy of it, with the strides of `empty_result(input)`."""
    if _is_dense(input):
        return like_strides(tensor, input)
    return tensor.contiguous(memory_format=memory_format_of(input))


def like_strides(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor, or a copy of it, with the strides of `torch.empty_like(like)`."""
    if tensor.stride() == like.stride():
        return tensor
    result = torch.empty_like(like, dtype=tensor.dtype)
    return tensor if tensor.stride() == result.stride() else result.copy_(tensor)


def place_padded(residual: Tensor, output: Tensor) -> Tensor:
    """Fill `output` with a residual of fewer channels, followed by zeros, and return it.

    A kernel that reads the residual and writes the output element by element can take it as both.
    """
    channels = residual.shape[1]
    output[:, channels:].zero_()
    output[:, :channels].copy_(residual)
    return output


def residual_for(output: Tensor, residual: Tensor | None) -> Tensor | None:
    """The residual in the element order of `output`; one of fewer channels is written, padded, into `output` itself."""
    if residual is not None and residual.shape[1] < output.shape[1]:
        return place_padded(residual, output)
    return ordered_like(residual, output)


def conv_output_shape(
    input_shape: torch.Size, weight_shape: torch.Size, convolution: Convolution
) -> tuple[int, int, int, int]:
    """(N, K, OH, OW) of a convolution of an (N, C, H, W) input with a (K, C/groups, R, S) weight."""
    stride, padding, dilation, _ = convolution
    height, width = (
        (input_shape[i + 2] + 2 * padding[i] - dilation[i] * (weight_shape[i + 2] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    )
    return input_shape[0], weight_shape[0], height, width


def pool_output_size(input_shape: torch.Size, pooling: Pooling) -> tuple[int, int]:
    """(OH, OW) of a max pooling of an (N, C, H, W) input."""

    def size(i: int) -> int:
        extent, padding, stride = input_shape[i + 2], pooling.padding[i], pooling.stride[i]
        distance = extent + 2 * padding - pooling.dilation[i] * (pooling.kernel_size[i] - 1) - 1
        count = (distance + (stride - 1 if pooling.ceil_mode else 0)) // stride + 1
        return count - (pooling.ceil_mode and (count - 1) * stride >= extent + padding)  # no window begins in padding

    return size(0), size(1)


@overload
def kernel_vector(vector: Tensor, input: Tensor) -> Tensor: ...
@overload
def kernel_vector(vector: Tensor | None, input: Tensor) -> Tensor | None: ...
def kernel_vector(vector: Tensor | None, input: Tensor) -> Tensor | None:
    """The vector itself where it is contiguous and in float32 or in the dtype of `input`, else a copy."""
    if vector is None:
        return None
    if vector.dtype != torch.float32 and vector.dtype != input.dtype:
        vector = vector.float()
    return vector.contiguous()


def copy_back(bn: BatchNorm, means: Tensor | None, variances: Tensor | None) -> None:
    """Give running statistics that kernels could not write in place (a view, another dtype) their new values."""
    for statistic, value in ((bn.running_mean, means), (bn.running_var, variances)):
        if statistic is not None and value is not None and value is not statistic:
            statistic.copy_(value)
