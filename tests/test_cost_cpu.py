"""Calls of primitives on paper, against those that the backends `cpu` and `reference` make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import resfuse
from tests.cost_runs import CPU, Run, runs

SMALLEST_ACTIVATION = 2048  # B: what is per channel has a hundred
_CHECKS = {"resfuse_cpu::rows_live", "resfuse_cpu::snapshot_matches"}
_FREE = ("aten::empty", "aten::detach", "aten::view", "aten::scalar_tensor", "aten::t", "aten::as_strided")


class Operators(TorchDispatchMode):
    """Counts those that move an activation; a backward convolution is one for each of the gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        largest = max((arg.nbytes for arg in args if isinstance(arg, Tensor)), default=0)
        looks = name in _CHECKS or (name == "resfuse_cpu::copy_finite" and args[1] is None)
        if largest >= SMALLEST_ACTIVATION and not looks and not name.startswith(_FREE):
            self.names += [name] * (sum(args[-1]) if name == "aten::convolution_backward" else 1)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif("cpu" not in resfuse.available_backends(), reason="the CPU library is not built")
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@runs
def test_cpu_and_reference(name: str, case: str, training: bool, backend: str) -> None:
    run = Run(name, case, training)
    with resfuse.use_backend(backend):
        with torch.no_grad():
            run.forward()  # packs weights
        with Operators() as first:
            output = run.forward()
        grad_output = torch.ones_like(output)
        with Operators() as second:
            run.backward(output, grad_output)
    found = len(first.names), len(second.names)
    assert found == run.modelled(backend, CPU, least=SMALLEST_ACTIVATION), (first.names, second.names)
