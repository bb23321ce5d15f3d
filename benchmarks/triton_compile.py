"""Compile Triton kernels for GPUs that are not here, and take stock of what they need and what they are made of.

Results are kept on disk by the hash of the kernel's source, so that a second run compiles only what changed.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import cubin
from resfuse.backends.triton.devices import A100, H100, DeviceProperties
from resfuse.backends.triton.specs import KernelSpec

B200 = DeviceProperties("NVIDIA B200", (10, 0), 148, 232448)
DEVICES = {80: A100, 90: H100, 100: B200}
"""By compute capability, as Triton writes it."""
MMA = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
"""The tensor-core instruction that suits each; a kernel with any other wastes the GPU."""
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resfuse" / "triton_resources.json"


@dataclasses.dataclass(frozen=True)
class Usage:
    """What one compiled kernel needs, and its instructions."""

    registers: int
    """Per thread."""
    spill: int
    """Bytes of stack per thread: what did not fit into registers."""
    shared: int
    """Bytes per program."""
    occupancy: int
    """Programs that a multiprocessor holds at a time."""
    warps: int
    mma: str
    """The tensor-core instruction, "" if none."""
    vector_loads: int
    """Loads of 16 bytes per thread from global memory, or of whole tiles (cp.async.bulk)."""
    narrow_copies: int
    """Asynchronous copies of fewer than 16 bytes per thread."""
    vector_stores: int


@dataclasses.dataclass(frozen=True)
class Job:
    """A kernel to compile, by name and as plain values, so that it can be sent to another process."""

    capability: int
    module: str
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
    cooperative: bool

    @classmethod
    def of(cls, capability: int, spec: KernelSpec) -> Job:
        function = spec.kernel.fn
        signature, constants = tuple(spec.signature.items()), tuple(spec.constants.items())
        options = (spec.num_warps, spec.num_stages, spec.cooperative)
        return cls(capability, function.__module__, function.__name__, signature, constants, spec.aligned, *options)

    def spec(self) -> KernelSpec:
        kernel = getattr(importlib.import_module(self.module), self.name)
        options = (self.num_warps, self.num_stages, self.cooperative)
        return KernelSpec(kernel, dict(self.signature), dict(self.constants), self.aligned, *options, ())

    def key(self) -> str:
        """Changes with the kernel's source, with what it is specialised to, and with Triton."""
        text = f"{_versions()} {self.spec().kernel.cache_key} {self}"
        return hashlib.sha256(text.encode()).hexdigest()


def compile_all(
    jobs: Iterable[Job], processes: int, console: Console, *, cache: Path = CACHE
) -> tuple[dict[Job, Usage], dict[Job, str]]:
    """(what they need, why some can not be compiled); what the cache has is not compiled again."""
    known = _read(cache)
    keys = {job: job.key() for job in dict.fromkeys(jobs)}
    missing = {key: job for job, key in keys.items() if key not in known}
    errors: dict[str, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=console, transient=console.is_terminal) as progress,
        concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool,
    ):
        results = pool.map(_try, missing.values())
        for key, result in zip(missing, progress.track(results, len(missing), description="compiling"), strict=True):
            if isinstance(result, Usage):
                known[key] = result
                _write(cache, _read(cache) | {key: result})  # others may have written meanwhile
            else:
                errors[key] = result
    usages = {job: known[key] for job, key in keys.items() if key in known}
    return usages, {job: errors[key] for job, key in keys.items() if key in errors}


def measure(job: Job) -> Usage:
    """Compile one kernel and look at the result."""
    compiled = job.spec().compile(job.capability)
    registers, stack = _registers_and_stack(compiled.asm["cubin"])
    shared, warps, ptx = compiled.metadata.shared, compiled.metadata.num_warps, compiled.asm["ptx"]
    occupancy = cubin.occupancy(DEVICES[job.capability], registers, warps, shared)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, 0x(\w+)", ptx)
    bulk_loads, bulk_stores = (
        ptx.count("shared::cluster.global"),
        ptx.count("cp.async.bulk.tensor") and ptx.count("global.shared::cta"),
    )
    return Usage(
        registers, stack, shared, occupancy, warps,
        mma=next((name for name in MMA.values() if name in ptx), ""),
        vector_loads=_wide(ptx, "ld") + copies.count("10") + bulk_loads,
        narrow_copies=len(copies) - copies.count("10"),
        vector_stores=_wide(ptx, "st") + bulk_stores,
    )  # fmt: skip


def _try(job: Job) -> Usage | str:
    try:
        return measure(job)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _wide(ptx: str, instruction: str) -> int:
    """Accesses to global memory of 16 bytes per thread."""
    return len(re.findall(instruction + r"\.global[\w.:]*\.(?:v4\.[a-z]32|v2\.[a-z]64|v8\.[a-z]16)\b", ptx))


def _registers_and_stack(compiled: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled)
        file.flush()
        (code,) = cubin.codes(Path(file.name))
    return code.registers, code.stack


@functools.cache
def _versions() -> str:
    import triton

    return triton.__version__ + "".join(inspect.getsource(part) for part in (measure, _wide, _registers_and_stack))


def _read(cache: Path) -> dict[str, Usage]:
    try:
        return {key: Usage(**fields) for key, fields in json.loads(cache.read_text()).items()}
    except (OSError, ValueError, TypeError):
        return {}


def _write(cache: Path, known: dict[str, Usage]) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({key: dataclasses.asdict(usage) for key, usage in known.items()}))
    temporary.replace(cache)
