"""add_relu: relu(input + residual), the end of every residual block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resfuse.backends.dispatch import backend_for, must_differentiate, through_dispatcher
from resfuse.ops import recompute
from resfuse.ops.library import define
from resfuse.ops.recompute import Saved


def run(input: Tensor, residual: Tensor) -> Tensor:
    """relu(input + residual)."""
    if through_dispatcher():
        return torch.ops.resfuse.add_relu_forward(input, residual)
    return backend_for("add_relu_forward", input).add_relu_forward(input, residual)


define(
    "add_relu_forward(Tensor input, Tensor residual) -> Tensor",
    lambda input, residual: backend_for("add_relu_forward", input).add_relu_forward(input, residual),
    lambda input, residual: torch.empty_like(input),
)
define(
    "add_relu_backward(Tensor grad_output, Tensor output) -> Tensor",
    lambda grad_output, output: backend_for("add_relu_backward", output).add_relu_backward(grad_output, output),
    lambda grad_output, output: torch.empty_like(output),
)


class AddReLUFunction(torch.autograd.Function):
    """Saves the output alone: its sign is the mask of the gradient, which both summands share."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, residual: Tensor) -> Tensor:
        output = run(input, residual)
        recompute.save(ctx, Saved(input, residual), output, relu=True)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        output = recompute.take(ctx).output
        assert output is not None
        if must_differentiate(grad_output):
            grad = torch.where(output.detach() <= 0, 0, grad_output)
        elif through_dispatcher():
            grad = torch.ops.resfuse.add_relu_backward(grad_output, output)
        else:
            backend = backend_for("add_relu_backward", output, request=ctx.request)
            grad = backend.add_relu_backward(grad_output, output)
        return grad, grad
