"""resfuse's operators, backend by backend: which kernels run, and what each moves.

With x the input, w the weight, z the convolution's output, r the residual, y the output, g = dy masked by y > 0, a pass
each; `z` in brackets is read only as far as it does not stay on the chip:

| kernel                              | reads                  | writes | where                                     |
|-------------------------------------|------------------------|--------|-------------------------------------------|
| conv_bn_act, inference              | x, w, r                | y      | cuda, triton, cpu (and a copy of r)       |
| conv_bn_act, training, one launch   | x, w, [z], r           | z, y   | cuda, triton: where all blocks are resident |
| conv_bn_act, training, two launches | x, w; z, r             | z; y   | cuda, triton: where they are not          |
| bn_act, training                    | x, [x], r              | y      | cuda, triton, cpu                         |
| bn_act, inference                   | x, r                   | y      | cuda, triton, cpu                         |
| bn_act backward, batch statistics   | dy, y, x, [g or dy, y; x] | g, dx | cuda, triton; cpu: in two calls         |
| bn_act backward, running statistics | dy, y, x               | g, dx  | cuda, triton; cpu: as above               |
| conv backward                       | dz, w; dz, x           | dx; dw | cuda: cuDNN's; triton; cpu: oneDNN's      |
| conv_bn_act backward without dz     | g or dy, y; z          | dx, dw | triton: where `fused_backward.pays`       |
| add_relu; its backward              | x, r; dy, y            | y; g   | cuda, triton, cpu                         |

In brackets stands what is read again only as far as it has not stayed on the chip: with `cuda` in registers and in
shared memory, with `triton` in the registers of a conv_bn_act whose programs have one tile each, with `cpu` nowhere.
Without a residual there is no g; without a ReLU neither y nor g.  What L2 saves beyond that is not counted, nor what a
tile reads again of x or w: each operand of a launch counts once.  On the backend `reference` every ATen operator counts
for itself.  Activations are taken to lie in channels_last memory, and inference to run without gradients: where they
are wanted, three launches per channel are added, which copy the mean and compute 1 / sqrt(variance + eps).
"""

from __future__ import annotations

from types import ModuleType

from resfuse.costs.cost import Kernels
from resfuse.costs.device import Device
from resfuse.costs.elementwise import accumulation
from resfuse.costs.fused import cpu, cuda, reference, sync, triton
from resfuse.costs.fused.call import call_of
from resfuse.costs.operation import Operation

FUSED = ("conv_bn_act", "bn_act", "add_relu", *sync.NAMES)

_BACKENDS: dict[str, ModuleType] = {"cuda": cuda, "triton": triton, "cpu": cpu, "reference": reference}


def forward(operation: Operation, training: bool, backend: str | None, device: Device) -> Kernels:
    """The kernels of one of the operators `FUSED`.

    Raises:
        ValueError: an unknown backend, or one whose plans can not be made here; malformed operands.
    """
    backend = _known(backend)
    call = call_of(operation, training)
    if call.name in sync.NAMES:
        return sync.forward(call, device, backend)
    return _BACKENDS[backend].forward(call, device)


def backward(operation: Operation, training: bool, backend: str | None, device: Device) -> Kernels:
    """The kernels of its gradients, and the addition where the residual's path meets the other one again."""
    backend = _known(backend)
    call = call_of(operation, training)
    own = sync.backward(call, device, backend) if call.name in sync.NAMES else _BACKENDS[backend].backward(call, device)
    return (*own, accumulation(call.residual)) if call.residual is not None and call.needs_residual else own


def _known(backend: str | None) -> str:
    if backend is None:
        return "reference"
    if backend not in _BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(_BACKENDS)}, got {backend!r}")
    return backend
