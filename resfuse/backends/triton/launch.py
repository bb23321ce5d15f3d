"""Launching: in one form or the other, counted or listed, and past Triton's own argument binding.

Kernels are launched here and nowhere else, so that tests can count launches (`recorded`) and list, without a GPU, what
would be compiled for one (`collected`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from resfuse.backends.triton import INTERPRETED
from resfuse.backends.triton.config import INTERPRETER, DeviceProperties, cuda_properties

if INTERPRETED:
    from resfuse.backends.triton import interpreter

    interpreter.correct()

# The release whose `JITFunction.run` and `CompiledKernel.run` the direct call was written after.
HAS_DIRECT_CALL = triton.__version__.startswith("3.6.")
MOST_COMPILED = 1 << 16  # signatures to remember; shapes are part of them


class KernelSpec(NamedTuple):
    """A kernel with everything that Triton compiles it by, and how it is launched."""

    kernel: Any
    signature: dict[str, str]  # parameter -> Triton's name of its type ("*bf16", "i32", "fp32"), or "constexpr"
    constants: dict[str, Any]
    """Values of the parameters that are "constexpr"; None for pointers that are absent, 1 for integers that are 1."""
    aligned: tuple[str, ...]  # pointers and integers that are multiples of 16
    options: dict[str, Any]  # Triton's num_warps, num_stages and launch_cooperative_grid
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


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


def properties(device: torch.device) -> DeviceProperties:
    """The device that launches are planned for: a GPU, Triton's interpreter, or that of `collected`."""
    if _collectors:
        return _collectors[-1][0]
    return INTERPRETER if INTERPRETED else cuda_properties(device)


def launch(
    kernel: Any, programs: int, *args: Any, num_warps: int = 4, num_stages: int = 3, cooperative: bool = False,
    **constants: Any,
) -> None:  # fmt: skip
    """Launch a kernel, in a one-dimensional grid, on the device of its first argument and the current stream.

    `args` are its tensors (or None), integers and floats in order, `constants` its tl.constexpr parameters, which come
    last.  The programs of a `cooperative` launch may wait for each other; the grid has to be resident.
    """
    for names in _recorders:
        names.append(kernel.__name__)
    if _collectors:
        options = {"num_warps": num_warps, "num_stages": num_stages, "launch_cooperative_grid": cooperative}
        _collectors[-1][1].append(_spec(kernel, programs, args, constants, options))
        return
    if INTERPRETED:
        _interpret(kernel, programs, args, constants)
        return
    device = args[0].get_device()
    if device == torch.cuda.current_device():
        _launch(kernel, programs, args, constants, device, num_warps, num_stages, cooperative)
    else:
        with torch.cuda.device(device):
            _launch(kernel, programs, args, constants, device, num_warps, num_stages, cooperative)


_compiled: dict[tuple[Any, ...], Any] = {}


def _launch(
    kernel: Any, programs: int, args: tuple[Any, ...], constants: dict[str, Any], device: int, num_warps: int,
    num_stages: int, cooperative: bool,
) -> None:  # fmt: skip
    """Launch on the current device: the first time by Triton's own path, which binds, specialises and compiles.

    The compiled kernel is called directly when the same kernel comes again with the same integers, the same dtypes and
    all pointers aligned to 16 bytes: more than Triton specialises on.  Misaligned pointers always take Triton's path,
    and so do all launches while a profiler has hooks in place.
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
        stream = driver.active.get_current_stream(device)
        known.run(
            programs, 1, 1, stream, known.function, known.packed_metadata, None, None, None,
            *values, *constants.values(),
        )  # fmt: skip
        return
    options = {"num_warps": num_warps, "num_stages": num_stages, "launch_cooperative_grid": cooperative}
    compiled = kernel[(programs,)](*args, **constants, **options)
    if known is None and pointers & 15 == 0 and HAS_DIRECT_CALL:
        if len(_compiled) >= MOST_COMPILED:
            _compiled.clear()
        _compiled[signature] = compiled


def _interpret(kernel: Any, programs: int, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    import numpy

    with numpy.errstate(all="ignore"), warnings.catch_warnings():  # infinities and NaN are data like any other
        warnings.simplefilter("ignore", DeprecationWarning)  # the interpreter's way of making an int of a scalar
        kernel[(programs,)](*args, **constants)


_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}


def _spec(
    kernel: Any, programs: int, args: tuple[Any, ...], constants: dict[str, Any], options: dict[str, Any]
) -> KernelSpec:
    """The specialisation that Triton would compile for these arguments."""
    signature, compiled_in, aligned = {}, {}, []
    for name, value in zip(kernel.arg_names, (*args, *constants.values()), strict=True):
        if name in constants or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            compiled_in[name] = constants.get(name, value)
        elif isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
            if value.is_meta or value.data_ptr() % 16 == 0:
                aligned.append(name)
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(name)
        else:
            signature[name] = "fp32"
    assert list(constants) == kernel.arg_names[len(args) :], f"{kernel.__name__}: {list(constants)} are out of order"
    return KernelSpec(kernel, signature, compiled_in, tuple(aligned), options, (programs,))


_words: dict[tuple[str, int | None, int], Tensor] = {}


def shared_words(purpose: str, device: torch.device, size: int) -> Tensor:
    """At least `size` int32 words through which programs meet: zero at first, and each launch leaves them reusable.

    No launch on another stream uses them at the same time.
    """
    if _collectors:
        return torch.empty(size, dtype=torch.int32, device="meta")
    if INTERPRETED or torch.cuda.is_current_stream_capturing():  # a graph may be replayed beside anything else
        return torch.zeros(size, dtype=torch.int32, device=device)
    key = (purpose, device.index, driver.active.get_current_stream(device.index))
    words = _words.get(key)
    if words is None or words.numel() < size:
        words = _words[key] = torch.zeros(max(size, 1024), dtype=torch.int32, device=device)
    return words


def unstrided(*vectors: Tensor | None) -> list[Tensor | None]:
    """Per-channel vectors with the stride of one that kernels read them by."""
    return [vector if vector is None else vector.contiguous() for vector in vectors]
