"""The C++/CUDA kernels of csrc/cuda, called through the operators that the `_cuda` library registers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from resfuse import _extension
from resfuse.backends.registry import Problem

VERBS = ("add_relu_forward", "add_relu_backward")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MINIMUM_CAPABILITY = (8, 0)

# Schemas live here, implementations in csrc/bindings_cuda.cpp. Results are arguments, so that torch allocates them.
_LIBRARY = torch.library.Library("resfuse_cuda", "DEF")
_LIBRARY.define("add_relu_forward(Tensor input, Tensor residual, Tensor(a!) output) -> ()")
_LIBRARY.define("add_relu_backward(Tensor grad_output, Tensor output, Tensor(a!) grad_input) -> ()")


def unavailable_reason() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU (torch.cuda.is_available() is False)"
    return _extension.load("_cuda")


def unsupported_reasons(problem: Problem) -> list[str]:
    reasons = []
    if problem.verb not in VERBS:
        reasons.append(f"cuda implements {' and '.join(VERBS)}, not {problem.verb}")
    if problem.dtype not in DTYPES:
        reasons.append(f"cuda computes in float32, bfloat16 and float16, not {problem.dtype}")
    if problem.device.type != "cuda":
        reasons.append(f"cuda needs tensors on a CUDA device, not on {problem.device}")
    elif _capability(problem.device) < MINIMUM_CAPABILITY:
        reasons.append(
            f"cuda needs compute capability 8.0 or newer, not {'.'.join(map(str, _capability(problem.device)))}"
        )
    return reasons


def add_relu_forward(input: Tensor, residual: Tensor) -> Tensor:
    """relu(input + residual), in the layout of `input`."""
    output = torch.empty_like(input)
    torch.ops.resfuse_cuda.add_relu_forward(_laid_out_as(output, input), _laid_out_as(output, residual), output)
    return output


def add_relu_backward(grad_output: Tensor, output: Tensor) -> Tensor:
    """The gradient of both summands: grad_output where output > 0 (or is NaN, as in torch.relu), else 0."""
    grad_input = torch.empty_like(output)
    torch.ops.resfuse_cuda.add_relu_backward(
        _laid_out_as(grad_input, grad_output), _laid_out_as(grad_input, output), grad_input
    )
    return grad_input


def _laid_out_as(target: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` with the strides of the dense `target`: itself, or a copy where the element order differs.

    The kernels address all operands with one flat index.
    """
    pairs = zip(tensor.shape, tensor.stride(), target.stride(), strict=True)
    if all(size <= 1 or stride == wanted for size, stride, wanted in pairs):
        return tensor
    return torch.empty_like(target).copy_(tensor)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
