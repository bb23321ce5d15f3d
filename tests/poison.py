"""Uninitialised memory filled with NaN, so that an output that a kernel forgot to write cannot pass by luck."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from resfuse.backends import buffer_pool

_ALLOCATORS: list[tuple[Any, str]] = [
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (Tensor, "new_empty"),
    (buffer_pool, "empty"),
]


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Every floating-point tensor that is allocated uninitialised starts as NaN."""

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate_poisoned

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in _ALLOCATORS:
            patch.setattr(owner, name, poison(getattr(owner, name)))
        yield
