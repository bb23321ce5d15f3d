"""conv_bn_act: convolution, batch norm, an optional residual, and the activation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resfuse.backends import reference, registry
from resfuse.layout import conv_memory_format, conv_output_shape, like_strides
from resfuse.ops import bn_act
from resfuse.ops.library import IN_FORCE, FunctionContext, backend_for, define

Pair = tuple[int, int]


def forward(
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
    chosen = backend_for("conv_bn_act_forward", input, (conv_weight.shape, stride, padding, dilation, groups))
    return chosen.conv_bn_act_forward(
        input, conv_weight, running_mean, running_var, weight, bias, conv_bias, residual, relu,
        stride, padding, dilation, groups, training, momentum, eps, overwrite_residual,
    )  # fmt: skip


def repeated(input: Tensor, *args: Any) -> Tensor | None:
    """The output of an inference call that a backend knows from an earlier one to be valid, else None."""
    run = registry.repeating_inference(registry.requested_backend())
    return None if run is None else run(input, *args)


def conv_forward(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    request: str | None = IN_FORCE,
) -> Tensor:
    conv = (conv_weight.shape, stride, padding, dilation, groups)
    chosen = backend_for("conv_forward", input, conv, request)
    return chosen.conv_forward(input, conv_weight, conv_bias, stride, padding, dilation, groups)


def conv_backward(
    grad_output: Tensor,
    input: Tensor,
    conv_weight: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    needs_grad: tuple[bool, bool, bool],
    request: str | None = IN_FORCE,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    conv = (conv_weight.shape, stride, padding, dilation, groups)
    chosen = backend_for("conv_backward", input, conv, request)
    return chosen.conv_backward(grad_output, input, conv_weight, stride, padding, dilation, groups, needs_grad)


def _train(
    input: Tensor, conv_weight: Tensor, running_mean: Tensor | None, running_var: Tensor | None, *rest: Any
) -> Any:
    weight, bias, conv_bias, residual, relu, stride, padding, dilation, groups, momentum, eps = rest
    return forward(
        input, conv_weight, running_mean, running_var, weight, bias, conv_bias, residual, relu,
        tuple(stride), tuple(padding), tuple(dilation), groups, True, momentum, eps,
    )  # fmt: skip


def _eval(input: Tensor, conv_weight: Tensor, running_mean: Tensor, running_var: Tensor, *rest: Any) -> Tensor:
    weight, bias, conv_bias, residual, relu, stride, padding, dilation, groups, eps = rest
    return forward(
        input, conv_weight, running_mean, running_var, weight, bias, conv_bias, residual, relu,
        tuple(stride), tuple(padding), tuple(dilation), groups, False, 0.0, eps,
    )[0]  # fmt: skip


def _conv_forward(input: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, *rest: Any) -> Tensor:
    stride, padding, dilation, groups = rest
    return conv_forward(input, conv_weight, conv_bias, tuple(stride), tuple(padding), tuple(dilation), groups)


def _conv_backward(grad_output: Tensor, input: Tensor, conv_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    stride, padding, dilation, groups, needs_grad = rest
    conv = (tuple(stride), tuple(padding), tuple(dilation), groups)
    grads = conv_backward(grad_output, input, conv_weight, *conv, tuple(needs_grad))
    # What the fake promises: gradients in the layout of what they are gradients of; empty ones where nobody needs them.
    likes = (input, conv_weight, None)
    return tuple(
        input.new_empty(0) if grad is None else grad if like is None else like_strides(grad, like)
        for grad, like in zip(grads, likes, strict=True)
    )


def _fake_output(input: Tensor, conv_weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    shape = conv_output_shape(input.shape, conv_weight.shape, stride, padding, dilation)
    return torch.empty(
        shape, dtype=input.dtype, device=input.device, memory_format=conv_memory_format(input, conv_weight)
    )


def _fake_train(input: Tensor, conv_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    stride, padding, dilation = rest[7:10]
    output, z = (_fake_output(input, conv_weight, stride, padding, dilation) for _ in range(2))
    return output, z, *bn_act._fake_statistics(input, conv_weight.shape[0])


def _fake_eval(input: Tensor, conv_weight: Tensor, *rest: Any) -> Tensor:
    stride, padding, dilation = rest[7:10]
    return _fake_output(input, conv_weight, stride, padding, dilation)


def _fake_conv_forward(
    input: Tensor, conv_weight: Tensor, conv_bias: Any, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    return _fake_output(input, conv_weight, stride, padding, dilation)


def _fake_conv_backward(
    grad_output: Tensor, input: Tensor, conv_weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs_input, needs_weight, needs_bias = rest[-1]
    return (
        torch.empty_like(input) if needs_input else input.new_empty(0),
        torch.empty_like(conv_weight) if needs_weight else input.new_empty(0),
        input.new_empty(conv_weight.shape[0] if needs_bias else 0),
    )


_CONV = "int[2] stride, int[2] padding, int[2] dilation, int groups"
define(
    "conv_bn_act_train(Tensor input, Tensor conv_weight, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    f"Tensor? weight, Tensor? bias, Tensor? conv_bias, Tensor? residual, bool relu, {_CONV}, "
    "float momentum, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _train,
    _fake_train,
)
define(
    "conv_bn_act_eval(Tensor input, Tensor conv_weight, Tensor running_mean, Tensor running_var, "
    f"Tensor? weight, Tensor? bias, Tensor? conv_bias, Tensor? residual, bool relu, {_CONV}, float eps) -> Tensor",
    _eval,
    _fake_eval,
)
define(
    f"conv_forward(Tensor input, Tensor conv_weight, Tensor? conv_bias, {_CONV}) -> Tensor",
    _conv_forward,
    _fake_conv_forward,
)
define(
    f"conv_backward(Tensor grad_output, Tensor input, Tensor conv_weight, {_CONV}, bool[3] needs_grad) "
    "-> (Tensor, Tensor, Tensor)",
    _conv_backward,
    _fake_conv_backward,
)


class ConvBNActFunction(torch.autograd.Function):
    """Saves the input, the two weights and, where there is a ReLU, the output as the source of its mask.

    With batch statistics it also saves z = conv(input), mean and invstd, as eager does.  With running statistics z is
    computed again in backward, and only if batch norm's weight needs a gradient: a frozen one costs nothing.
    """

    @staticmethod
    def forward(
        ctx: FunctionContext,
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
    ) -> Tensor:
        tensors = (input, conv_weight, running_mean, running_var, weight, bias, conv_bias, residual)
        conv = (stride, padding, dilation, groups)
        z = mean = invstd = None
        if not torch.compiler.is_compiling():
            output, z, mean, invstd = forward(*tensors, relu, *conv, training, momentum, eps)
            ctx.backend_request = registry.requested_backend()
        elif training:
            output, z, mean, invstd = torch.ops.resfuse.conv_bn_act_train(*tensors, relu, *conv, momentum, eps)
        else:
            output = torch.ops.resfuse.conv_bn_act_eval(*tensors, relu, *conv, eps)
        if not training:
            assert running_mean is not None and running_var is not None
            mean, invstd = reference.inference_statistics(running_mean, running_var, eps)
        ctx.training, ctx.relu, ctx.eps, ctx.conv = training, relu, eps, conv
        ctx.residual_channels = None if residual is None else residual.shape[1]
        ctx.save_for_backward(input, conv_weight, conv_bias, weight, output if relu else None, z, mean, invstd)
        return output

    @staticmethod
    def backward(ctx: FunctionContext, grad_output: Tensor) -> Any:
        saved = ctx.saved_tensors  # once: with activation checkpointing each read computes them again, or raises
        input, conv_weight, conv_bias, weight, output, z, mean, invstd = saved
        needs = ctx.needs_input_grad
        needs_conv = (needs[0], needs[1], needs[6])
        needs_residual = needs[7] and ctx.relu  # without a ReLU the residual's gradient is grad_output itself
        grads: Any = (None, None, None)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads, grad_weight, grad_bias, grad_residual = _differentiable_backward(ctx, saved, grad_output)
        else:
            run_conv_forward, run_bn_act_backward, run_conv_backward = _backward_verbs(ctx)
            if z is None and needs[4]:
                z = run_conv_forward(input, conv_weight, conv_bias, *ctx.conv)
            fused = _fused_backward(ctx, saved, grad_output, z, needs_conv, needs_residual)
            if fused is not None:
                grads, grad_weight, grad_bias, grad_residual = fused
            else:
                if z is None:  # where no one reads sum g xhat, any tensor of the right shape will do
                    z = grad_output
                grad_z, grad_weight, grad_bias, grad_residual = run_bn_act_backward(
                    grad_output, z, output, weight, mean, invstd, ctx.training, any(needs_conv), needs_residual
                )
                if any(needs_conv):
                    grads = run_conv_backward(grad_z, input, conv_weight, *ctx.conv, needs_conv)
        grad_input, grad_conv_weight, grad_conv_bias = grads
        return (
            grad_input if needs[0] else None,
            grad_conv_weight if needs[1] else None,
            None,
            None,
            grad_weight if needs[4] else None,
            grad_bias if needs[5] else None,
            grad_conv_bias if needs[6] else None,
            bn_act.gradient_of_residual(ctx, grad_residual if ctx.relu else grad_output) if needs[7] else None,
            *(None,) * 8,
        )


def _backward_verbs(ctx: FunctionContext) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """conv_forward, bn_act_backward and conv_backward: registered while compiling, else on the forward's backend."""
    if torch.compiler.is_compiling():
        registered = torch.ops.resfuse
        return registered.conv_forward, registered.bn_act_backward, registered.conv_backward
    request = ctx.backend_request
    return (
        functools.partial(conv_forward, request=request),
        functools.partial(bn_act.backward, request=request),
        functools.partial(conv_backward, request=request),
    )


def _fused_backward(
    ctx: FunctionContext,
    saved: tuple[Any, ...],
    grad_output: Tensor,
    z: Tensor | None,
    needs_conv: tuple[bool, bool, bool],
    needs_residual: bool,
) -> Any:
    """What the verbs of `_backward_verbs` give, from a backend that has and prefers one verb for all of it, or None."""
    if torch.compiler.is_compiling() or not any(needs_conv):
        return None
    input, conv_weight, _, weight, output, _, mean, invstd = saved
    chosen = backend_for("conv_backward", input, (conv_weight.shape, *ctx.conv), ctx.backend_request)
    run = getattr(chosen, "conv_bn_act_backward", None)
    if run is None or backend_for("bn_act_backward", grad_output, request=ctx.backend_request) is not chosen:
        return None
    needs_sums = ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
    return run(
        grad_output, input, conv_weight, z, output, weight, mean, invstd, *ctx.conv, ctx.training,
        needs_conv, needs_sums, needs_residual,
    )  # fmt: skip


def _differentiable_backward(ctx: FunctionContext, saved: tuple[Any, ...], grad_output: Tensor) -> Any:
    """The gradients as compositions of differentiable operations (create_graph=True), from the inputs themselves."""
    input, conv_weight, conv_bias, weight, output, _, mean, invstd = saved
    stride, padding, dilation, groups = ctx.conv
    z = reference.conv_forward(input, conv_weight, conv_bias, stride, padding, dilation, groups)
    grad_z, grad_weight, grad_bias, grad_residual = bn_act.differentiable_backward(
        grad_output, z, output, weight, mean, invstd, ctx.training, ctx.eps
    )
    needs_conv = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[6])
    grads = reference.conv_backward(grad_z, input, conv_weight, stride, padding, dilation, groups, needs_conv)
    return grads, grad_weight, grad_bias, grad_residual
