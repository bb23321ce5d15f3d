"""add_relu: relu(input + residual) and its gradient, over tensors as flat memory.

One launch each, reading two tensors and writing one: 3 itemsize bytes per element, 16 bytes per access where the
tensors are aligned.
"""

import triton
import triton.language as tl
from torch import Tensor

from resfuse.backends.integers import cdiv
from resfuse.backends.triton.launch import launch

BLOCK = 4096
NUM_WARPS = 4


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


def forward(input: Tensor, residual: Tensor, output: Tensor) -> None:
    """All with the same element order in memory."""
    _launch(add_relu_forward_kernel, input, residual, output)


def backward(grad_output: Tensor, output: Tensor, grad_input: Tensor) -> None:
    """All with the same element order in memory."""
    _launch(add_relu_backward_kernel, grad_output, output, grad_input)


def _launch(kernel: triton.JITFunction, first: Tensor, second: Tensor, result: Tensor) -> None:
    size = result.numel()
    launch(kernel, (cdiv(size, BLOCK),), first, second, result, size, BLOCK=BLOCK, num_warps=NUM_WARPS)
