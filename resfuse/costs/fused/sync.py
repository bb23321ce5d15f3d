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

from types import ModuleType

import torch

from resfuse.costs.cost import Kernels, kernel
from resfuse.costs.device import Device
from resfuse.costs.fused.aten import operators
from resfuse.costs.fused.call import FusedCall, without_data
from resfuse.ops import sync_bn_act

_PROCESSES = 8  # rows that are merged; only a few vectors depend on it


def kernels(call: FusedCall, device: Device, specification: ModuleType | None) -> tuple[Kernels, Kernels]:
    """`specification`: a backend that runs on tensors without data; None: one kernel per verb."""
    vector = torch.empty(call.output.shape[1], device="meta")
    collective = kernel(2 * 4 * 2 * vector.numel())

    def merged() -> None:
        torch.cat((vector, vector, vector.new_empty(1)))
        mean, _, _ = sync_bn_act.merge(torch.empty(_PROCESSES, 2 * vector.numel() + 1, device="meta"))
        for running in (vector, torch.empty_like(vector)):
            sync_bn_act._update(running, mean, 0.1)
        (vector / vector + 1e-5).rsqrt()

    def averaged() -> None:
        (torch.cat((vector, vector)) / torch.empty(1, device="meta")).chunk(2)

    between, after = operators(merged, device), operators(averaged, device)
    verbs = _split_verbs(call) if specification is None else _specified_verbs(call, device, specification)
    statistics, apply, reduce, gradient = verbs
    forward = (*statistics, *between, collective, *apply)
    backward = (*reduce, *after, collective, *gradient) if call.needs_input else reduce
    return forward, backward


def _split_verbs(call: FusedCall) -> tuple[Kernels, Kernels, Kernels, Kernels]:
    size, residual = call.dz, call.dz if call.residual is not None else 0
    masked = size if call.relu else 0  # without a ReLU g is dy itself
    return (
        (kernel(size),),
        (kernel(size, residual, size, call.vectors),),
        (kernel((2 + call.relu) * size, masked),),
        (kernel(3 * size, call.vectors),),
    )


def _specified_verbs(call: FusedCall, device: Device, backend: ModuleType) -> tuple[Kernels, Kernels, Kernels, Kernels]:
    x, v = without_data(call.input), torch.empty(call.output.shape[1], device="meta")
    residual = None if call.residual is None else without_data(call.residual)
    return (
        operators(lambda: backend.bn_statistics(x), device),
        operators(lambda: backend.bn_apply(x, v, v, v, v, residual, call.relu), device),
        operators(lambda: backend.bn_backward_reduce(x, x, x if call.relu else None, v, v), device),
        operators(lambda: backend.bn_backward_apply(x, x, None, v, v, v, v, v, 1), device),
    )
