"""`nn.Sequential` with fused calls."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from resfuse.nn.lazy import call, evaluated


def sequential_forward(modules: Iterable[nn.Module], input: Any) -> Any:
    """What `nn.Sequential.forward` computes, as a `Lazy` where its last modules can still be fused with others."""
    for module in modules:
        input = call(module, input, last=True)
    return input


class FusedSequential(nn.Sequential):
    """An `nn.Sequential` with fused calls; subclasses have constructors of their own."""

    @evaluated
    def forward(self, input: Tensor) -> Any:
        return sequential_forward(self._modules.values(), input)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):  # which is a plain Sequential
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)
