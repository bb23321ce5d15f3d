"""The `cuda` backend's own Python and C++ code on CPU tensors, with the kernels executed by the emulator.

tests/shapes.py registers it as one more backend, `cuda_emulator`, so that every test of an operator runs csrc/cuda.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
from collections.abc import Iterator
from functools import cache
from typing import Any
from unittest import mock

import torch

from resfuse.backends import cuda
from resfuse.types import Problem
from tests.emulator import build

RESIDENT_BLOCKS = 4
SEED = int(os.environ.get("EMU_SEED") or 0)
# Another variant, or one with planted bugs: in a process of its own, for operators can be registered only once.
LIBRARY = os.environ.get("EMU_LIBRARY")


def unavailable_reason() -> str | None:
    """Builds and loads the emulator at the first call; a source that does not compile is an error, not a reason."""
    reason = None if LIBRARY else build.unavailable_reason()
    if reason is None:
        _library()
    return reason


def unsupported_reasons(problem: Problem) -> list[str]:
    """Those of the cuda backend, with the CPU for its device."""
    if problem.device.type != "cpu":
        return [f"tensors on cpu only, got {problem.device}"]
    of_a_gpu = cuda.device_reasons(problem)
    return [reason for reason in cuda.unsupported_reasons(problem) if reason not in of_a_gpu]


def __getattr__(name: str) -> Any:
    """Every kernel is the cuda backend's."""
    return getattr(cuda, name)


@contextlib.contextmanager
def device(*, seed: int = 0, resident_blocks: int = RESIDENT_BLOCKS, cooperative: bool = True) -> Iterator[None]:
    """Run kernels on a device that holds so many blocks at once, in an order drawn from the seed (0: in order).

    Where it is not `cooperative` it refuses all cooperative launches, though it says that it can do them.
    """
    _library().emulator_configure(seed, resident_blocks, cooperative)
    try:
        with mock.patch.object(cuda, "_workspace_sizes", {}):  # a GPU never changes its size
            yield
    finally:
        _library().emulator_configure(SEED, RESIDENT_BLOCKS, True)


@dataclasses.dataclass
class Launches:
    """Counts of the launches inside `launches()`."""

    launches: int = 0
    blocks: int = 0
    ldmatrix_phases: int = 0
    ldmatrix_cycles: int = 0
    refusals: int = 0


@contextlib.contextmanager
def launches() -> Iterator[Launches]:
    """Count launches, blocks, refusals, and matrices that ldmatrix read, with the cycles that bank conflicts make."""
    counted, before = Launches(), _counters()
    yield counted
    for name, first, last in zip(vars(counted), before, _counters(), strict=True):
        setattr(counted, name, last - first)


@cache
def _library() -> ctypes.CDLL:
    path = LIBRARY or str(build.library())
    torch.ops.load_library(path)
    library = ctypes.CDLL(path)
    library.emulator_configure(SEED, RESIDENT_BLOCKS, True)
    return library


def _counters() -> list[int]:
    counters = (ctypes.c_long * 5)()
    _library().emulator_statistics(counters)
    return list(counters)
