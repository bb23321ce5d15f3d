"""The CPU backend: own C++ kernels for float32 and bfloat16, NHWC and NCHW."""

from __future__ import annotations

import os
from typing import overload

import torch
from torch import Tensor

from resfuse import _extension
from resfuse.backends import cpu_kernels, reference
from resfuse.backends.cpu_conv import (
    checked_inference,
    conv_backward,
    conv_bn_act_inference,
    conv_forward,
    conv_statistics_forward,
)
from resfuse.layout import channels_last, copy_back, dense, gapless, ordered_like, pool_output_size, residual_for
from resfuse.types import BatchNorm, Convolution, Pooling, Problem

__all__ = ["checked_inference", "conv_backward", "conv_forward"]

KERNELS = reference.KERNELS

_INSTRUCTION_SETS = ("avx512", "avx2", "baseline")


def unavailable_reason() -> str | None:
    asked = os.environ.get("RESFUSE_CPU_ISA")
    if asked is not None and asked not in _INSTRUCTION_SETS:
        return f"RESFUSE_CPU_ISA: expected one of {', '.join(_INSTRUCTION_SETS)}, got {asked!r}"
    return _extension.load("_cpu")


def only_on_request_reason() -> str | None:
    return None


def unsupported_reasons(problem: Problem) -> list[str]:
    reasons = []
    if problem.device.type != "cpu":
        reasons.append(f"runs on the CPU, the tensors are on {problem.device}")
    if problem.dtype not in (torch.float32, torch.bfloat16):
        reasons.append(f"float32 and bfloat16 only, got {problem.dtype}")
    if 0 in problem.shape:
        reasons.append("an empty tensor")
    return reasons


def instruction_set() -> str:
    """The instruction set that the kernels were dispatched to on this processor: avx512, avx2 or baseline."""
    return cpu_kernels.instruction_set()


def bfloat16_products() -> str:
    """How convolutions multiply bfloat16 on this processor: "pairs" (vdpbf16ps), or "widened" to float32."""
    return cpu_kernels.bfloat16_products()


def add_relu_forward(input: Tensor, residual: Tensor) -> Tensor:
    input = gapless(input)
    output = torch.empty_like(input)
    cpu_kernels.add_relu_forward(input, ordered_like(residual, input), output)
    return output


def add_relu_backward(grad_output: Tensor, output: Tensor) -> Tensor:
    output = gapless(output)
    grad_input = torch.empty_like(output)
    cpu_kernels.add_relu_backward(ordered_like(grad_output, output), output, grad_input)
    return grad_input


def bn_act_forward(
    input: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    input = dense(input)
    if bn.training:
        return _bn_act_train(input, bn, residual, relu, None)
    output = torch.empty_like(input)
    if residual is not None:
        residual = residual_for(output, residual)
    cpu_kernels.bn_eval_forward(input, residual, *map(_float, bn[:4]), bn.eps, relu, output)
    return output, None, None


def _bn_act_train(
    input: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool, statistics: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, mean, invstd) of a dense input; `statistics` are its mean and M2 per channel, where they are known."""
    output = torch.empty_like(input)
    if residual is not None:
        residual = residual_for(output, residual)
    means, variances, weight, bias = map(_float, bn[:4])
    mean, invstd = _two_vectors(input)
    cpu_kernels.bn_train_forward(
        input, residual, weight, bias, means, variances, statistics, bn.momentum, bn.eps, relu, output, mean, invstd
    )
    copy_back(bn, means, variances)
    return output, mean, invstd


def bn_act_backward(
    grad_output: Tensor,
    input: Tensor,
    output: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    relu: bool,
    training: bool,
    needs_input_grad: bool,
    needs_residual_grad: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    input = dense(input)
    grad_output, output = ordered_like(grad_output, input), ordered_like(output, input)
    vectors = (_float(weight), _float(bias), mean, invstd)
    masked = torch.empty_like(input) if needs_residual_grad else None
    sum_g, sum_g_xhat = torch.empty_like(mean), torch.empty_like(mean)
    cpu_kernels.bn_backward_reduce(grad_output, input, output, *vectors, relu, sum_g, sum_g_xhat, masked)
    grad_input = None
    if needs_input_grad:
        if masked is not None:
            grad_output, output, relu = masked, None, False
        grad_input = torch.empty_like(input)
        count = input.numel() // input.shape[1] if training else 0
        cpu_kernels.bn_backward_apply(grad_output, input, output, *vectors, relu, sum_g, sum_g_xhat, count, grad_input)
    return grad_input, sum_g_xhat, sum_g, masked


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
    if not bn.training:
        output = conv_bn_act_inference(
            input, conv_weight, conv_bias, convolution, bn, residual, relu, overwrite_residual
        )
        return output, None, None, None
    z, statistics = conv_statistics_forward(input, conv_weight, conv_bias, convolution)
    output, mean, invstd = _bn_act_train(z, bn, residual, relu, statistics)
    return output, z, mean, invstd


def bn_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    mean, m2 = _two_vectors(input)
    cpu_kernels.bn_statistics(dense(input), mean, m2)
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
    cpu_kernels.bn_apply(
        input, residual_for(output, residual), mean, invstd, _float(weight), _float(bias), relu, output
    )
    return output


def bn_backward_reduce(
    grad_output: Tensor,
    input: Tensor,
    output: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    input = dense(input)
    grad_output, output = ordered_like(grad_output, input), ordered_like(output, input)
    masked = torch.empty_like(input) if relu else None
    sum_g, sum_g_xhat = torch.empty_like(mean), torch.empty_like(mean)
    cpu_kernels.bn_backward_reduce(
        grad_output, input, output, _float(weight), _float(bias), mean, invstd, relu, sum_g, sum_g_xhat, masked
    )
    return sum_g, sum_g_xhat, grad_output if masked is None else masked


def bn_backward_apply(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    sum_g: Tensor,
    sum_g_xhat: Tensor,
    count: int | None,
) -> Tensor:
    input = dense(input)
    grad_output, grad_input = ordered_like(grad_output, input), torch.empty_like(input)
    cpu_kernels.bn_backward_apply(
        grad_output, input, None, _float(weight), None, mean, invstd, False, sum_g, sum_g_xhat, count or 0, grad_input
    )
    return grad_input


def max_pool_forward(input: Tensor, pooling: Pooling) -> tuple[Tensor, Tensor]:
    input = channels_last(input)
    shape = (*input.shape[:2], *pool_output_size(input.shape, pooling))
    output = torch.empty(shape, dtype=input.dtype, memory_format=torch.channels_last)
    positions = torch.empty_like(output, dtype=torch.uint8)
    cpu_kernels.max_pool_forward(input, pooling.window(), output, positions)
    return output, positions


def max_pool_backward(grad_output: Tensor, positions: Tensor, shape: torch.Size, pooling: Pooling) -> Tensor:
    grad_input = torch.empty(shape, dtype=grad_output.dtype, memory_format=torch.channels_last)
    cpu_kernels.max_pool_backward(channels_last(grad_output), positions, pooling.window(), grad_input)
    return grad_input


def _two_vectors(input: Tensor) -> tuple[Tensor, Tensor]:
    """Two float32 values per channel, to be computed."""
    first = torch.empty(input.shape[1], dtype=torch.float32, device=input.device)
    return first, torch.empty_like(first)


@overload
def _float(vector: Tensor) -> Tensor: ...
@overload
def _float(vector: Tensor | None) -> Tensor | None: ...
def _float(vector: Tensor | None) -> Tensor | None:
    """Per-channel vectors enter the kernels in float32."""
    if vector is None or (vector.dtype == torch.float32 and vector.is_contiguous()):
        return vector
    return vector.float().contiguous()
