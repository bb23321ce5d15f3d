"""The kernels of an operation, forward and backward, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from resfuse.costs import elementwise, fused, pooling
from resfuse.costs.batch_norm import batch_norm
from resfuse.costs.convolution import conv2d
from resfuse.costs.cost import Cost, Kernels, kernel, total
from resfuse.costs.device import Device
from resfuse.costs.fused import FUSED
from resfuse.costs.operation import Operation

Formula = Callable[[Operation, bool, "str | None", Device], tuple[Kernels, Kernels]]
"""(operation, training, backend, device) -> the kernels of forward, and those of backward."""

_FORMULAS: Mapping[str, Formula] = {
    **dict.fromkeys(("conv2d", "convolution"), conv2d),
    **dict.fromkeys(("batch_norm", "native_batch_norm"), batch_norm),
    **elementwise.FORMULAS,
    **pooling.FORMULAS,
}


def forward_cost(operation: Operation, *, training: bool, backend: str | None, device: Device) -> Cost:
    """What one call costs: the sum of `forward_kernels`."""
    return total(forward_kernels(operation, training=training, backend=backend, device=device))


def backward_cost(operation: Operation, *, training: bool, backend: str | None, device: Device) -> Cost:
    """What all gradients of one call cost: the sum of `backward_kernels`."""
    return total(backward_kernels(operation, training=training, backend=backend, device=device))


def forward_kernels(operation: Operation, *, training: bool, backend: str | None, device: Device) -> Kernels:
    """The kernels that one call launches, in order, each with its cost.

    Args:
        operation: which.
        training: whether batch norms use the batch's statistics, where `operation.options` has no `training`.
        backend: "cuda", "triton", "cpu" or "reference" for resfuse's operators (None is the last); ATen's have none.
        device: the machine, which need not be there.

    Raises:
        ValueError: an unknown backend, one whose plans can not be made here, or operands that do not belong to the
            operation.
    """
    if operation.name in FUSED:
        return fused.forward(operation, training, backend, device)
    return _FORMULAS.get(operation.name, _unknown)(operation, training, backend, device)[0]


def backward_kernels(operation: Operation, *, training: bool, backend: str | None, device: Device) -> Kernels:
    """The kernels that the gradients of one call launch, in order, each with its cost.

    Arguments and errors are those of `forward_kernels`; `backend` is that of all verbs of backward, which automatic
    choice may take from another backend than the forward's.
    """
    if operation.name in FUSED:
        return fused.backward(operation, training, backend, device)
    return _FORMULAS.get(operation.name, _unknown)(operation, training, backend, device)[1]


def is_estimated(operation: Operation) -> bool:
    """Whether the operation is not known here: then it costs its inputs and its output once, forward and backward."""
    return operation.name not in _FORMULAS and operation.name not in FUSED


def _unknown(operation: Operation, training: bool, backend: str | None, device: Device) -> tuple[Kernels, Kernels]:
    one = kernel(*(tensor.bytes for tensor in (*operation.inputs, *operation.parameters, operation.output)))
    return (one,), (one,)
