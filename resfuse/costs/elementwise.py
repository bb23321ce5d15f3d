"""Activations, sums, products, copies and views.

With x, r the inputs and y the output, a pass each:

| operation                | forward reads | writes | backward reads | writes | launches            |
|--------------------------|---------------|--------|----------------|--------|---------------------|
| relu, sigmoid, silu, ... | x             | y      | dy, saved      | dx     | 1, 1                |
| add                      | x, r          | y      | see below      |        | 1, 1                |
| mul                      | x, r          | y      | dy, x, dy, r   | dx, dr | 1, 2 (4, see below) |
| dropout, training        | x             | y, mask | dy, mask      | dx     | 1, 1                |
| dropout, eval            | -             | -      | -              | -      | 0                   |
| cat                      | all           | y      | -              | -      | 1, 0                |
| pad                      | x             | y, y   | dy             | dx     | 2, 1                |
| copy, cast               | x             | y      | dy             | dx     | 1, 1                |
| flatten, view, ...       | -             | -      | -              | -      | 0                   |

In place or not, the bytes are the same: relu_ reads and writes.  A sum passes its gradient on, which costs nothing; but
where two paths meet they have parted, and there autograd adds two gradients (read, read, write).  That addition is
counted with the sum, in the size of the residual.  A product whose second factor is broadcast (squeeze and excite)
writes the product that it has to sum before it sums it, and its paths, too, have parted before.
"""

from __future__ import annotations

from resfuse.costs.cost import Cost, Kernels, kernel
from resfuse.costs.device import Device
from resfuse.costs.operation import Operation, TensorInfo

ACTIVATIONS = (
    "relu", "relu6", "leaky_relu", "sigmoid", "silu", "gelu", "tanh", "hardswish", "hardsigmoid", "hardtanh", "clamp",
    "softmax", "log_softmax",
)  # fmt: skip
VIEWS = (
    "flatten", "view", "reshape", "unflatten", "permute", "transpose", "t", "squeeze", "unsqueeze", "slice", "narrow",
    "select", "chunk", "split", "expand", "expand_as", "detach", "alias", "identity", "getitem",
)  # fmt: skip
COPIES = ("clone", "contiguous", "to", "_to_copy", "copy")


def accumulation(gradient: TensorInfo) -> Cost:
    """What autograd adds where a tensor has been read twice."""
    return kernel(3 * gradient.bytes)


def activation(operation: Operation, training: bool, backend: str | None, device: Device) -> tuple[Kernels, Kernels]:
    x, y = operation.inputs[0], operation.output
    backward = (kernel(2 * y.bytes, x.bytes),) if operation.needs_input_grad else ()
    return (kernel(x.bytes, y.bytes),), backward


def add(operation: Operation, training: bool, backend: str | None, device: Device) -> tuple[Kernels, Kernels]:
    forward = (kernel(*(x.bytes for x in operation.inputs), operation.output.bytes),)
    two_paths = len(operation.inputs) > 1 and operation.output.dtype.is_floating_point and operation.needs_input_grad
    return forward, (accumulation(operation.inputs[1]),) if two_paths else ()


def mul(operation: Operation, training: bool, backend: str | None, device: Device) -> tuple[Kernels, Kernels]:
    y = operation.output
    forward = (kernel(*(x.bytes for x in operation.inputs), y.bytes),)
    if not operation.needs_input_grad:
        return forward, ()
    if len(operation.inputs) == 1:  # by a number
        return forward, (kernel(2 * y.bytes),)
    backward = []
    for own, other in (operation.inputs[:2], operation.inputs[1::-1]):
        backward.append(kernel(y.bytes, other.bytes, y.bytes))
        if own.numel < y.numel:
            backward += [kernel(y.bytes, own.bytes), accumulation(y)]
    return forward, tuple(backward)


def dropout(operation: Operation, training: bool, backend: str | None, device: Device) -> tuple[Kernels, Kernels]:
    if not operation.options.get("training", training):
        return (), ()
    one = kernel(2 * operation.output.bytes, operation.output.numel)  # the mask has a byte per element
    return (one,), (one,)


def cat(operation: Operation, training: bool, backend: str | None, device: Device) -> tuple[Kernels, Kernels]:
    return (kernel(*(x.bytes for x in operation.inputs), operation.output.bytes),), ()


def pad(operation: Operation, training: bool, backend: str | None, device: Device) -> tuple[Kernels, Kernels]:
    x, y = operation.inputs[0], operation.output
    return (kernel(y.bytes), kernel(2 * x.bytes)), (kernel(2 * x.bytes),) if operation.needs_input_grad else ()


def copy(operation: Operation, training: bool, backend: str | None, device: Device) -> tuple[Kernels, Kernels]:
    one = kernel(operation.inputs[0].bytes, operation.output.bytes)
    return (one,), (one,) if operation.needs_input_grad else ()


def view(operation: Operation, training: bool, backend: str | None, device: Device) -> tuple[Kernels, Kernels]:
    return (), ()


FORMULAS = {
    **dict.fromkeys(ACTIVATIONS, activation),
    **dict.fromkeys(VIEWS, view),
    **dict.fromkeys(COPIES, copy),
    "add": add,
    "mul": mul,
    "dropout": dropout,
    "cat": cat,
    "stack": cat,
    "pad": pad,
}
