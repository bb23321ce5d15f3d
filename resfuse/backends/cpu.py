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
from resfuse.backends.dispatch import recomputing
from resfuse.layout import channels_last, copy_back, dense, gapless, ordered_like, place_padded, pool_output_size
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
    return cpu_kernels.add_relu_forward(input, ordered_like(residual, input))


def add_relu_backward(grad_output: Tensor, output: Tensor) -> Tensor:
    output = gapless(output)
    return cpu_kernels.add_relu_backward(ordered_like(grad_output, output), output)


def bn_act_forward(
    input: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    input = dense(input)
    if bn.training:
        return _bn_act_train(input, bn, residual, relu, None)
    vectors = map(_float, bn[:4])
    return cpu_kernels.bn_eval_forward(input, _like(input, residual), *vectors, bn.eps, relu), None, None


def _bn_act_train(
    input: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool, statistics: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, mean, invstd) of a dense input; `statistics` are its mean and M2 per channel, where they are known."""
    means, variances, weight, bias = map(_float, bn[:4])
    results: tuple[Tensor, Tensor, Tensor] = cpu_kernels.bn_train_forward(
        input, _like(input, residual), weight, bias, means, variances, statistics, bn.momentum, bn.eps, relu,
        recomputing.get(),
    )  # fmt: skip
    copy_back(bn, means, variances)
    return results


def _like(input: Tensor, residual: Tensor | None) -> Tensor | None:
    """The residual with the channels and the element order of the input."""
    if residual is not None and residual.shape[1] < input.shape[1]:
        return place_padded(residual, torch.empty_like(input))
    return ordered_like(residual, input)


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
    return cpu_kernels.bn_backward(
        ordered_like(grad_output, input), input, ordered_like(output, input), _float(weight), _float(bias),
        mean, invstd, relu, training, needs_input_grad, needs_residual_grad,
    )  # fmt: skip


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
    return cpu_kernels.bn_statistics(dense(input))


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
    return cpu_kernels.bn_apply(
        input, _like(input, residual), mean, invstd, _float(weight), _float(bias), relu, recomputing.get()
    )


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
    _, sum_g_xhat, sum_g, masked = bn_act_backward(
        grad_output, input, output, weight, bias, mean, invstd, relu, False, False, relu
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
    return cpu_kernels.bn_backward_apply(
        ordered_like(grad_output, input), input, None, _float(weight), None, mean, invstd, False, sum_g, sum_g_xhat,
        count or 0,
    )  # fmt: skip


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


@overload
def _float(vector: Tensor) -> Tensor: ...
@overload
def _float(vector: Tensor | None) -> Tensor | None: ...
def _float(vector: Tensor | None) -> Tensor | None:
    """Per-channel vectors enter the kernels in float32."""
    if vector is None or (vector.dtype == torch.float32 and vector.is_contiguous()):
        return vector
    return vector.float().contiguous()
