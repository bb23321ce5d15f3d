"""Counts bytes: what autograd keeps between forward and backward, and all tensors that are alive during a step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def saved_bytes(step: Callable[[], object], own: Iterable[Tensor]) -> int:
    """Bytes that one training step keeps for backward, each storage once.

    Args:
        step: runs forward and backward.
        own: tensors that there are anyway (parameters, buffers): they are not counted.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    storages: dict[int, torch.UntypedStorage] = {}  # kept alive: an address is not used twice

    @torch.compiler.disable  # compiled code calls it, and must not compile it
    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storage.nbytes() for storage in storages.values())


class LiveBytes(TorchDispatchMode):
    """Follows the storages of all tensors that operators return, from then until they are freed.

    Workspace that an operator takes and gives back while it runs is not seen.  Compiled code runs uncompiled in here.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        """Start with those of `tensors`."""
        super().__init__()
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self.total = 0
        self.timeline: list[tuple[str, int]] = []
        """After every operator its name and the bytes alive."""
        for tensor in tensors:
            self._follow(tensor)

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive and size:
            self._alive[key] = weakref.ref(storage, lambda _: self._forget(key)), size
            self.total += size

    def _forget(self, key: int) -> None:
        self.total -= self._alive.pop(key)[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf)
        self.timeline.append((func.name(), self.total))
        return result


def live_bytes(step: Callable[[], object], tensors: Iterable[Tensor]) -> list[tuple[str, int]]:
    """(operator, bytes of all tensors alive after it) for a step that is run the second time.

    The first run shows what stays from step to step and was not in `tensors`: the optimiser's state.
    """
    live = LiveBytes(tensors)
    with live:
        step()
        live.timeline.clear()
        step()
    return live.timeline
