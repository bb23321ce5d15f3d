"""Convolutions of the CPU backend: csrc/cpu/conv*, with batch norm, residual and ReLU in the epilogue.

Nothing is folded and nothing is kept: every call reads the raw weight and the raw tensors of batch norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resfuse.backends import cpu_kernels, reference
from resfuse.layout import is_channels_last
from resfuse.types import BatchNorm, Convolution

# Looked up once: every call counts.
_inference_forward = cpu_kernels.conv_inference_forward
_statistics_forward = cpu_kernels.conv_statistics_forward
_input_grad = cpu_kernels.conv_input_grad


def conv_bn_act_inference(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    convolution: Convolution,
    bn: BatchNorm,
    residual: Tensor | None,
    relu: bool,
    overwrite_residual: bool = False,
) -> Tensor:
    """act(BN(conv(input)) + residual) with running statistics; `overwrite_residual` gives up the residual's memory."""
    stride, padding, dilation, groups = convolution
    return _inference_forward(
        input, _readable(conv_weight, input), conv_bias, *bn[:4], residual,
        (*stride, *padding, *dilation, groups), bn.eps, relu, overwrite_residual,
    )  # fmt: skip


def conv_forward(input: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, convolution: Convolution) -> Tensor:
    """z = conv(input) + conv_bias."""
    stride, padding, dilation, groups = convolution
    return _inference_forward(
        input, _readable(conv_weight, input), conv_bias, None, None, None, None, None,
        (*stride, *padding, *dilation, groups), 0.0, False, False,
    )  # fmt: skip


def conv_statistics_forward(
    input: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, convolution: Convolution
) -> tuple[Tensor, Tensor]:
    """z = conv(input) + conv_bias, and its mean and M2 per channel as (2, K) in float64, taken as z is written."""
    stride, padding, dilation, groups = convolution
    return _statistics_forward(input, conv_weight, conv_bias, (*stride, *padding, *dilation, groups))


def conv_backward(
    grad_output: Tensor,
    input: Tensor,
    conv_weight: Tensor,
    convolution: Convolution,
    needs_grad: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(grad_input, grad_weight, grad_bias): the first by the forward kernels where it can be, the others by PyTorch.

    Groups in bfloat16 are PyTorch's: it multiplies pairs where the forward kernels widen, in down to half the time.
    """
    stride, padding, dilation, groups = convolution
    own = (
        needs_grad[0]
        and stride == (1, 1)
        and padding[0] <= dilation[0] * (conv_weight.shape[2] - 1)
        and padding[1] <= dilation[1] * (conv_weight.shape[3] - 1)
        and is_channels_last(input)
        and (groups == 1 or input.dtype is torch.float32)
    )
    if not own:
        return reference.conv_backward(grad_output, input, conv_weight, convolution, needs_grad)
    grad_input = _input_grad(grad_output, conv_weight, (*stride, *padding, *dilation, groups))
    grad_weight = grad_bias = None
    if needs_grad[1] or needs_grad[2]:
        others = (False, needs_grad[1], needs_grad[2])
        _, grad_weight, grad_bias = reference.conv_backward(grad_output, input, conv_weight, convolution, others)
    return grad_input, grad_weight, grad_bias


def _readable(conv_weight: Tensor, input: Tensor) -> Tensor:
    """Kernels read weights in float32 as well as in the dtype of the input; autocast may bring others."""
    dtype = conv_weight.dtype
    return conv_weight if dtype is input.dtype or dtype is torch.float32 else conv_weight.to(input.dtype)
