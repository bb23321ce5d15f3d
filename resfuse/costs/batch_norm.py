"""ATen's batch norm, as it runs on channels_last memory.

With x the input, y the output, the passes over an activation are

| mode                             | GPU: reads   | writes | launches           | CPU: reads    | writes |
|----------------------------------|--------------|--------|--------------------|---------------|--------|
| forward, batch statistics        | x, x         | y      | 4, or 1 of cuDNN's | x, x, x       | y      |
| forward, running statistics      | x            | y      | 2, or 1 of cuDNN's | x             | y      |
| backward, batch statistics       | dy, x, dy, x | dx     | 3, or 1 of cuDNN's | dy, x, dy, x  | dx     |
| backward, running statistics     | dy, x, dy    | dx     | 1                  | dy, x, dy     | dx     |

Assumed: bfloat16 takes ATen's own kernels (forward: clear the semaphores, statistics, update the running ones,
normalise; in eval 1 / sqrt(variance + eps), normalise; backward: clear, reduce, apply), float32 and float16 cuDNN's,
which are one launch: `_select_batch_norm_backend` and `batch_norm_cuda` in aten/src/ATen/native/{Normalization.cpp,
cuda/Normalization.cu} of PyTorch 2.11.  ATen's CPU kernel takes mean and variance in two passes.  The addition to
`num_batches_tracked`, one more launch of a training module, is an operation of its own.
"""

from __future__ import annotations

import torch

from resfuse.costs.cost import Kernels, kernel
from resfuse.costs.device import Device
from resfuse.costs.operation import Operation, TensorInfo


def forward(x: TensorInfo, y: TensorInfo, vectors: int, *, training: bool, device: Device) -> Kernels:
    """`vectors`: bytes of weight, bias and running statistics."""
    if device.type != "cuda":
        return (kernel((3 if training else 1) * x.bytes, y.bytes, vectors),)
    if _by_cudnn(x):
        return (kernel((2 if training else 1) * x.bytes, y.bytes, vectors),)
    statistics = 2 * x.shape[1] * 4  # mean and invstd, float32
    if not training:
        return kernel(statistics), kernel(x.bytes, y.bytes, vectors)
    return kernel(0), kernel(x.bytes, statistics), kernel(statistics, vectors), kernel(x.bytes, y.bytes, vectors)


def backward(x: TensorInfo, vectors: int, *, training: bool, needs_input: bool, device: Device) -> Kernels:
    """The gradients of weight and bias, which come of what that of the input needs, and that of the input."""
    size = x.bytes
    reduce = kernel(2 * size, vectors)
    if not needs_input:
        return (reduce,)
    apply = kernel(3 * size if training else 2 * size, vectors)
    if device.type != "cuda" or not training or _by_cudnn(x):
        return (kernel(reduce.bytes + apply.bytes),)
    return kernel(0), reduce, apply


def batch_norm(operation: Operation, training: bool, backend: str | None, device: Device) -> tuple[Kernels, Kernels]:
    x = operation.inputs[0]
    training = operation.options.get("training", training)
    vectors = sum(parameter.bytes for parameter in operation.parameters)
    forwards = forward(x, operation.output, vectors, training=training, device=device)
    if not training and not operation.needs_parameter_grad:  # frozen: dx = scale dy
        return forwards, (kernel(2 * x.bytes, vectors),) if operation.needs_input_grad else ()
    gradients = backward(
        x, vectors, training=training, needs_input=operation.needs_input_grad, device=device
    )  # fmt: skip
    return forwards, gradients


def _by_cudnn(x: TensorInfo) -> bool:
    return x.dtype in (torch.float32, torch.float16)
