"""ATen's convolution: what cuDNN or oneDNN moves and multiplies.

With x the input, w the weight, z the output, each read or written once:

| kernel                 | reads  | writes | FLOPs                        |
|------------------------|--------|--------|------------------------------|
| forward                | x, w   | z      | 2 N OH OW K (C / groups) R S |
| bias, forward          | z      | z      | -                            |
| gradient of the input  | dz, w  | dx     | as forward                   |
| gradient of the weight | dz, x  | dw     | as forward                   |
| gradient of the bias   | dz     | db     | -                            |

One launch each: cuDNN's implicit GEMMs.  Where it splits a sum, transposes or converts, it launches more; which of its
algorithms it takes can not be known without it.  On a CPU the bias is part of the primitive, forward and backward.
"""

from __future__ import annotations

import math

from resfuse.costs.cost import Cost, Kernels, kernel
from resfuse.costs.device import Device
from resfuse.costs.operation import Operation, TensorInfo


def convolution_flops(output: TensorInfo, weight: TensorInfo) -> int:
    """Of the output (N, K, OH, OW) of a convolution with a weight (K, C / groups, R, S); of each gradient as many."""
    return 2 * output.numel * math.prod(weight.shape[1:])


def forward(x: TensorInfo, weight: TensorInfo, z: TensorInfo) -> Cost:
    """The convolution alone."""
    return kernel(x.bytes, weight.bytes, z.bytes, flops=convolution_flops(z, weight))


def backward(
    x: TensorInfo, weight: TensorInfo, z: TensorInfo, *, needs_input: bool, needs_weight: bool, needs_bias: bool = False
) -> Kernels:
    """Those of its gradients that are needed."""
    flops = convolution_flops(z, weight)
    both = kernel(x.bytes, weight.bytes, z.bytes, flops=flops)  # reads dz and one of the two, writes the other
    found = [both] * (needs_input + needs_weight)
    if needs_bias:
        found.append(kernel(z.bytes, weight.shape[0] * z.dtype.itemsize))
    return tuple(found)


def conv2d(operation: Operation, training: bool, backend: str | None, device: Device) -> tuple[Kernels, Kernels]:
    x, z = operation.inputs[0], operation.output
    weight = operation.weight()
    has_bias = len(operation.parameters) > 1
    forwards = [forward(x, weight, z)]
    if has_bias and device.type == "cuda":
        forwards.append(kernel(2 * z.bytes, operation.parameters[1].bytes))
    trains = operation.needs_parameter_grad
    needs_bias = has_bias and trains and device.type == "cuda"
    gradients = backward(
        x, weight, z, needs_input=operation.needs_input_grad, needs_weight=trains, needs_bias=needs_bias
    )
    return tuple(forwards), gradients
