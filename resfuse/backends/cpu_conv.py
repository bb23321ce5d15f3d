"""Convolutions of the CPU backend: csrc/cpu/conv*, with batch norm, residual and ReLU in the epilogue.

Nothing is folded and nothing is kept: every call reads the raw weight and the raw tensors of batch norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resfuse.backends import cpu_kernels, reference
from resfuse.backends.cpu_kernels import conv_settings
from resfuse.layout import is_channels_last
from resfuse.types import BatchNorm, Convolution, InferenceCall, Pooling

# Looked up once: every call counts.
inference_operator = cpu_kernels.conv_inference_forward
_pool_forward = cpu_kernels.conv_pool_forward
_statistics_forward = cpu_kernels.conv_statistics_forward
_input_grad = cpu_kernels.conv_input_grad
_weight_grad = cpu_kernels.conv_weight_grad


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
    settings = conv_settings(convolution, bn.eps, relu, overwrite_residual, True)
    output = inference_operator(input, [_readable(conv_weight, input), conv_bias, *bn[:4], settings], residual)
    return _computed(output)


def checked_inference(
    input: Tensor, calls: Sequence[InferenceCall], residual: Tensor | None, *flags: bool, pooling: Pooling | None = None
) -> Tensor | None:
    """`conv_bn_act_inference` of arguments that nobody has checked; None for those that only PyTorch takes, or nobody.

    Each of several calls reads the output of the one before.  `flags` of the last one are overwrite_residual and
    pad_residual; where it has no residual, `pooling` is that of the output in the same call.
    """
    tensors: list[Tensor | None] = []
    try:
        for conv_weight, conv_bias, settings, bn, relu in calls:
            mean, var, weight, bias, _, _, eps = bn
            if mean is None or conv_weight.dtype is not input.dtype:
                return None
            tensors += conv_weight, conv_bias, mean, var, weight, bias, conv_settings(settings, eps, relu, *flags)
    except TypeError:  # lists have no hash
        return None
    if pooling is None:
        return inference_operator(input, tensors, residual)
    return None if pooling.ceil_mode else _pool_forward(input, *tensors, pooling.window())


def conv_forward(input: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, convolution: Convolution) -> Tensor:
    """z = conv(input) + conv_bias."""
    tensors = [_readable(conv_weight, input), conv_bias, None, None, None, None, conv_settings(convolution)]
    output = inference_operator(input, tensors, None)
    return _computed(output)


def conv_statistics_forward(
    input: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, convolution: Convolution
) -> tuple[Tensor, Tensor]:
    """z = conv(input) + conv_bias, and its mean and M2 per channel as (2, K) in float64, taken as z is written."""
    return _statistics_forward(input, conv_weight, conv_bias, conv_settings(convolution))


def conv_backward(
    grad_output: Tensor,
    input: Tensor,
    conv_weight: Tensor,
    convolution: Convolution,
    needs_grad: tuple[bool, ...],
    carried: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As `reference.conv_backward`; the gradients of input and weight by own kernels where those are faster.

    Groups in bfloat16 are PyTorch's: it multiplies pairs where the forward kernels widen, in down to half the time.
    """
    stride, padding, dilation, groups = convolution
    grad_input = grad_weight = None
    if stride == (1, 1) and is_channels_last(input) and (groups == 1 or input.dtype is torch.float32):
        settings = conv_settings(convolution)
        height, width = conv_weight.shape[2:]
        if needs_grad[0] and padding[0] <= dilation[0] * (height - 1) and padding[1] <= dilation[1] * (width - 1):
            grad_input = _input_grad(grad_output, conv_weight, settings, carried)
        if needs_grad[1]:
            grad_weight = _weight_grad(grad_output, input, conv_weight, settings)
    needs_grad = (needs_grad[0] and grad_input is None, needs_grad[1] and grad_weight is None, needs_grad[2])
    if not any(needs_grad):
        return grad_input, grad_weight, None
    others = reference.conv_backward(grad_output, input, conv_weight, convolution, needs_grad, carried)
    return others[0] if needs_grad[0] else grad_input, others[1] if needs_grad[1] else grad_weight, others[2]


def _readable(conv_weight: Tensor, input: Tensor) -> Tensor:
    """Kernels read weights in float32 as well as in the dtype of the input; autocast may bring others."""
    dtype = conv_weight.dtype
    return conv_weight if dtype is input.dtype or dtype is torch.float32 else conv_weight.to(input.dtype)


def _computed(output: Tensor | None) -> Tensor:
    if output is None:
        raise RuntimeError("conv_bn_act on the CPU: the arguments do not fit each other")
    return output
