"""The kernels of an operation, forward and backward, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from resfuse.costs.cost import Cost
from resfuse.costs.device import Device
from resfuse.costs.operation import Operation

Kernels = tuple[Cost, ...]
Formula = Callable[[Operation, bool, "str | None", Device], tuple[Kernels, Kernels]]
"""(operation, training, backend, device) -> the kernels of forward, and those of backward."""

_FORMULAS: Mapping[str, Formula] = {}


def forward_cost(operation: Operation, *, training: bool, backend: str | None, device: Device) -> Cost:
    """What one call costs: the sum of `forward_kernels`."""
    return sum(forward_kernels(operation, training=training, backend=backend, device=device), Cost(0, 0, 0))


def backward_cost(operation: Operation, *, training: bool, backend: str | None, device: Device) -> Cost:
    """What all gradients of one call cost: the sum of `backward_kernels`."""
    return sum(backward_kernels(operation, training=training, backend=backend, device=device), Cost(0, 0, 0))


def forward_kernels(operation: Operation, *, training: bool, backend: str | None, device: Device) -> Kernels:
    """The kernels that one call launches, in order, each with its cost.

    Args:
        operation: which.
        training: the mode of the model, where `operation.options` has no `training` of its own.
        backend: "cuda", "triton", "cpu" or "reference" for resfuse's operators; None for ATen's.
        device: the machine, which need not be there.
    """
    return _formula(operation)(operation, training, backend, device)[0]


def backward_kernels(operation: Operation, *, training: bool, backend: str | None, device: Device) -> Kernels:
    """The kernels that the gradients of one call launch, in order, each with its cost; arguments as in forward."""
    return _formula(operation)(operation, training, backend, device)[1]


def is_estimated(operation: Operation) -> bool:
    """Whether the operation is not known here: then it costs its inputs and its output once, forward and backward."""
    return operation.name not in _FORMULAS


def _formula(operation: Operation) -> Formula:
    return _FORMULAS.get(operation.name, _unknown)


def _unknown(operation: Operation, training: bool, backend: str | None, device: Device) -> tuple[Kernels, Kernels]:
    touched = sum(tensor.bytes for tensor in (*operation.inputs, operation.output))
    return (Cost(0, touched, 1),), (Cost(0, touched, 1),)
