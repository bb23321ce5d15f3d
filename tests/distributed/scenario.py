"""Shared by the scenarios: registration, and the exchange of results between two processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

SCENARIOS: dict[str, Callable[[], None]] = {}
IMAGE = (5, 3, 48, 48)


def scenario(function: Callable[[], None]) -> Callable[[], None]:
    SCENARIOS[function.__name__] = function
    return function


def rank() -> int:
    return dist.get_rank()


def share(tensor: Tensor, sizes: tuple[int, int] = (2, 3)) -> Tensor:
    """This process's part of a batch; by default the parts are unequal."""
    return tensor.split(sizes)[rank()]


def gathered(tensor: Tensor) -> Tensor:
    """The parts of all processes as one batch."""
    parts: list[Any] = [None, None]
    dist.all_gather_object(parts, tensor.detach())
    return torch.cat(parts)


def summed(tensor: Tensor) -> Tensor:
    """The sum over the processes, in float64, which adds no error of its own."""
    total = tensor.detach().double()
    dist.all_reduce(total)
    return total.to(tensor.dtype)


def assert_equal_everywhere(tensor: Tensor) -> None:
    parts: list[Any] = [None, None]
    dist.all_gather_object(parts, tensor.detach())
    assert torch.equal(*parts)


def to_sync(model: nn.Module, group: Any = None) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model, group)


@contextlib.contextmanager
def recorded_traffic() -> Iterator[list[tuple[str, int]]]:
    """The collectives that Python code starts (DDP's own are C++), with the number of elements that each takes."""
    traffic: list[tuple[str, int]] = []
    names = [name for name in dir(dist) if name.startswith(("all_", "reduce", "broadcast", "gather", "scatter"))]

    def recording(name: str) -> Callable[..., Any]:
        function = getattr(dist, name)

        def call(*args: Any, **options: Any) -> Any:
            traffic.append((name, min((arg.numel() for arg in args if isinstance(arg, Tensor)), default=0)))
            return function(*args, **options)

        return call

    functions = {name: recording(name) for name in names if callable(getattr(dist, name))}
    with mock.patch.multiple(dist, **functions):
        yield traffic
