"""Compiles csrc/cuda and its bindings, unchanged, with g++ against the emulator, into one library.

Objects are kept under build/emulator by a hash of all that went into them: a changed kernel is one compilation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from resfuse import _build

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
OUT = ROOT / "build" / "emulator"

WARNINGS = ["-Wall", "-Wno-unknown-pragmas", "-Wno-attributes"]
# Kernels reinterpret memory, which CUDA allows; a GPU contracts no expression across statements as g++ may not either.
KERNEL_FLAGS = ["-std=c++17", "-O2", "-g1", "-fno-strict-aliasing", "-ffp-contract=off"]
RUNTIME_FLAGS = ["-std=c++20", "-O2", "-g1"]
BINDING_FLAGS = ["-std=c++20", "-O1", "-g0"]


@dataclasses.dataclass(frozen=True)
class Variant:
    """How the kernels are instrumented.  The emulator itself never is: fibers share its state without locks."""

    name: str
    kernels: tuple[str, ...] = ()
    runtime: tuple[str, ...] = ()
    link: tuple[str, ...] = ()
    preload: str | None = None
    """The sanitizer's own library, which must be in the process before everything else."""


PLAIN = Variant("plain")
ASAN = Variant(
    "asan",
    ("-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
    ("-DEMU_ASAN",),
    ("-fsanitize=address,undefined",),
    "libasan.so",
)
# GCC's TSan does not see a memcpy or memset that it expands inline.
TSAN = Variant(
    "tsan",
    ("-fsanitize=thread", "-fno-builtin-memcpy", "-fno-builtin-memset"),
    ("-DEMU_TSAN",),
    ("-fsanitize=thread",),
    "libtsan.so",
)
COVERAGE = Variant("coverage", ("--coverage", "-fprofile-update=atomic", "-O1"), (), ("--coverage",))
VARIANTS = {variant.name: variant for variant in (PLAIN, ASAN, TSAN, COVERAGE)}


@cache
def find_headers() -> Path | str:
    """The toolkit's include folder, or the reason why the emulator can not be built here."""
    compiler = _build.find_compiler(os.environ)
    if compiler is None:
        return "no C++ compiler was found"
    version = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True).stdout
    if "Free Software Foundation" not in version:
        return f"{compiler} is not g++"
    homes = _build.candidate_homes(os.environ, sys.path)
    for home in homes:
        for header in (home / "include" / "cuda_bf16.h", *home.glob("targets/*/include/cuda_bf16.h")):
            if header.is_file():
                return header.parent
    return "no CUDA toolkit was found: the emulator needs the headers of its types"


def library(variant: Variant = PLAIN, csrc: Path = CSRC) -> Path:
    """Path of the library that registers torch.ops.resfuse_cuda.* for CPU tensors; built if it is not there.

    Args:
        variant: the instrumentation.
        csrc: the sources; the tests of planted bugs give a changed copy.
    """
    headers = find_headers()
    if isinstance(headers, str):
        raise RuntimeError(headers)
    torch_home = Path(torch.__file__).parent
    common = ["-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-pthread", "-DRESFUSE_CUDA_EMULATOR", *WARNINGS]
    emulated = ["-x", "c++", "-include", str(HERE / "emulator.h"), f"-I{HERE}", f"-I{csrc}", f"-isystem{headers}"]
    jobs: list[tuple[Path, list[str]]] = []
    for source in sorted((csrc / "cuda").glob("*.cu")):
        jobs.append((source, [*KERNEL_FLAGS, *common, *variant.kernels, *emulated]))
    for source in sorted(csrc.glob("bindings_cuda*.cpp")):
        includes = [f"-isystem{torch_home / 'include'}", f"-I{csrc}"]
        jobs.append((source, [*BINDING_FLAGS, *common, *_build.MACROS, *includes]))
    for source in sorted(HERE.glob("*.cpp")):
        jobs.append((source, [*RUNTIME_FLAGS, *common, *variant.runtime, f"-I{HERE}", f"-isystem{headers}"]))
    link = [
        *variant.link,
        "-pthread",
        f"-L{torch_home / 'lib'}",
        "-ltorch_cpu",
        "-ltorch",
        "-lc10",
        "-Wl,--no-undefined",
    ]
    with _lock():
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 2)) as pool:
            objects = list(pool.map(lambda job: _compile(*job), jobs))
        target = OUT / variant.name / f"resfuse_cuda_{_digest([*map(str, objects), *link])}.so"
        if not target.exists():
            _run([*_compiler(), "-shared", *map(str, objects), *link], target)
    return target


def preload(variant: Variant) -> dict[str, str]:
    """The environment in which a Python process can load the variant."""
    if variant.preload is None:
        return {}
    answer = subprocess.run([*_compiler(), f"-print-file-name={variant.preload}"], capture_output=True, text=True)
    return {"LD_PRELOAD": answer.stdout.strip()}


def _compiler() -> list[str]:
    return (_build.find_compiler(os.environ) or "g++").split()


@cache
def _compiler_version() -> str:
    return subprocess.run([*_compiler(), "--version"], capture_output=True, text=True).stdout + torch.__version__


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join([_compiler_version(), *parts]).encode()).hexdigest()[:16]


def _compile(source: Path, flags: list[str]) -> Path:
    texts = [path.read_text() for path in _with_includes(source)]
    folder = OUT / "objects"
    target = folder / f"{source.stem}_{_digest([*flags, *texts])}.o"
    if not target.exists():
        _run([*_compiler(), *flags, "-c", str(source)], target)
    return target


def _with_includes(source: Path) -> list[Path]:
    """The source, the emulator's headers, and every header of the project that they include."""
    found = [source, HERE / "emulator.h"]
    for path in found:
        for name in re.findall(r'^#include ["<]([^">]+)[">]', path.read_text(), re.MULTILINE):
            for folder in (path.parent, HERE, CSRC):
                header = (folder / name).resolve()
                if header.is_file() and header not in found:
                    found.append(header)
    return sorted(found)


def _run(command: list[str], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f"{target.name}.{os.getpid()}")
    done = subprocess.run([*command, "-o", str(scratch)], capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-8000:]}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)
    scratch.replace(target)


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    """One process at a time builds; the others find what it made."""
    OUT.mkdir(parents=True, exist_ok=True)
    with open(OUT / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def clean() -> None:
    shutil.rmtree(OUT, ignore_errors=True)


if __name__ == "__main__":
    print(library(VARIANTS[sys.argv[1] if len(sys.argv) > 1 else "plain"]))
