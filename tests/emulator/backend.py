"""The `cuda` backend's own Python and C++ code on CPU tensors, with the kernels executed by the emulator.

Registered as one more backend, `cuda_emulator`, so that every test of an operator also runs the sources of csrc/cuda.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from resfuse.backends import cuda
from resfuse.backends.registry import Problem
from tests.emulator import build


@functools.cache
def unavailable_reason() -> str | None:
    """Builds and loads the emulator at the first call; a compile error is an error, not a reason."""
    headers = build.find_headers()
    if isinstance(headers, str):
        return headers
    torch.ops.load_library(str(build.library()))
    return None


def unsupported_reasons(problem: Problem) -> list[str]:
    """Those of the cuda backend, with the CPU for its device."""
    if problem.device.type != "cpu":
        return [f"tensors on cpu only, got {problem.device}"]
    return [reason for reason in cuda.unsupported_reasons(problem) if "needs tensors on a CUDA device" not in reason]


def __getattr__(name: str) -> Any:
    """Every verb is the cuda backend's."""
    return getattr(cuda, name)
