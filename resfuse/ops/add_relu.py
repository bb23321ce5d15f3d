"""add_relu: relu(input + residual), the end of every residual block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resfuse.backends import registry
from resfuse.ops.library import IN_FORCE, FunctionContext, backend_for, define


def forward(input: Tensor, residual: Tensor) -> Tensor:
    return backend_for("add_relu_forward", input).add_relu_forward(input, residual)


def backward(grad_output: Tensor, output: Tensor, request: str | None = IN_FORCE) -> Tensor:
    return backend_for("add_relu_backward", output, request=request).add_relu_backward(grad_output, output)


define(
    "add_relu_forward(Tensor input, Tensor residual) -> Tensor",
    forward,
    lambda input, residual: torch.empty_like(input),
)
define(
    "add_relu_backward(Tensor grad_output, Tensor output) -> Tensor",
    backward,
    lambda grad_output, output: torch.empty_like(output),
)


class AddReluFunction(torch.autograd.Function):
    """Saves the output alone: its sign is the mask of the gradient, which both summands share."""

    @staticmethod
    def forward(ctx: FunctionContext, input: Tensor, residual: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            output = torch.ops.resfuse.add_relu_forward(input, residual)
        else:
            output = forward(input, residual)
            ctx.backend_request = registry.requested_backend()
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: FunctionContext, grad_output: Tensor) -> Any:
        (output,) = ctx.saved_tensors
        if torch.compiler.is_compiling():
            grad = torch.ops.resfuse.add_relu_backward(grad_output, output)
        elif torch.is_grad_enabled():  # create_graph=True: a gradient that can itself be differentiated
            grad = torch.where(output.detach() <= 0, 0, grad_output)
        else:
            grad = backward(grad_output, output, ctx.backend_request)
        return grad, grad
