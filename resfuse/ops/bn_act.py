"""bn_act: batch norm, an optional residual, and the activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resfuse.backends import reference
from resfuse.backends.dispatch import backend_for, must_differentiate, through_dispatcher
from resfuse.layout import as_result, empty_result
from resfuse.ops import recompute
from resfuse.ops.library import define
from resfuse.ops.recompute import Saved, Vectors
from resfuse.types import BatchNorm


def run(
    input: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(output, mean, invstd); the last two are None with running statistics."""
    if not through_dispatcher():
        return backend_for("bn_act_forward", input).bn_act_forward(input, bn, residual, relu)
    if bn.training:
        return torch.ops.resfuse.bn_act_train(input, *bn[:4], residual, relu, bn.momentum, bn.eps)
    return torch.ops.resfuse.bn_act_eval(input, *bn[:4], residual, relu, bn.eps), None, None


def backward(
    grad_output: Tensor,
    input: Tensor,
    output: Tensor | None,
    vectors: Vectors,
    relu: bool,
    training: bool,
    needs_input_grad: bool,
    needs_residual_grad: bool,
    request: str | None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """(grad_input, grad_weight, grad_bias, grad_residual); `request` is that of the forward."""
    args = (grad_output, input, output, *vectors, relu, training, needs_input_grad, needs_residual_grad)
    if through_dispatcher():
        return torch.ops.resfuse.bn_act_backward(*args)
    return backend_for("bn_act_backward", input, request=request).bn_act_backward(*args)


def differentiable_backward(
    grad_output: Tensor,
    input: Tensor,
    output: Tensor | None,
    vectors: Vectors,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`backward` as a composition of differentiable operations (create_graph=True); no `output` means no ReLU.

    The batch statistics are functions of the input and are therefore computed again here.
    """
    g = grad_output if output is None else torch.where(output.detach() <= 0, 0, grad_output)
    weight, _, mean, invstd = vectors
    count = None
    if training:
        count = input.numel() // input.shape[1]
        mean, m2 = reference.bn_statistics(input)
        invstd = (m2 / count + eps).rsqrt()
    sum_g, sum_g_xhat, _ = reference.bn_backward_reduce(g, input, None, None, None, mean, invstd, False)
    grad_input = reference.bn_backward_apply(g, input, weight, mean, invstd, sum_g, sum_g_xhat, count)
    return grad_input, sum_g_xhat, sum_g, g


# A registered operator returns what its fake promises: the strides of `empty_result`, and tensors only, so that a
# gradient nobody needs is an empty one.


def _train(input: Tensor, *args: Any) -> Any:
    mean, var, weight, bias, residual, relu, momentum, eps = args
    bn = BatchNorm(mean, var, weight, bias, True, momentum, eps)
    output, *statistics = backend_for("bn_act_forward", input).bn_act_forward(input, bn, residual, relu)
    return as_result(output, input), *statistics


def _eval(input: Tensor, *args: Any) -> Tensor:
    mean, var, weight, bias, residual, relu, eps = args
    bn = BatchNorm(mean, var, weight, bias, False, 0.0, eps)
    return as_result(backend_for("bn_act_forward", input).bn_act_forward(input, bn, residual, relu)[0], input)


def _backward(grad_output: Tensor, input: Tensor, *args: Any) -> tuple[Tensor, ...]:
    backend = backend_for("bn_act_backward", input)
    grad_input, grad_weight, grad_bias, grad_residual = backend.bn_act_backward(grad_output, input, *args)
    grad_input, grad_residual = (
        input.new_empty(0) if grad is None else as_result(grad, input) for grad in (grad_input, grad_residual)
    )
    return grad_input, grad_weight, grad_bias, grad_residual


def _fake_statistics(input: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return input.new_empty(channels, dtype=dtype), input.new_empty(channels, dtype=dtype)


def _fake_train(input: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_result(input), *_fake_statistics(input, input.shape[1])


def _fake_backward(grad_output: Tensor, input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, (needs_input_grad, needs_residual_grad) = args[3], args[-2:]
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
    "bn_act_backward(Tensor grad_output, Tensor input, Tensor? output, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor invstd, bool relu, bool training, bool needs_input_grad, bool needs_residual_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def gradient_of_residual(ctx: Any, grad: Tensor) -> Tensor:
    """The masked gradient in the channels that the residual has."""
    return grad if ctx.residual_channels == grad.shape[1] else grad[:, : ctx.residual_channels]


class BNActFunction(torch.autograd.Function):
    """Saves the input, the weight, mean and invstd, and what `recompute.save` says.

    `batch_norm` are the fields of a `BatchNorm`: autograd sees only tensors that are arguments themselves.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, residual: Tensor | None, relu: bool, *batch_norm: Any) -> Tensor:
        bn = BatchNorm(*batch_norm)
        output, mean, invstd = run(input, bn, residual, relu)
        if not bn.training:
            mean, invstd = reference.inference_statistics(bn)
        ctx.training, ctx.eps = bn.training, bn.eps
        ctx.residual_channels = None if residual is None else residual.shape[1]
        recompute.save(ctx, Saved(input, residual, None, None, *bn[2:4], mean, invstd), output, relu, bn.training)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        saved = recompute.take(ctx)
        input = recompute.input_of(ctx, saved)
        needs_input, needs_residual, _, _, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        if must_differentiate(grad_output):
            output = recompute.mask_of(ctx, saved, input)
            grads: Any = differentiable_backward(grad_output, input, output, saved.vectors, ctx.training, ctx.eps)
        else:  # without a ReLU the residual's gradient is grad_output itself
            grads = backward(
                grad_output, input, saved.output, saved.vectors, ctx.relu, ctx.training, needs_input,
                needs_residual and ctx.relu, ctx.request,
            )  # fmt: skip
        grad_input, grad_weight, grad_bias, grad_residual = grads
        return (
            grad_input if needs_input else None,
            gradient_of_residual(ctx, grad_residual if ctx.relu else grad_output) if needs_residual else None,
            None,
            None,
            None,
            grad_weight if needs_weight else None,
            grad_bias if needs_bias else None,
            None,
            None,
            None,
        )
