"""Launching: in one form or the other, counted or listed, and past Triton's own argument binding.

Kernels are launched here and nowhere else, so that tests can count launches (`recorded`) and list, without a GPU, what
would be compiled for one (`collected`).
"""

from __future__ import annotations

import inspect
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from resfuse.backends.triton import INTERPRETED
from resfuse.backends.triton.config import INTERPRETER, DeviceProperties, cuda_properties
from resfuse.backends.triton.plan import COOPERATIVE, TWO_LAUNCHES

if INTERPRETED:
    from resfuse.backends.triton import interpreter

    interpreter.correct()

logger = logging.getLogger("resfuse")

MOST_COMPILED = 1 << 16  # signatures to remember; shapes are part of them
ARENA_WORDS = 1 << 20
"""Per device, four MiB: all convolutions of a captured ResNet-50 take a hundredth of it."""


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
    if known is None and pointers & 15 == 0 and takes_direct_calls(type(compiled.run)):
        if len(_compiled) >= MOST_COMPILED:
            _compiled.clear()
        _compiled[signature] = compiled


# What is passed to a launcher before the kernel's arguments, in Triton 3.6 (which names the first five) to 3.9.
_LAUNCHER_PARAMETERS = (
    "gridX", "gridY", "gridZ", "stream", "function", "kernel_metadata", "launch_metadata", "launch_enter_hook",
    "launch_exit_hook",
)  # fmt: skip


def takes_direct_calls(launcher: type) -> bool:
    """Whether Triton's launcher is called as `_launch` does it; another release may have another."""
    _, *parameters = inspect.signature(launcher.__call__).parameters.values()
    names = tuple(parameter.name for parameter in parameters[:-1])
    rest = parameters[-1].kind is inspect.Parameter.VAR_POSITIONAL if parameters else False
    return rest and len(names) >= 5 and names == _LAUNCHER_PARAMETERS[: len(names)]


def registers(kernel: Any, programs: int, *args: Any, cooperative: bool, **options: Any) -> int:
    """Registers per thread of a kernel that is compiled, but not launched, as `launch` would."""
    with torch.cuda.device(args[0].device):
        compiled = kernel.warmup(*args, grid=(programs,), **options, launch_cooperative_grid=cooperative)
        compiled._init_handles()
    return int(compiled.n_regs)


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


_refused: set[torch.device] = set()


def in_phases(planned: tuple[int, ...], device: torch.device, run: Callable[[int, Tensor | None], None]) -> None:
    """Call run(PHASE, word of the grid barrier or None) once, cooperatively, or for each of two launches.

    What the driver calls resident may be less than the device has: under MPS, or in a green context.  It refuses a
    grid that is too large before anything has run.
    """
    if planned == COOPERATIVE and device not in _refused:
        try:
            run(0, shared_words("barrier", device, 1))
            return
        except RuntimeError as error:
            if "cooperative launch" not in str(error):
                raise
            _refused.add(device)
            logger.warning("triton: two launches instead of each cooperative one on %s: %s", device, error)
    for phase in TWO_LAUNCHES:
        run(phase, None)


class Arena:
    """Words of one device, all zero at first, that are handed out once and never taken back."""

    def __init__(self, words: Tensor) -> None:
        self._words, self._used, self._lock = words, 0, threading.Lock()

    def take(self, size: int) -> Tensor | None:
        """A part of its own, in lines of L2 of its own; None where too little is left."""
        with self._lock:
            first, self._used = self._used, self._used + -(-size // 32) * 32
            if self._used > self._words.numel():
                self._used = first
                return None
            return self._words[first : first + size]


_arenas: dict[torch.device, Arena] = {}
_words: dict[tuple[str, torch.device, int], Tensor] = {}


def shared_words(purpose: str, device: torch.device, size: int) -> Tensor:
    """At least `size` int32 words through which programs meet: zero at first, and each launch leaves them reusable.

    No other launch uses them at the same time: those of one stream share theirs, and a captured launch has its own,
    because a graph may be replayed beside anything else.  They are parts of an arena, for a tensor that lives on must
    not lie in a graph's memory pool; so nothing is filled with zeros inside a graph but where there is no arena, or
    no more of it.
    """
    if _collectors:
        return torch.empty(size, dtype=torch.int32, device="meta")
    if INTERPRETED:
        return torch.zeros(size, dtype=torch.int32, device=device)
    capturing = torch.cuda.is_current_stream_capturing()
    key = (purpose, device, driver.active.get_current_stream(device.index))
    words = None if capturing else _words.get(key)
    if words is None or words.numel() < size:
        arena = _arenas.get(device)
        if arena is None and not capturing:
            arena = _arenas[device] = _new_arena(device)
        taken = None if arena is None else arena.take(size if capturing else max(size, 1024))
        if taken is None:
            return torch.zeros(size, dtype=torch.int32, device=device)
        if capturing:
            return taken
        words = _words[key] = taken
    return words


def _new_arena(device: torch.device) -> Arena:
    """An arena outside of any memory pool in force, which is in force for a stream or a thread: not for a new one."""

    def allocate() -> Tensor:
        with torch.cuda.device(device):
            words = torch.zeros(ARENA_WORDS, dtype=torch.int32, device=device)
            torch.cuda.current_stream().synchronize()  # other streams will use them
        return words

    with ThreadPoolExecutor(1) as thread:
        return Arena(thread.submit(allocate).result())


def unstrided(*vectors: Tensor | None) -> list[Tensor | None]:
    """Per-channel vectors with the stride of one that kernels read them by."""
    return [vector if vector is None else vector.contiguous() for vector in vectors]
