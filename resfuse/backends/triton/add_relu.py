"""add_relu: relu(input + residual) and its gradient, over tensors as flat memory.

One launch each, reading two tensors and writing one: 3 itemsize bytes per element, 16 bytes per access where the
tensors are aligned.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse.backends.integers import cdiv
from resfuse.backends.triton.launch import launch
from resfuse.layout import gapless, ordered_like

BLOCK = 4096


@triton.jit
def add_relu_forward_kernel(x_ptr, residual_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """y = relu(x + residual), a block of elements per program; NaN stays NaN."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    total = tl.load(x_ptr + offsets, mask).to(tl.float32) + tl.load(residual_ptr + offsets, mask).to(tl.float32)
    tl.store(y_ptr + offsets, tl.where(total <= 0, 0.0, total).to(y_ptr.dtype.element_ty), mask)


@triton.jit
def add_relu_backward_kernel(dy_ptr, y_ptr, dx_ptr, size, BLOCK: tl.constexpr):
    """dx = dy where not y <= 0, else 0, a block of elements per program."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    dy, y = tl.load(dy_ptr + offsets, mask).to(tl.float32), tl.load(y_ptr + offsets, mask).to(tl.float32)
    tl.store(dx_ptr + offsets, tl.where(y <= 0, 0.0, dy).to(dx_ptr.dtype.element_ty), mask)


def add_relu_forward(input: Tensor, residual: Tensor) -> Tensor:
    input = gapless(input)
    output = torch.empty_like(input)
    size = output.numel()
    launch(add_relu_forward_kernel, cdiv(size, BLOCK), input, ordered_like(residual, input), output, size, BLOCK=BLOCK)
    return output


def add_relu_backward(grad_output: Tensor, output: Tensor) -> Tensor:
    output = gapless(output)
    grad_input = torch.empty_like(output)
    size, dy = output.numel(), ordered_like(grad_output, output)
    launch(add_relu_backward_kernel, cdiv(size, BLOCK), dy, output, grad_input, size, BLOCK=BLOCK)
    return grad_input
