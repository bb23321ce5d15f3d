"""The verbs on plain tensors: layouts and allocation.  `resfuse.backends.reference` specifies each of them."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from resfuse.backends.triton import add_relu


def add_relu_forward(input: Tensor, residual: Tensor) -> Tensor:
    input = _dense_any_rank(input)
    output = torch.empty_like(input)
    add_relu.forward(input, _ordered_like(residual, input), output)
    return output


def add_relu_backward(grad_output: Tensor, output: Tensor) -> Tensor:
    output = _dense_any_rank(output)
    grad_input = torch.empty_like(output)
    add_relu.backward(_ordered_like(grad_output, output), output, grad_input)
    return grad_input


@overload
def _ordered_like(tensor: Tensor, like: Tensor) -> Tensor: ...
@overload
def _ordered_like(tensor: Tensor | None, like: Tensor) -> Tensor | None: ...
def _ordered_like(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """The tensor with the element order of the dense `like`, by a copy where it has another."""
    if tensor is None or tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(like).copy_(tensor)


def _dense_any_rank(tensor: Tensor) -> Tensor:
    """The tensor itself where its elements fill one block of memory, else such a copy."""
    if tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return tensor
    return torch.empty_like(tensor).copy_(tensor)
