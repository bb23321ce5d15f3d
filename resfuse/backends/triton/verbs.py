"""The verbs on plain tensors: layouts and allocation.  `resfuse.backends.reference` specifies each of them."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from resfuse.backends.triton import add_relu, bn_act, conv_bn_act
from resfuse.backends.triton.dgrad import dgrad
from resfuse.backends.triton.fused_backward import conv_bn_act_backward
from resfuse.backends.triton.split_sum import column_sum
from resfuse.backends.triton.wgrad import wgrad
from resfuse.layout import copy_back
from resfuse.layout import (
    channels_last,
    conv_memory_format,
    conv_output_shape,
    dense,
    gapless,
    like_strides,
    ordered_like,
    residual_for,
)

__all__ = ["conv_bn_act_backward"]

Pair = tuple[int, int]


def add_relu_forward(input: Tensor, residual: Tensor) -> Tensor:
    input = gapless(input)
    output = torch.empty_like(input)
    add_relu.forward(input, ordered_like(residual, input), output)
    return output


def add_relu_backward(grad_output: Tensor, output: Tensor) -> Tensor:
    output = gapless(output)
    grad_input = torch.empty_like(output)
    add_relu.backward(ordered_like(grad_output, output), output, grad_input)
    return grad_input


def bn_act_forward(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    input = dense(input)
    output = torch.empty_like(input)
    residual = residual_for(output, residual)
    weight, bias = _unstrided(weight), _unstrided(bias)
    running = _unstrided(running_mean), _unstrided(running_var)
    if not training:
        assert running[0] is not None and running[1] is not None
        bn_act.apply(input, residual, output, running[0], running[1], weight, bias, eps, relu)
        return output, None, None
    mean, invstd = _statistics_like(input), _statistics_like(input)
    bn_act.train_forward(input, residual, output, weight, bias, *running, mean, invstd, momentum, eps, relu)
    copy_back((running_mean, running_var), running)
    return output, mean, invstd


def bn_act_backward(
    grad_output: Tensor,
    input: Tensor,
    output: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    needs_input_grad: bool,
    needs_residual_grad: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    input = dense(input)
    grad_output, output = ordered_like(grad_output, input), ordered_like(output, input)
    grad_input = torch.empty_like(input) if needs_input_grad else None
    grad_residual = torch.empty_like(input) if needs_residual_grad and output is not None else None
    sum_g, sum_g_xhat = torch.empty_like(mean), torch.empty_like(mean)
    bn_act.backward(
        grad_output, input, output, _unstrided(weight), mean, invstd, grad_input, grad_residual, sum_g, sum_g_xhat,
        training,
    )  # fmt: skip
    if needs_residual_grad and output is None:
        grad_residual = grad_output
    return grad_input, sum_g_xhat, sum_g, grad_residual


def conv_bn_act_forward(
    input: Tensor,
    conv_weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    training: bool,
    momentum: float,
    eps: float,
    overwrite_residual: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    memory_format = conv_memory_format(input, conv_weight)
    x, w = channels_last(input), _weight_for(conv_weight, input)
    conv = (stride, padding, dilation, groups)
    if overwrite_residual and residual is not None and not training:
        output = residual = channels_last(residual)
    else:
        output = _conv_output(input, conv_weight, conv)
        residual = residual_for(output, residual)
    vectors = _unstrided(weight), _unstrided(bias), _unstrided(conv_bias)
    running = _unstrided(running_mean), _unstrided(running_var)
    if not training:
        assert running[0] is not None and running[1] is not None
        conv_bn_act.eval_forward(
            x, w, running[0], running[1], *vectors, residual, relu, stride, padding, dilation, groups, eps, output
        )  # fmt: skip
        return output.contiguous(memory_format=memory_format), None, None, None
    z = torch.empty_like(output)
    mean, invstd = _statistics_like(output), _statistics_like(output)
    conv_bn_act.train_forward(
        x, w, *running, *vectors, residual, relu, stride, padding, dilation, groups, momentum, eps,
        z, output, mean, invstd,
    )  # fmt: skip
    copy_back((running_mean, running_var), running)
    return output.contiguous(memory_format=memory_format), z.contiguous(memory_format=memory_format), mean, invstd


def conv_forward(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    conv = stride, padding, dilation, groups
    output = _conv_output(input, conv_weight, conv)
    x, w = channels_last(input), _weight_for(conv_weight, input)
    conv_bn_act.conv_forward(x, w, _unstrided(conv_bias), *conv, output)
    return output.contiguous(memory_format=conv_memory_format(input, conv_weight))


def conv_backward(
    grad_output: Tensor,
    input: Tensor,
    conv_weight: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    needs_grad: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    conv = stride, padding, dilation, groups
    dz = channels_last(grad_output)
    grad_input = grad_weight = grad_bias = None
    if needs_grad[0]:
        dx = torch.empty_like(input, memory_format=torch.channels_last)
        dgrad(dz, channels_last(conv_weight.to(dz.dtype)), *conv, dx)
        grad_input = like_strides(dx, input)
    if needs_grad[1]:
        dw = torch.empty_like(conv_weight, memory_format=torch.channels_last)
        wgrad(dz, channels_last(input), *conv, dw)
        grad_weight = like_strides(dw, conv_weight)
    if needs_grad[2]:
        grad_bias = dz.new_empty(conv_weight.shape[0])
        column_sum(dz, grad_bias)
    return grad_input, grad_weight, grad_bias


def bn_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    mean, m2 = _statistics_like(input), _statistics_like(input)
    bn_act.statistics(dense(input), mean, m2)
    return mean, m2


def bn_apply(
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    input = dense(input)
    output = torch.empty_like(input)
    vectors = _unstrided(mean), _unstrided(invstd), _unstrided(weight), _unstrided(bias)
    bn_act.apply(input, ordered_like(residual, input), output, *vectors, None, relu)
    return output


def bn_backward_reduce(
    grad_output: Tensor, input: Tensor, output: Tensor | None, mean: Tensor, invstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _, sum_g_xhat, sum_g, masked = bn_act_backward(
        grad_output, input, output, None, _unstrided(mean), _unstrided(invstd), False, False, True
    )
    assert masked is not None
    return sum_g, sum_g_xhat, masked


def bn_backward_apply(
    grad_output: Tensor,
    input: Tensor,
    output: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    sum_g: Tensor,
    sum_g_xhat: Tensor,
    count: int | None,
) -> Tensor:
    input = dense(input)
    grad_output, output = ordered_like(grad_output, input), ordered_like(output, input)
    grad_input = torch.empty_like(input)
    bn_act.backward_apply(
        grad_output, input, output, _unstrided(weight), _unstrided(mean), _unstrided(invstd),
        _unstrided(sum_g), _unstrided(sum_g_xhat), grad_input, count,
    )  # fmt: skip
    return grad_input


def _statistics_like(input: Tensor) -> Tensor:
    return torch.empty(input.shape[1], dtype=torch.float32, device=input.device)


def _conv_output(input: Tensor, conv_weight: Tensor, conv: tuple[Pair, Pair, Pair, int]) -> Tensor:
    """Memory for what a convolution kernel writes."""
    shape = conv_output_shape(input.shape, conv_weight.shape, *conv[:3])
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)


def _weight_for(conv_weight: Tensor, input: Tensor) -> Tensor:
    if conv_weight.dtype != input.dtype:  # inference under autocast
        return conv_weight.to(input.dtype, memory_format=torch.channels_last)
    return channels_last(conv_weight)


@overload
def _unstrided(vector: Tensor) -> Tensor: ...
@overload
def _unstrided(vector: Tensor | None) -> Tensor | None: ...
def _unstrided(vector: Tensor | None) -> Tensor | None:
    """Per-channel vectors enter the kernels with a stride of one."""
    return vector if vector is None else vector.contiguous()
