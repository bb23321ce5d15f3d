"""The Triton kernels, for NVIDIA GPUs from compute capability 8.0.

With TRITON_INTERPRET=1 in the environment the same kernels run on the CPU, in Triton's interpreter: very
slowly, for tests.  `use_backend("triton")` asks for that; automatic choice never takes it.

Triton is imported with the first kernel that runs: a machine without it, or without a GPU, only learns the reason.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
from typing import Any

import torch

from resfuse.types import AbsentDevice, Problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MINIMUM_CAPABILITY = (8, 0)
KERNELS = (
    "add_relu_forward", "add_relu_backward", "bn_act_forward", "bn_act_backward", "conv_bn_act_forward", "conv_forward",
    "bn_statistics", "bn_apply", "bn_backward_reduce", "bn_backward_apply",
)  # fmt: skip
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")  # as Triton reads it
_MODULES = {"add": "add_relu", "bn": "bn_act", "conv": "conv_bn_act"}


def __getattr__(name: str) -> Any:
    """A function of the kernel API, whose module needs Triton."""
    if name not in KERNELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES[name.partition('_')[0]]}")
    value = globals()[name] = getattr(module, name)
    return value


def unavailable_reason() -> str | None:
    if not INTERPRETED and not torch.cuda.is_available():
        return (
            "torch sees no CUDA GPU (torch.cuda.is_available() is False); TRITON_INTERPRET=1 interprets the kernels on "
            "the CPU"
        )
    if torch.version.hip is not None:
        return "written for NVIDIA GPUs, torch is built for AMD"
    return import_failure() or (None if INTERPRETED else launch_failure())


def only_on_request_reason() -> str | None:
    return "TRITON_INTERPRET=1 interprets the kernels, slowly: only on request" if INTERPRETED else None


def unsupported_reasons(problem: Problem) -> list[str]:
    reasons = []
    device_type = "cpu" if INTERPRETED and not isinstance(problem.device, AbsentDevice) else "cuda"
    if problem.device.type != device_type:
        reasons.append(f"tensors on {device_type} only, got {problem.device}")
    elif device_type == "cuda" and problem.capability < MINIMUM_CAPABILITY:
        found = ".".join(map(str, problem.capability))
        reasons.append(f"compute capability 8.0 or newer, got {found}")
    if problem.dtype not in DTYPES:
        reasons.append(f"float32, bfloat16 and float16 only, got {problem.dtype}")
    if 0 in problem.shape or 0 in (problem.weight_shape or ()):
        reasons.append("an empty tensor")
    return reasons


@functools.cache
def import_failure() -> str | None:
    """Why the kernels cannot be imported, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        for module in _MODULES.values():
            importlib.import_module(f"{__name__}.{module}")
    except ImportError as error:
        return f"Triton cannot be used: {error}"
    return None


@functools.cache
def launch_failure() -> str | None:
    """Why kernels cannot be launched, or None: Triton first compiles some C of its own, with the headers of Python.

    What it has compiled it finds in its cache again; but in Triton 3.6 each kernel needs another piece.
    """
    from triton import knobs
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    compilers = [os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang"), knobs.build.impl]
    if hasattr(nvidia, "make_launcher") and not any(compilers):
        return "Triton needs a C compiler to launch kernels: install gcc or clang, or set CC"
    try:
        driver.active.get_current_device()
    except Exception as error:
        return f"Triton cannot launch kernels: {type(error).__name__}: {error}"
    return None
