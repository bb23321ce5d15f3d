"""sync_bn_act: the four split verbs of any backend, and between them two collectives and what prepares them.

| step                       | reads    | writes | launches                                                       |
|----------------------------|----------|--------|----------------------------------------------------------------|
| statistics                 | x        | -      | 1                                                              |
| all-gather and merging     | vectors  |        | those of `sync_bn_act.merge` and its neighbours, one per operator |
| apply                      | x, r     | y      | 1                                                              |
| sums                       | dy, y, x | g      | 1                                                              |
| all-reduce                 | vectors  |        | concatenation, the collective, a division                      |
| gradient of the input      | g, x     | dx     | 1                                                              |

The collectives' own time depends on the network between the processes and is not part of this.
"""

from __future__ import annotations

import torch

from resfuse.backends import reference
from resfuse.costs.cost import Cost, Kernels, kernel
from resfuse.costs.device import Device
from resfuse.costs.fused.aten import operators
from resfuse.costs.fused.call import FusedCall, without_data
from resfuse.ops import sync_bn_act

_PROCESSES = 8  # rows that are merged; only a few vectors depend on it


NAMES = ("sync_bn_act", "bn_statistics", "bn_apply")


def forward(call: FusedCall, device: Device, backend: str) -> Kernels:
    """Of the whole, or of one of the two operators that a traced model has of it: then the collectives are others."""
    statistics, apply, _, _ = _verbs(call, device, backend)
    if call.name != "sync_bn_act":
        return statistics if call.name == "bn_statistics" else apply
    vector = torch.empty(call.output.shape[1], device="meta")

    def merged() -> None:
        torch.cat((vector, vector, vector.new_empty(1)))
        mean, m2, count = sync_bn_act.merge(torch.empty(_PROCESSES, 2 * vector.numel() + 1, device="meta"))
        sync_bn_act._update(vector, mean, 0.1)
        sync_bn_act._update(torch.empty_like(vector), m2 / (count - 1), 0.1)
        (m2 / count + 1e-5).rsqrt()

    return (*statistics, _collective(call), *operators(merged, device), *apply)


def backward(call: FusedCall, device: Device, backend: str) -> Kernels:
    _, _, reduce, gradient = _verbs(call, device, backend)
    if call.name == "bn_apply":
        return reduce
    if call.name == "bn_statistics":
        return gradient if call.needs_input else ()
    vector = torch.empty(call.output.shape[1], device="meta")
    averaged = operators(lambda: (torch.cat((vector, vector)) / torch.empty(1, device="meta")).chunk(2), device)
    return (*reduce, _collective(call), *averaged, *gradient) if call.needs_input else reduce


def _collective(call: FusedCall) -> Cost:
    """Two vectors of float32 in, two out."""
    return kernel(2 * 2 * 4 * call.output.shape[1])


def _verbs(call: FusedCall, device: Device, backend: str) -> tuple[Kernels, Kernels, Kernels, Kernels]:
    """statistics, apply, reduce, gradient of the input"""
    return _specified_verbs(call, device) if backend == "reference" else _split_verbs(call)


def _split_verbs(call: FusedCall) -> tuple[Kernels, Kernels, Kernels, Kernels]:
    size, residual = call.dz, call.dz if call.residual is not None else 0
    masked = size if call.relu else 0  # without a ReLU g is dy itself
    return (
        (kernel(size),),
        (kernel(size, residual, size, call.vectors),),
        (kernel((2 + call.relu) * size, masked),),
        (kernel(3 * size, call.vectors),),
    )


def _specified_verbs(call: FusedCall, device: Device) -> tuple[Kernels, Kernels, Kernels, Kernels]:
    x, v = without_data(call.input), torch.empty(call.output.shape[1], device="meta")
    residual = None if call.residual is None else without_data(call.residual)
    return (
        operators(lambda: reference.bn_statistics(x), device),
        operators(lambda: reference.bn_apply(x, v, v, v, v, residual, call.relu), device),
        operators(lambda: reference.bn_backward_reduce(x, x, x if call.relu else None, v, v), device),
        operators(lambda: reference.bn_backward_apply(x, x, None, v, v, v, v, v, 1), device),
    )
