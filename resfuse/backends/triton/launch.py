"""How kernels are launched: in one form or the other, counted or listed, and past Triton's own argument binding.

Kernels are launched here and nowhere else, so that tests can count launches (`recorded`) and list, without a GPU, what
would be compiled for one (`collected`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from resfuse.backends.triton import INTERPRETED
from resfuse.backends.triton.devices import A100, H100, DeviceProperties, cuda_properties, resident_programs
from resfuse.backends.triton.specs import KernelSpec, spec_of

__all__ = [
    "A100", "H100", "DeviceProperties", "KernelSpec", "barrier", "collected", "interpreted", "launch", "phases",
    "properties", "recorded", "resident_programs",
]  # fmt: skip

if INTERPRETED:
    from resfuse.backends.triton import interpreter

    interpreter.correct()

# The release whose `JITFunction.run` and `CompiledKernel.run` the direct call was written after.
HAS_DIRECT_CALL = triton.__version__.startswith("3.6.")
MOST_COMPILED = 1 << 16  # signatures to remember; shapes are part of them


_recorders: list[list[str]] = []
_collectors: list[tuple[DeviceProperties, list[KernelSpec]]] = []


@contextmanager
def recorded() -> Iterator[list[str]]:
    """The names of the kernels launched inside, in order."""
    names: list[str] = []
    _recorders.append(names)
    try:
        yield names
    finally:
        _recorders.pop()


@contextmanager
def collected(device: DeviceProperties) -> Iterator[list[KernelSpec]]:
    """Inside, kernels are not run but listed, as they would run on the device; tensors may be on the meta device."""
    specs: list[KernelSpec] = []
    _collectors.append((device, specs))
    try:
        yield specs
    finally:
        _collectors.pop()


def interpreted() -> bool:
    """Whether kernels launched now are interpreted: cooperative ones run as two launches, loops should be short."""
    return INTERPRETED and not _collectors


def properties(device: torch.device) -> DeviceProperties:
    """Those of a CUDA device; in the interpreter those of an H100."""
    if _collectors:
        return _collectors[-1][0]
    return H100 if INTERPRETED else cuda_properties(device)


def phases(launches: int | None, resident: bool) -> tuple[int, ...]:
    """The PHASEs that a cooperative kernel is launched with: (0,) in one launch, (1, 2) in two.

    Args:
        launches: 1 or 2 where that form is asked for, None for one launch wherever that works.
        resident: whether all programs fit on the device at the same time.
    """
    if launches not in (None, 1, 2):
        raise ValueError(f"launches: expected 1, 2 or None, got {launches}")
    if launches == 1 and (interpreted() or not resident):
        why = "the interpreter runs one program after another" if interpreted() else "the grid is not resident"
        raise ValueError(f"launches: one launch is not possible, {why}")
    return (1, 2) if launches == 2 or interpreted() or not resident else (0,)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 3,
    cooperative: bool = False,
    **constants: Any,
) -> None:
    """Launch a kernel on the device of its first argument, on the current stream.

    Args:
        kernel: a function under triton.jit whose tl.constexpr parameters come last.
        grid: number of programs.
        args: the other parameters, in order: tensors or None, integers, floats.
        num_warps, num_stages: as Triton has them.
        cooperative: the programs wait for each other; the grid has to be resident.
        constants: the tl.constexpr parameters, by name.
    """
    for names in _recorders:
        names.append(kernel.__name__)
    if _collectors:
        _collectors[-1][1].append(spec_of(kernel, grid, args, constants, num_warps, num_stages, cooperative))
        return
    if INTERPRETED:
        _interpret(kernel, grid, args, constants)
        return
    device = args[0].get_device()
    if device == torch.cuda.current_device():
        _launch(kernel, grid, args, constants, device, num_warps, num_stages, cooperative)
    else:
        with torch.cuda.device(device):
            _launch(kernel, grid, args, constants, device, num_warps, num_stages, cooperative)


_compiled: dict[tuple[Any, ...], Any] = {}


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    constants: dict[str, Any],
    device: int,
    num_warps: int,
    num_stages: int,
    cooperative: bool,
) -> None:
    """Launch on the current device: the first time by Triton's own path, which binds, specialises and compiles.

    What that returned is called directly when the same kernel comes again with the same integers, the same dtypes and
    all pointers aligned to 16 bytes: more than Triton specialises on.  Misaligned pointers always take its own path,
    and so do all while a profiler has hooks in place.
    """
    pointers = 0
    key: list[Any] = [kernel.fn, device, num_warps, num_stages, cooperative, *constants.values()]
    values: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            pointer = arg.data_ptr()
            pointers |= pointer
            values.append(pointer)
            key.append(arg.dtype)
        else:
            values.append(arg)
            key.append(float if isinstance(arg, float) else arg)
    signature = tuple(key)
    known = _compiled.get(signature) if pointers & 15 == 0 else None
    if known is not None and not (knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls):
        x, y, z = (*grid, 1, 1)[:3]
        stream = driver.active.get_current_stream(device)
        known.run(
            x, y, z, stream, known.function, known.packed_metadata, None, None, None, *values, *constants.values()
        )  # fmt: skip
        return
    options = {"num_warps": num_warps, "num_stages": num_stages, "launch_cooperative_grid": cooperative}
    compiled = kernel[grid](*args, **constants, **options)
    if known is None and pointers & 15 == 0 and HAS_DIRECT_CALL:
        if len(_compiled) >= MOST_COMPILED:
            _compiled.clear()
        _compiled[signature] = compiled


def _interpret(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    import numpy

    with numpy.errstate(all="ignore"), warnings.catch_warnings():  # infinities and NaN are data like any other
        warnings.simplefilter("ignore", DeprecationWarning)  # the interpreter's way of making an int of a scalar
        kernel[grid](*args, **constants)


_barriers: dict[tuple[int, int], Tensor] = {}


def barrier(device: torch.device) -> Tensor:
    """The word that the programs of a cooperative launch on the current stream meet at (see barrier.py)."""
    if _collectors or INTERPRETED:
        return torch.zeros(1, dtype=torch.int32, device="meta" if _collectors else device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)  # a graph may be replayed beside anything else
    key = (device.index, driver.active.get_current_stream(device.index))
    word = _barriers.get(key)
    if word is None:
        word = _barriers[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return word
