"""First contact: a GPU's kernels are chosen automatically once they have reproduced the reference on that very GPU.

The first time that a backend would be chosen for a dtype, a process of its own runs each of its kernels on a few small
problems and compares the results with `reference` in float64.  The verdict, which takes a minute where kernels have to
be compiled, is stored in the user's cache for this GPU, driver, PyTorch, Triton and these kernels; other processes wait
for it at a lock.  A kernel that is wrong, ends the process or does not finish is left out, with that as the reason.

RESFUSE_FIRST_CONTACT=skip believes in every kernel unseen, =force checks them once more; `use_backend` never asks.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import inspect
import json
import logging
import math
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from resfuse import _build
from resfuse.backends import stems
from resfuse.layout import conv_output_shape
from resfuse.types import BatchNorm, Convolution, Pooling, Problem

logger = logging.getLogger("resfuse")

_PACKAGE = Path(__file__).parent.parent
_CUDA_FILES = ((_PACKAGE, "_cuda.abi3.so"), (_build.csrc_dir() / "cuda", "*.cu*"))
KERNEL_FILES = {
    "cuda": _CUDA_FILES,
    "triton": ((_PACKAGE / "backends" / "triton", "*.py"),),
    "sm90": (*_CUDA_FILES, (_PACKAGE, "_sm90.abi3.so"), (_build.csrc_dir() / "cuda" / "sm90", "*.*")),
}
"""The backends whose kernels are checked, and what these are made of."""
SECONDS = 60.0  # for one problem, compiling its kernel included; four times as many for the start of a process
_STARTED = time.time()

Verdicts = dict[str, str | None]
"""Kernel -> None where it is right, else why it is left out."""


class UnsettledError(RuntimeError):
    """No verdict can be had now, for a reason that says nothing about the kernels and is not stored."""


def objection(backend: str, problem: Problem) -> str | None:
    """Why automatic choice leaves out the backend's kernel, or None.

    Raises:
        UnsettledError: there is no verdict, and a graph is being captured, which another process could disturb.
    """
    mode = os.environ.get("RESFUSE_FIRST_CONTACT", "")
    on_gpu = problem.device.type == "cuda" and torch.cuda.is_available()
    if backend not in KERNEL_FILES or not on_gpu or mode == "skip":
        return None
    if mode not in ("", "force"):
        return f"RESFUSE_FIRST_CONTACT: expected skip or force, got {mode!r}"
    device = cast(torch.device, problem.device).index
    try:
        known = verdicts(backend, problem.dtype, torch.cuda.current_device() if device is None else device, mode)
    except UnsettledError as error:
        if torch.cuda.is_current_stream_capturing():
            raise
        return f"{backend} could not be checked on this GPU: {error} (RESFUSE_FIRST_CONTACT=skip uses it unseen)"
    verdict = known.get(problem.kernel, "has not been checked")
    return verdict and f"{backend} failed the first contact with this GPU: {problem.kernel} {verdict}"


_known: dict[tuple[str, torch.dtype, int], Verdicts | str] = {}


def verdicts(backend: str, dtype: torch.dtype, device: int, mode: str = "") -> Verdicts:
    """Those on all kernels of a backend: as this process knows them, as they are stored, or made now.

    Args:
        mode: "force" has them made anew, unless that was done since this process started.

    Raises:
        UnsettledError: they cannot be made; so it is for the rest of the process, except where a graph is captured.
    """
    key = (backend, dtype, device)
    if key not in _known:
        facts = identity(backend, device) | {"backend": backend, "dtype": str(dtype)[6:]}
        path = folder() / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.json"
        found = _read(path, mode)
        if found is None and torch.cuda.is_current_stream_capturing():
            raise UnsettledError("no process is started while a graph is captured: run once before")
        try:
            _known[key] = found or _make(path, facts, mode, functools.partial(check, backend, dtype, device))
        except UnsettledError as error:
            _known[key] = str(error)
            logger.warning("the %s kernels are not used: they could not be checked: %s", backend, error)
    known = _known[key]
    if isinstance(known, str):
        raise UnsettledError(known)
    return known


def stored() -> dict[str, str]:
    """What is stored, for people: "NVIDIA H200, cuda, bfloat16, torch 2.11" -> that all is right, or what is not."""
    found = {}
    for path in sorted(folder().glob("*.json")):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            content = json.loads(path.read_text(encoding="utf-8"))
            about = f"{content['gpu']}, {content['backend']}, {content['dtype']}, torch {content['torch']}"
            found[about] = described(content["verdicts"])
    return found


def described(verdicts: Verdicts) -> str:
    wrong = "; ".join(f"{kernel} {reason}" for kernel, reason in verdicts.items() if reason)
    return f"left out: {wrong}" if wrong else "all kernels are right"


def folder() -> Path:
    return cache_folder() / "first_contact"


def cache_folder() -> Path:
    """The user's: one in the folder for temporary files where nobody has a home."""
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(cache or Path.home() / ".cache") / "resfuse"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "resfuse"


@functools.cache
def identity(backend: str, device: int) -> dict[str, str | None]:
    """Everything that a verdict holds for."""
    driver = Path("/sys/module/nvidia/version")
    triton = [one.version for one in importlib.metadata.distributions(name="triton")]
    kernels = hashlib.sha256()
    for directory, pattern in KERNEL_FILES[backend]:
        for path in sorted(directory.glob(pattern)):
            kernels.update(path.read_bytes())
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": driver.read_text().strip() if driver.exists() else None,
        "torch": str(torch.__version__),
        "triton": triton[0] if triton else None,
        "kernels": kernels.hexdigest()[:16],
    }


def _read(path: Path, mode: str) -> Verdicts | None:
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        if mode != "force" or path.stat().st_mtime >= _STARTED:
            return cast(Verdicts, json.loads(path.read_text(encoding="utf-8"))["verdicts"])
    return None


def _make(path: Path, facts: dict[str, str | None], mode: str, checked: Callable[[], Verdicts]) -> Verdicts:
    """Under the lock, at which another process may have been first; without one where nothing can be written."""
    with contextlib.ExitStack() as stack:
        try:
            import fcntl

            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(path.with_suffix(".lock").open("w")), fcntl.LOCK_EX)
        except (ImportError, OSError) as error:
            logger.warning("the check of the kernels cannot be stored: %s", error)
        if (found := _read(path, mode)) is not None:
            return found
        about = (facts["backend"], facts["dtype"], facts["gpu"])
        logger.warning("checking the %s kernels for %s on %s, once: about a minute", *about)
        found = checked()
        if any(found.values()):
            logger.warning("of the %s kernels for %s on %s are %s", *about, described(found))
        with contextlib.suppress(OSError):
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps({**facts, "verdicts": found}, indent=1), encoding="utf-8")
            temporary.replace(path)
        return found


# --- the process that starts others ----------------------------------------------------------------------------------


def command(backend: str, dtype: torch.dtype, device: int, kernels: Sequence[str]) -> list[str]:
    program = "import sys; from resfuse.backends import first_contact; first_contact.main(sys.argv[1:])"
    return [sys.executable, "-c", program, backend, str(dtype)[6:], f"cuda:{device}", *kernels]


def check(backend: str, dtype: torch.dtype, device: int) -> Verdicts:
    """Each kernel's verdict; a process that ends or hangs blames the kernel that ran, and another has the rest.

    Raises:
        UnsettledError: a process did not get as far as its first kernel, or memory did not suffice.
    """
    from resfuse.backends import dispatch

    found: Verdicts = {}
    kernels: tuple[str, ...] = dispatch.backend(backend).KERNELS
    while rest := [kernel for kernel in kernels if kernel not in found]:
        running = about = None
        for kind, *what in _messages(command(backend, dtype, device, rest)):
            if kind == "tries":
                running, about = what
            elif kind == "done":
                found[str(what[0])], running = what[1], None
            elif running is None or kind == "unsettled":
                raise UnsettledError(str(what[0]))
            else:
                found[running] = f"{what[0]} on {about}"
        if rest[0] not in found:
            raise UnsettledError("a process ended before it had checked a kernel")
    return found


def _messages(arguments: Sequence[str]) -> Iterator[list[str | None]]:
    """What the process says, and how it ended if it was not by itself."""
    path = os.pathsep.join(filter(None, (str(_PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "RESFUSE_FIRST_CONTACT": "skip", "PYTHONPATH": path}
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(arguments, bufsize=0, stdout=subprocess.PIPE, stderr=errors, env=environment) as process,
    ):
        assert process.stdout is not None
        limit = 4 * SECONDS
        try:
            while in_time := bool(select.select([process.stdout], [], [], limit)[0]):
                if not (line := process.stdout.readline()):
                    break
                with contextlib.suppress(ValueError):
                    if isinstance(message := json.loads(line), list):
                        limit = SECONDS
                        yield message
            if not in_time:
                yield ["ended", f"did not finish within {limit:.0f} s"]
            elif status := process.wait():
                errors.seek(0)
                last = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
                yield ["ended", f"ended its process (status {status}, {last!r})"]
        finally:
            process.kill()


# --- the process that checks -----------------------------------------------------------------------------------------

EPS = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
EPS_TF32 = 2.0**-8
# Of the norm of a result: operands that are rounded to TF32 make an error of 3e-4; those whose last bits are cut off
# one of 8e-4, most of it in one direction.
ROUNDED_TF32 = 5e-4
LARGE_STEM = 4096
"""Output pixels of a stem whose channels are padded or packed here, for a quick check."""
# (input, weight, stride, groups): a stem, and one whose channels are padded or packed, split sums, large tiles, groups,
# and sizes that fill nothing, the first with channels that TMA can load.
CONVOLUTIONS = (
    ((2, 3, 32, 32), (64, 3, 7, 7), 2, 1),
    ((10, 3, 60, 58), (64, 3, 7, 7), 2, 1),
    ((1, 512, 7, 7), (512, 512, 3, 3), 1, 1),
    ((32, 128, 28, 28), (128, 128, 3, 3), 1, 1),
    ((16, 64, 56, 56), (256, 64, 1, 1), 1, 1),
    ((2, 64, 8, 8), (64, 2, 3, 3), 1, 32),
    ((32, 24, 30, 31), (136, 24, 3, 3), 2, 1),
    ((3, 17, 9, 7), (19, 17, 3, 3), 1, 1),
)
# The convolutions that the operands of the other kernels would come from: read 16 bytes at a time, and one by one.
ACTIVATIONS = (((4, 64, 14, 14), (64, 64, 1, 1), 1, 1), ((3, 17, 7, 5), (17, 17, 1, 1), 1, 1))
POOLING = Pooling((3, 3), (1, 1), (1, 1), (1, 1), False)  # whose output has the shape of its input


def main(arguments: Sequence[str]) -> None:
    """Check kernels, and say on standard output, as JSON, what is tried and what became of each."""
    from resfuse.backends import dispatch

    def say(*message: str | None) -> None:
        print(json.dumps(message), flush=True)

    backend, dtype, device, *kernels = arguments
    stems.PADDED_FROM = stems.PACKED_FROM = LARGE_STEM
    try:
        torch.ones(1, device=device).item()
        module = dispatch.backend(backend)
    except RuntimeError as error:
        say("unsettled", _first_line(error))
        return
    for kernel in kernels:
        try:
            tries = functools.partial(say, "tries", kernel)
            say("done", kernel, fault(module, kernel, getattr(torch, dtype), torch.device(device), tries))
            torch.ones(1, device=device).item()
        except torch.OutOfMemoryError as error:
            say("unsettled", _first_line(error))
            return
        except RuntimeError:  # the kernel has ruined the CUDA context: another process has the rest
            return


def fault(
    module: Any, kernel: str, dtype: torch.dtype, device: torch.device, tries: Callable[[str], None] = lambda _: None
) -> str | None:
    """What is wrong with a kernel, or None; `tries` hears of every problem before it runs."""
    from resfuse.backends import reference

    switch: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    for precision in ("ieee", "tf32") if "conv" in kernel and dtype == torch.float32 else ("ieee",):
        switch.fp32_precision, tf32 = precision, precision == "tf32"
        bound = 2 * (EPS_TF32 if tf32 else EPS[dtype])
        for about, operands in problems(kernel, dtype):
            if "conv" in kernel and unsupported(module, kernel, device, operands, tf32):
                continue
            tries(about)
            expected = _results(getattr(reference, kernel), operands, device, torch.float64)
            try:
                found = _results(getattr(module, kernel), operands, device)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                return f"raises {type(error).__name__} on {about}: {_first_line(error)}"
            for one, truth in zip(found, expected, strict=True):
                worst = ((one - truth).abs() / (truth.abs() + truth.abs().mean() + 1e-3)).max().item()
                if not worst <= bound:
                    return f"is wrong on {about}: an error of {worst:.1e}, more than {bound:.1e}"
                if tf32 and not ((one - truth).norm() <= ROUNDED_TF32 * truth.norm()):
                    return f"does not round to TF32 on {about}"
    return None


def unsupported(module: Any, kernel: str, device: torch.device, operands: list[Any], tf32: bool) -> list[str]:
    """Why the backend cannot run this convolution, which automatic choice then gives to another."""
    input, weight, _, convolution = operands[:4]
    shapes = input.shape, weight.shape
    return module.unsupported_reasons(Problem(kernel, device, input.dtype, *shapes, convolution, tf32=tf32))


def problems(kernel: str, dtype: torch.dtype) -> Iterator[tuple[str, list[Any]]]:
    """(description, operands of the kernel), by the names of its parameters: with everything optional, and without."""
    from resfuse.backends import reference

    parameters = inspect.signature(getattr(reference, kernel)).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    for shape, weight_shape, stride, groups in CONVOLUTIONS if "conv" in kernel else ACTIVATIONS:
        channels, padding = weight_shape[0], weight_shape[2] // 2
        convolution = Convolution((stride, stride), (padding, padding), (1, 1), groups)
        like_output = conv_output_shape(torch.Size(shape), torch.Size(weight_shape), convolution)
        mean, bias, weight, conv_bias = (draw(channels) for _ in range(4))
        variance = 0.5 + draw(channels).abs()
        for training, memory_format in ((True, torch.channels_last), (False, torch.contiguous_format)):
            x = draw(shape).to(dtype).contiguous(memory_format=memory_format)
            dy, y, residual = (draw(like_output).to(dtype).contiguous(memory_format=memory_format) for _ in range(3))
            optional = training or kernel.startswith("add_relu")
            values = {
                "input": x, "residual": residual if optional else None, "grad_output": dy,
                "output": y if optional else None, "bn": BatchNorm(mean, variance, weight, bias, training, 0.1, 1e-5),
                "relu": training, "weight": weight, "bias": bias, "mean": mean, "invstd": variance, "sum_g": bias,
                "sum_g_xhat": mean, "training": training, "count": 99 if training else None,
                "needs_input_grad": True, "needs_residual_grad": True, "convolution": convolution,
                "conv_weight": (draw(weight_shape) / math.sqrt(math.prod(weight_shape[1:]))).to(dtype),
                "conv_bias": None if training else conv_bias, "pooling": POOLING, "shape": torch.Size(shape),
                "positions": reference.max_pool_forward(x, POOLING)[1] if kernel == "max_pool_backward" else None,
            }  # fmt: skip
            form = "with" if training else "without"
            yield f"{shape} to {channels} channels, {form} training", [values[name] for name in names]


def _results(
    function: Callable[..., Any], operands: list[Any], device: torch.device, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """All tensors that a kernel returns or updates, in float64; its operands are copies of these, in another dtype."""

    def moved(value: Any) -> Any:
        if isinstance(value, BatchNorm):
            return BatchNorm(*map(moved, value))
        return value.to(device, dtype or value.dtype, copy=True) if isinstance(value, Tensor) else value

    copies = [moved(value) for value in operands]
    returned = function(*copies)
    returned = (returned,) if isinstance(returned, Tensor) else returned
    running = [tensor for value in copies if isinstance(value, BatchNorm) for tensor in value[:2]]
    return [tensor.double() for tensor in (*returned, *running) if tensor is not None]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
