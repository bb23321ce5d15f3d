"""conv_bn_act: convolution, batch norm, an optional residual, and the activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resfuse.backends import reference
from resfuse.backends.dispatch import IN_FORCE, backend_for, must_differentiate, through_dispatcher
from resfuse.layout import conv_memory_format, conv_output_shape, like_strides
from resfuse.ops import bn_act, recompute
from resfuse.ops.library import define
from resfuse.ops.recompute import Saved
from resfuse.types import BatchNorm, Convolution

NeedsGrad = tuple[bool, ...]
"""True for those of (input, weight, bias) of a convolution that need a gradient."""


def run(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    convolution: Convolution,
    bn: BatchNorm,
    residual: Tensor | None,
    relu: bool,
    overwrite_residual: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(output, z, mean, invstd); the last three are None with running statistics."""
    if not through_dispatcher():
        backend = backend_for(
            "conv_bn_act_forward", input, conv_weight.shape, convolution, IN_FORCE, bn.training, residual is not None
        )
        return backend.conv_bn_act_forward(
            input, conv_weight, conv_bias, convolution, bn, residual, relu, overwrite_residual
        )
    args = (input, conv_weight, *bn[:4], conv_bias, residual, relu, *convolution)
    if bn.training:
        return torch.ops.resfuse.conv_bn_act_train(*args, bn.momentum, bn.eps)
    return torch.ops.resfuse.conv_bn_act_eval(*args, bn.eps), None, None, None


def conv_forward(
    input: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, convolution: Convolution, request: str | None
) -> Tensor:
    """z = conv(input); `request` is that of the forward."""
    if through_dispatcher():
        return torch.ops.resfuse.conv_forward(input, conv_weight, conv_bias, *convolution)
    backend = backend_for("conv_forward", input, conv_weight.shape, convolution, request)
    return backend.conv_forward(input, conv_weight, conv_bias, convolution)


def conv_backward(
    grad_output: Tensor,
    input: Tensor,
    conv_weight: Tensor,
    convolution: Convolution,
    needs_grad: NeedsGrad,
    request: str | None,
    carried: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(grad_input [+ carried], grad_weight, grad_bias) of the convolution; `request` is that of the forward.

    `carried`, which is of the shape of the input, may be overwritten.
    """
    if through_dispatcher():
        grads = torch.ops.resfuse.conv_backward(grad_output, input, conv_weight, *convolution, needs_grad)
        return grads if carried is None else (grads[0] + carried, *grads[1:])
    backend = backend_for("conv_backward", input, conv_weight.shape, convolution, request)
    return backend.conv_backward(grad_output, input, conv_weight, convolution, needs_grad, carried)


# The registered operators have flat schemas, and return tensors only: an empty one for a gradient nobody needs.


def _pack(stride: list[int], padding: list[int], dilation: list[int], groups: int) -> Convolution:
    return Convolution(tuple(stride), tuple(padding), tuple(dilation), groups)  # type: ignore[arg-type]


def _forward(training: bool, momentum: float, args: tuple[Any, ...]) -> Any:
    input, conv_weight, mean, var, weight, bias, conv_bias, residual, relu, *settings, eps = args
    convolution, bn = _pack(*settings), BatchNorm(mean, var, weight, bias, training, momentum, eps)
    backend = backend_for(
        "conv_bn_act_forward", input, conv_weight.shape, convolution, IN_FORCE, training, residual is not None
    )
    return backend.conv_bn_act_forward(input, conv_weight, conv_bias, convolution, bn, residual, relu)


def _train(*args: Any) -> Any:
    *rest, momentum, eps = args
    return _forward(True, momentum, (*rest, eps))


def _eval(*args: Any) -> Tensor:
    return _forward(False, 0.0, args)[0]


def _conv_forward(input: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, *settings: Any) -> Tensor:
    convolution = _pack(*settings)
    backend = backend_for("conv_forward", input, conv_weight.shape, convolution)
    return backend.conv_forward(input, conv_weight, conv_bias, convolution)


def _conv_backward(grad_output: Tensor, input: Tensor, conv_weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *settings, needs_grad = args
    convolution = _pack(*settings)
    backend = backend_for("conv_backward", input, conv_weight.shape, convolution)
    grads = backend.conv_backward(grad_output, input, conv_weight, convolution, tuple(needs_grad))
    likes = (input, conv_weight, None)  # the fake promises gradients in the layout of their tensors
    return tuple(
        input.new_empty(0) if grad is None else grad if like is None else like_strides(grad, like)
        for grad, like in zip(grads, likes, strict=True)
    )


def _fake_output(input: Tensor, conv_weight: Tensor, *settings: Any) -> Tensor:
    shape = conv_output_shape(input.shape, conv_weight.shape, _pack(*settings))
    memory_format = conv_memory_format(input, conv_weight)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format)


def _fake_train(input: Tensor, conv_weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
    output, z = (_fake_output(input, conv_weight, *args[7:11]) for _ in range(2))
    return output, z, *bn_act._fake_statistics(input, conv_weight.shape[0])


def _fake_conv_backward(
    grad_output: Tensor, input: Tensor, conv_weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs_input, needs_weight, needs_bias = args[-1]
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
    lambda input, conv_weight, *args: _fake_output(input, conv_weight, *args[7:11]),
)
define(
    f"conv_forward(Tensor input, Tensor conv_weight, Tensor? conv_bias, {_CONV}) -> Tensor",
    _conv_forward,
    lambda input, conv_weight, conv_bias, *settings: _fake_output(input, conv_weight, *settings),
)
define(
    f"conv_backward(Tensor grad_output, Tensor input, Tensor conv_weight, {_CONV}, bool[3] needs_grad) "
    "-> (Tensor, Tensor, Tensor)",
    _conv_backward,
    _fake_conv_backward,
)


class ConvBNActFunction(torch.autograd.Function):
    """Saves the input, the two weights, and what `recompute.save` says.

    With batch statistics it also saves z = conv(input), mean and invstd, as eager does.  With running statistics z is
    computed again in backward, and only if batch norm's weight needs a gradient: a frozen one costs nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        residual: Tensor | None,
        relu: bool,
        convolution: Convolution,
        *batch_norm: Any,
    ) -> Tensor:
        bn = BatchNorm(*batch_norm)
        output, z, mean, invstd = run(input, conv_weight, conv_bias, convolution, bn, residual, relu)
        if not bn.training:
            mean, invstd = reference.inference_statistics(bn)
        ctx.training, ctx.eps, ctx.convolution = bn.training, bn.eps, convolution
        ctx.residual_channels = None if residual is None else residual.shape[1]
        ctx.carrier = _carrier(input, residual) if relu and ctx.residual_channels == output.shape[1] else None
        ctx.carried = None
        saved = Saved(input, residual, None, z, *bn[2:4], mean, invstd, conv_weight, conv_bias)
        recompute.save(ctx, saved, output, relu, bn.training)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        saved = recompute.take(ctx)
        conv_weight, z = saved.conv_weight, saved.z
        assert conv_weight is not None
        *needs_conv, needs_residual, _, _, _, _, needs_weight, needs_bias, _, _, _ = ctx.needs_input_grad
        grads: Any = (None, None, None)
        carried = _carried_to(ctx)
        if must_differentiate(grad_output):
            grads, grad_weight, grad_bias, grad_residual = _differentiable_backward(ctx, saved, grad_output)
            if carried is not None:  # the sum's own gradient was an ordinary one
                grads = (grads[0] + carried, *grads[1:])
        else:
            if z is None and needs_weight:
                input = recompute.input_of(ctx, saved)
                z = conv_forward(input, conv_weight, saved.conv_bias, ctx.convolution, ctx.request)
            elif z is None:  # where no one reads sum g xhat, any tensor of the right shape will do
                z = grad_output
            # Without a ReLU the residual's gradient is grad_output itself.
            grad_z, grad_weight, grad_bias, grad_residual = bn_act.backward(
                grad_output, z, saved.output, saved.vectors, ctx.relu, ctx.training,
                any(needs_conv), needs_residual and ctx.relu, ctx.request,
            )  # fmt: skip
            saved, z = saved._replace(z=None, output=None), None  # the convolution's gradients take their place
            if grad_z is not None:
                input = recompute.input_of(ctx, saved)
                needs = tuple(needs_conv)
                grads = conv_backward(grad_z, input, conv_weight, ctx.convolution, needs, ctx.request, carried)
            if needs_residual and ctx.carrier is not None:
                _carry(ctx.carrier, grad_residual)
                needs_residual = False
        return (
            *(grad if needed else None for grad, needed in zip(grads, needs_conv, strict=True)),
            bn_act.gradient_of_residual(ctx, grad_residual if ctx.relu else grad_output) if needs_residual else None,
            None,
            None,
            None,
            None,
            grad_weight if needs_weight else None,
            grad_bias if needs_bias else None,
            None,
            None,
            None,
        )


# The input of a residual block has two gradients: that of its first convolution, and that of the sum at its end, which
# is computed first.  The convolution adds them in its own kernel, where PyTorch would read and write both once more.

_LONGEST_BLOCK = 4


def _carrier(input: Tensor, residual: Any) -> Any:
    """The node of the first convolution of a block that ends with a sum; None where that is not found.

    It is an ancestor of the sum's own node, so that it runs later in every backward pass in which the gradient of the
    block's input is wanted.
    """
    if torch.compiler.is_compiling() or not residual.requires_grad:
        return None
    node: Any = input.grad_fn
    own: Any = ConvBNActFunction._backward_cls
    for _ in range(_LONGEST_BLOCK):
        if not isinstance(node, own):
            return None
        source, number = node.next_functions[0]
        leaf = residual.grad_fn is None and getattr(source, "variable", None) is residual
        if leaf or (source is residual.grad_fn is not None and number == residual.output_nr):
            return node
        node = source
    return None


def _carry(node: Any, grad: Any) -> None:
    """Have a convolution add a gradient to that of its input, later in this backward pass."""
    before = _carried_to(node)
    node.carried = torch._C._current_graph_task_id(), grad if before is None else before.add_(grad)


def _carried_to(node: Any) -> Tensor | None:
    """What was carried to a node in this backward pass; an earlier one may have ended before it came to the node."""
    if node.carried is None:
        return None
    (task, grad), node.carried = node.carried, None
    return grad if task == torch._C._current_graph_task_id() else None


def _differentiable_backward(ctx: Any, saved: Any, grad_output: Tensor) -> Any:
    """The gradients as compositions of differentiable operations, from the inputs themselves."""
    input, conv_weight = recompute.input_of(ctx, saved), saved.conv_weight
    output = recompute.mask_of(ctx, saved, saved.z)
    z = reference.conv_forward(input, conv_weight, saved.conv_bias, ctx.convolution)
    grad_z, grad_weight, grad_bias, grad_residual = bn_act.differentiable_backward(
        grad_output, z, output, saved.vectors, ctx.training, ctx.eps
    )
    needs_conv = tuple(ctx.needs_input_grad[:3])
    grads = reference.conv_backward(grad_z, input, conv_weight, ctx.convolution, needs_conv)
    return grads, grad_weight, grad_bias, grad_residual
