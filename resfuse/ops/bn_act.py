"""bn_act: batch norm, an optional residual, and the activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resfuse.backends import reference, registry
from resfuse.layout import as_result, empty_result
from resfuse.ops.library import IN_FORCE, FunctionContext, backend_for, define


def forward(
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
    return backend_for("bn_act_forward", input).bn_act_forward(
        input, running_mean, running_var, weight, bias, residual, relu, training, momentum, eps
    )


def backward(
    grad_output: Tensor,
    input: Tensor,
    output: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    needs_input_grad: bool,
    needs_residual_grad: bool,
    request: str | None = IN_FORCE,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    return backend_for("bn_act_backward", input, request=request).bn_act_backward(
        grad_output, input, output, weight, mean, invstd, training, needs_input_grad, needs_residual_grad
    )


def differentiable_backward(
    grad_output: Tensor,
    input: Tensor,
    output: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`backward` as a composition of differentiable operations (create_graph=True).

    The batch statistics are functions of the input and are therefore computed again here.
    """
    g = grad_output if output is None else torch.where(output.detach() <= 0, 0, grad_output)
    count = None
    if training:
        count = input.numel() // input.shape[1]
        mean, m2 = reference.bn_statistics(input)
        invstd = (m2 / count + eps).rsqrt()
    sum_g, sum_g_xhat, _ = reference.bn_backward_reduce(g, input, None, mean, invstd)
    grad_input = reference.bn_backward_apply(g, input, None, weight, mean, invstd, sum_g, sum_g_xhat, count)
    return grad_input, sum_g_xhat, sum_g, g


# A registered operator returns what its fake promises: the strides of `empty_result`, and tensors only, so that a
# gradient nobody needs is an empty one.


def _train(input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, *rest: Any) -> Any:
    weight, bias, residual, relu, momentum, eps = rest
    output, *statistics = forward(input, running_mean, running_var, weight, bias, residual, relu, True, momentum, eps)
    return as_result(output, input), *statistics


def _eval(input: Tensor, running_mean: Tensor, running_var: Tensor, *rest: Any) -> Tensor:
    weight, bias, residual, relu, eps = rest
    output, *_ = forward(input, running_mean, running_var, weight, bias, residual, relu, False, 0.0, eps)
    return as_result(output, input)


def _backward(grad_output: Tensor, input: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    grad_input, grad_weight, grad_bias, grad_residual = backward(grad_output, input, *rest)
    grad_input, grad_residual = (
        input.new_empty(0) if grad is None else as_result(grad, input) for grad in (grad_input, grad_residual)
    )
    return grad_input, grad_weight, grad_bias, grad_residual


def _fake_statistics(input: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return input.new_empty(channels, dtype=dtype), input.new_empty(channels, dtype=dtype)


def _fake_train(input: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_result(input), *_fake_statistics(input, input.shape[1])


def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    output: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    needs_input_grad: bool,
    needs_residual_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        empty_result(input) if needs_input_grad else input.new_empty(0),
        torch.empty_like(mean),
        torch.empty_like(mean),
        empty_result(input) if needs_residual_grad else input.new_empty(0),
    )


define(
    "bn_act_train(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight, Tensor? bias, "
    "Tensor? residual, bool relu, float momentum, float eps) -> (Tensor, Tensor, Tensor)",
    _train,
    _fake_train,
)
define(
    "bn_act_eval(Tensor input, Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, "
    "Tensor? residual, bool relu, float eps) -> Tensor",
    _eval,
    lambda input, *_: empty_result(input),
)
define(
    "bn_act_backward(Tensor grad_output, Tensor input, Tensor? output, Tensor? weight, Tensor mean, Tensor invstd, "
    "bool training, bool needs_input_grad, bool needs_residual_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def gradient_of_residual(ctx: FunctionContext, grad: Tensor) -> Tensor:
    """What of the masked gradient belongs to the residual: the channels it has."""
    return grad if ctx.residual_channels == grad.shape[1] else grad[:, : ctx.residual_channels]


class BNActFunction(torch.autograd.Function):
    """Saves the input, mean and invstd, and, where there is a ReLU, the output as the source of its mask."""

    @staticmethod
    def forward(
        ctx: FunctionContext,
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
    ) -> Tensor:
        if not torch.compiler.is_compiling():
            output, mean, invstd = forward(
                input, running_mean, running_var, weight, bias, residual, relu, training, momentum, eps
            )
            ctx.backend_request = registry.requested_backend()
        elif training:
            output, mean, invstd = torch.ops.resfuse.bn_act_train(
                input, running_mean, running_var, weight, bias, residual, relu, momentum, eps
            )
        else:
            output = torch.ops.resfuse.bn_act_eval(input, running_mean, running_var, weight, bias, residual, relu, eps)
        if not training:
            assert running_mean is not None and running_var is not None
            mean, invstd = reference.inference_statistics(running_mean, running_var, eps)
        ctx.training, ctx.relu, ctx.eps = training, relu, eps
        ctx.residual_channels = None if residual is None else residual.shape[1]
        ctx.save_for_backward(input, output if relu else None, weight, mean, invstd)
        return output

    @staticmethod
    def backward(ctx: FunctionContext, grad_output: Tensor) -> Any:
        input, output, weight, mean, invstd = ctx.saved_tensors
        needs = ctx.needs_input_grad
        needs_residual = needs[5] and ctx.relu  # without a ReLU the residual's gradient is grad_output itself
        args = (grad_output, input, output, weight, mean, invstd, ctx.training)
        if torch.compiler.is_compiling():
            grads = torch.ops.resfuse.bn_act_backward(*args, needs[0], needs_residual)
        elif torch.is_grad_enabled():
            grads = differentiable_backward(*args, ctx.eps)
        else:
            grads = backward(*args, needs[0], needs_residual, ctx.backend_request)
        grad_input, grad_weight, grad_bias, grad_residual = grads
        return (
            grad_input if needs[0] else None,
            None,
            None,
            grad_weight if needs[3] else None,
            grad_bias if needs[4] else None,
            gradient_of_residual(ctx, grad_residual if ctx.relu else grad_output) if needs[5] else None,
            None,
            None,
            None,
            None,
        )
