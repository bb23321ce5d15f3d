"""Pooling, averages and the classifier.

With x the input, y the output, w the weight, a pass each:

| operation                             | forward reads | writes       | backward reads | writes          | launches |
|---------------------------------------|---------------|--------------|----------------|-----------------|----------|
| max_pool2d                            | x             | y, indices   | dy, indices    | dx (GPU: twice) | 1, 2     |
| avg_pool2d, adaptive_avg_pool2d, mean | x             | y            | dy             | dx              | 1, 1     |
| linear                                | x, w, bias    | y            | dy, w; dy, x; dy | dx; dw; db    | 1, 3     |

The indices have 8 bytes each, and ATen writes them in inference too; on a GPU it clears dx before it scatters into it.
A linear layer has 2 N K C FLOPs, and each of its two gradients as many.
"""

from __future__ import annotations

from resfuse.costs.cost import Kernels, kernel
from resfuse.costs.device import Device
from resfuse.costs.operation import Operation


def max_pool(operation: Operation, training: bool, backend: str | None, device: Device) -> tuple[Kernels, Kernels]:
    x, y = operation.inputs[0], operation.output
    both = y.bytes + 8 * y.numel
    backward = [kernel(x.bytes, both)]
    if device.type == "cuda":
        backward.insert(0, kernel(x.bytes))
    return (kernel(x.bytes, both),), tuple(backward) if operation.needs_input_grad else ()


def average(operation: Operation, training: bool, backend: str | None, device: Device) -> tuple[Kernels, Kernels]:
    one = kernel(operation.inputs[0].bytes, operation.output.bytes)
    return (one,), (one,) if operation.needs_input_grad else ()


def linear(operation: Operation, training: bool, backend: str | None, device: Device) -> tuple[Kernels, Kernels]:
    x, y, weight = operation.inputs[0], operation.output, operation.weight()
    flops = 2 * y.numel * weight.shape[1]
    product = kernel(x.bytes, weight.bytes, y.bytes, flops=flops)
    biases = operation.parameters[1:]
    forward = product._replace(bytes=product.bytes + sum(bias.bytes for bias in biases))
    trains = operation.needs_parameter_grad
    backward = [product] * (operation.needs_input_grad + trains)
    if biases and trains:
        backward.append(kernel(y.bytes, biases[0].bytes))
    return (forward,), tuple(backward)


FORMULAS = {
    "max_pool2d": max_pool,
    "avg_pool2d": average,
    "adaptive_avg_pool2d": average,
    "mean": average,
    "sum": average,
    "linear": linear,
}
