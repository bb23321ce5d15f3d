"""The CPU backend: own C++ kernels for the memory-bound verbs, oneDNN (in `cpu_conv`) for convolutions.

float32 and bfloat16, NHWC and NCHW.  Every output is allocated here; the kernels only fill them.
"""

from __future__ import annotations

import os
from typing import overload

import torch
from torch import Tensor

from resfuse import _extension
from resfuse.backends import buffer_pool, reference
from resfuse.backends.cpu_conv import conv_bn_act_inference, conv_forward, unsupported_convolution
from resfuse.backends.registry import Problem
from resfuse.layout import dense

conv_backward = reference.conv_backward  # PyTorch's own convolutions are oneDNN's

Pair = tuple[int, int]

_LIBRARY = torch.library.Library("resfuse_cpu", "DEF")
_PARAMETERS = (
    "Tensor conv_weight, Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, Tensor? conv_bias"
)
for _schema in (
    "add_relu_forward(Tensor input, Tensor residual, Tensor(a!) output) -> ()",
    "add_relu_backward(Tensor grad_output, Tensor output, Tensor(a!) grad_input) -> ()",
    "bn_statistics(Tensor input, Tensor(a!) mean, Tensor(b!) m2) -> ()",
    "bn_apply(Tensor input, Tensor? residual, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, bool relu, "
    "Tensor(a!) output) -> ()",
    "bn_eval_forward(Tensor input, Tensor? residual, Tensor running_mean, Tensor running_var, Tensor? weight, "
    "Tensor? bias, float eps, bool relu, Tensor(a!) output) -> ()",
    "bn_train_forward(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, float momentum, float eps, bool relu, Tensor(c!) output, Tensor(d!) mean, "
    "Tensor(e!) invstd) -> ()",
    "bn_backward_reduce(Tensor grad_output, Tensor input, Tensor? output, Tensor mean, Tensor invstd, "
    "Tensor(a!) sum_g, Tensor(b!) sum_g_xhat, Tensor(c!)? masked) -> ()",
    "bn_backward_apply(Tensor grad_output, Tensor input, Tensor? output, Tensor? weight, Tensor mean, Tensor invstd, "
    "Tensor sum_g, Tensor sum_g_xhat, float count, Tensor(a!) grad_input) -> ()",
    "rows_live(Tensor values) -> bool",
    "copy_finite(Tensor input, Tensor(a!)? output) -> bool",
    f"snapshot_size({_PARAMETERS}) -> int",
    f"snapshot({_PARAMETERS}, Tensor(a!) into) -> ()",
    f"snapshot_matches({_PARAMETERS}, Tensor taken) -> bool",
    "instruction_set() -> str",
):
    _LIBRARY.define(_schema)

_kernels = torch.ops.resfuse_cpu
# Looked up once: `torch.ops.a.b.default` takes half a microsecond.
_run_add_relu_backward = _kernels.add_relu_backward.default
_run_add_relu_forward = _kernels.add_relu_forward.default
_run_bn_apply = _kernels.bn_apply.default
_run_bn_backward_apply = _kernels.bn_backward_apply.default
_run_bn_backward_reduce = _kernels.bn_backward_reduce.default
_run_bn_eval_forward = _kernels.bn_eval_forward.default
_run_bn_statistics = _kernels.bn_statistics.default
_run_bn_train_forward = _kernels.bn_train_forward.default
_run_instruction_set = _kernels.instruction_set.default


_INSTRUCTION_SETS = ("avx512", "avx2", "baseline")


def unavailable_reason() -> str | None:
    asked = os.environ.get("RESFUSE_CPU_ISA")
    if asked is not None and asked not in _INSTRUCTION_SETS:
        return f"RESFUSE_CPU_ISA: expected one of {', '.join(_INSTRUCTION_SETS)}, got {asked!r}"
    return _extension.load("_cpu")


def unsupported_reasons(problem: Problem) -> list[str]:
    reasons = []
    if problem.device.type != "cpu":
        reasons.append(f"runs on the CPU, the tensors are on {problem.device}")
    if problem.dtype not in (torch.float32, torch.bfloat16):
        reasons.append(f"float32 and bfloat16 only, got {problem.dtype}")
    if 0 in problem.shape:
        reasons.append("an empty tensor")
    if problem.conv is not None and not reasons:
        reasons.extend(unsupported_convolution(problem))
    return reasons


def instruction_set() -> str:
    """What the kernels were dispatched to on this processor: avx512, avx2 or baseline."""
    return _run_instruction_set()


def add_relu_forward(input: Tensor, residual: Tensor) -> Tensor:
    if not (input.is_contiguous() and residual.is_contiguous()):
        input = _dense_any_rank(input)
        residual = _ordered_like(residual, input)
    output = buffer_pool.empty_like(input)
    _run_add_relu_forward(input, residual, output)
    return output


def add_relu_backward(grad_output: Tensor, output: Tensor) -> Tensor:
    output = _dense_any_rank(output)
    grad_input = buffer_pool.empty_like(output)
    _run_add_relu_backward(_ordered_like(grad_output, output), output, grad_input)
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
    residual = _ordered_like(residual, input)
    output = buffer_pool.empty_like(input)
    if not training:
        _run_bn_eval_forward(
            input, residual, _float(running_mean), _float(running_var), _float(weight), _float(bias), eps, relu, output
        )
        return output, None, None
    channels = input.shape[1]
    mean, invstd = torch.empty(channels), torch.empty(channels)
    wide_mean, wide_var = _float(running_mean), _float(running_var)
    _run_bn_train_forward(
        input, residual, _float(weight), _float(bias), wide_mean, wide_var, momentum, eps, relu, output, mean, invstd
    )  # fmt: skip
    for statistic, wide in ((running_mean, wide_mean), (running_var, wide_var)):
        if statistic is not None and wide is not None and wide is not statistic:
            statistic.copy_(wide)
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
    grad_output, output = _ordered_like(grad_output, input), _ordered_like(output, input)
    masked = buffer_pool.empty_like(input) if needs_residual_grad else None
    sum_g, sum_g_xhat = torch.empty_like(mean), torch.empty_like(mean)
    _run_bn_backward_reduce(grad_output, input, output, mean, invstd, sum_g, sum_g_xhat, masked)
    grad_input = None
    if needs_input_grad:
        if masked is not None:
            grad_output, output = masked, None
        grad_input = buffer_pool.empty_like(input)
        count = input.numel() // input.shape[1] if training else 0
        _run_bn_backward_apply(
            grad_output, input, output, _float(weight), mean, invstd, sum_g, sum_g_xhat, count, grad_input
        )
    return grad_input, sum_g_xhat, sum_g, masked


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
    if not training and not reference.unreliable_in_channels_last(input.device, input.shape, conv_weight.shape, stride):
        assert running_mean is not None and running_var is not None
        output = conv_bn_act_inference(
            input, conv_weight, running_mean, running_var, weight, bias, conv_bias, residual, relu,
            stride, padding, dilation, groups, eps, overwrite_residual,
        )  # fmt: skip
        return output, None, None, None
    z = conv_forward(input, conv_weight, conv_bias, stride, padding, dilation, groups)
    output, mean, invstd = bn_act_forward(
        z, running_mean, running_var, weight, bias, residual, relu, training, momentum, eps
    )
    return output, z if training else None, mean, invstd


def bn_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    mean, m2 = torch.empty(input.shape[1]), torch.empty(input.shape[1])
    _run_bn_statistics(dense(input), mean, m2)
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
    output = buffer_pool.empty_like(input)
    _run_bn_apply(input, _ordered_like(residual, input), mean, invstd, _float(weight), _float(bias), relu, output)
    return output


def bn_backward_reduce(
    grad_output: Tensor, input: Tensor, output: Tensor | None, mean: Tensor, invstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    input = dense(input)
    grad_output, output = _ordered_like(grad_output, input), _ordered_like(output, input)
    masked = grad_output if output is None else buffer_pool.empty_like(input)
    sum_g, sum_g_xhat = torch.empty_like(mean), torch.empty_like(mean)
    _run_bn_backward_reduce(
        grad_output, input, output, mean, invstd, sum_g, sum_g_xhat, None if output is None else masked
    )
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
    grad_output, output = _ordered_like(grad_output, input), _ordered_like(output, input)
    grad_input = buffer_pool.empty_like(input)
    _run_bn_backward_apply(
        grad_output, input, output, _float(weight), mean, invstd, sum_g, sum_g_xhat, count or 0, grad_input
    )
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


@overload
def _ordered_like(tensor: Tensor, like: Tensor) -> Tensor: ...
@overload
def _ordered_like(tensor: Tensor | None, like: Tensor) -> Tensor | None: ...
def _ordered_like(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """The tensor with the strides of `like`, by a copy where it has others."""
    if tensor is None or tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(like).copy_(tensor)


def _dense_any_rank(tensor: Tensor) -> Tensor:
    """The tensor itself where its elements fill one block of memory, else such a copy."""
    if tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return tensor
    return torch.empty_like(tensor).copy_(tensor)
