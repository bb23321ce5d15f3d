"""Compiles csrc/cuda and its bindings, unchanged, with g++ against the emulator, into one library.

Objects are kept under build/emulator by a hash of all that went into them: a changed kernel is one compilation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from resfuse import _build
from tests.emulator import cutlass

HERE = Path(__file__).resolve().parent
RUNTIME = HERE / "runtime"
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
OUT = ROOT / "build" / "emulator"

COMMON = ["-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-pthread", "-Wall", "-DRESFUSE_CUDA_EMULATOR"]
# Kernels reinterpret memory and unroll loops by pragmas, as nvcc has it; -g1 names lines, which errors are told with.
KERNELS = ["-std=c++17", "-g1", "-fno-strict-aliasing", "-ffp-contract=off", "-Wno-unknown-pragmas", "-Wno-attributes"]
RUNTIME_FLAGS = ["-std=c++20", "-O2", "-g1", "-Wextra", "-Wno-attributes"]
BINDINGS = ["-std=c++20", "-O1", "-g0", *_build.MACROS]


@dataclasses.dataclass(frozen=True)
class Variant:
    """An instrumentation of the kernels.  The emulator never is: CUDA threads share its state without locks."""

    name: str
    kernels: tuple[str, ...]
    link: tuple[str, ...] = ()
    runtime: tuple[str, ...] = ()
    preload: str | None = None
    """The sanitizer's library, which has to be in a process before all else."""


# Checks that cost little: runtime/checks.cpp makes them errors of the launch.
PLAIN = Variant("plain", ("-O1", "-fsanitize=alignment,bounds", "-fno-sanitize-recover=all"))
ASAN = Variant(
    "asan",
    ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
    ("-fsanitize=address,undefined",),
    ("-DEMU_ASAN",),
    "libasan.so",
)
TSAN = Variant(  # which in GCC does not see a memcpy or memset that is expanded inline
    "tsan",
    ("-O1", "-fsanitize=thread", "-fno-builtin-memcpy", "-fno-builtin-memset"),
    ("-fsanitize=thread",),
    ("-DEMU_TSAN",),
    "libtsan.so",
)
COVERAGE = Variant("coverage", ("-O1", "--coverage", "-fprofile-update=single"), ("--coverage",))
VARIANTS = {variant.name: variant for variant in (PLAIN, ASAN, TSAN, COVERAGE)}


@cache
def unavailable_reason() -> str | None:
    """Why the emulator cannot be built here, or None."""
    if _build.flag_set(os.environ, "EMU_OFF"):
        return "EMU_OFF is set: what the kernels compute on a CPU is not asked for"
    if platform.machine() != "x86_64":
        return "the emulator needs x86-64, in whose assembly it switches stacks"
    compiler = _build.find_compiler(os.environ)
    if compiler is None:
        return "no C++ compiler was found; the emulator needs g++"
    if "Free Software Foundation" not in _version():
        return f"the C++ compiler {compiler} is not g++, which the emulator needs"
    if _toolkit_headers() is None:
        return "no CUDA toolkit was found, whose headers have the types of the kernels"
    return None


@cache
def sm90_unavailable_reason(variant: Variant = PLAIN) -> str | None:
    """Why csrc/cuda/sm90 is not part of the library."""
    if variant is TSAN:
        return "mbarriers, TMA and wgmma order memory in ways that TSan is not told of"
    if variant is ASAN:
        return "CUTLASS reads four bytes of a bfloat16 argument (array_subbyte.h), and ASan ends the process"
    if _build.find_cutlass(sys.path) is None:
        return f"CUTLASS's headers were not found; {_build.HOW_TO_GET_CUTLASS}"
    return unavailable_reason()


def library(
    variant: Variant = PLAIN,
    changed: Path | None = None,
    files: Collection[str] = (),
    cutlass_edits: tuple[cutlass.Edit, ...] = (),
) -> Path:
    """The library that registers torch.ops.resfuse_cuda.* and resfuse_sm90.* for CPU tensors, built if need be.

    Args:
        variant: the instrumentation.
        changed: another csrc, to take these files of kernels from: the tests of planted bugs have one.
        files: their names in csrc/cuda.
        cutlass_edits: of the headers that these files include.
    """
    has_sm90 = sm90_unavailable_reason(variant) is None
    folder = CSRC / "cuda"
    sources = sorted([*folder.glob("*.cu"), *(folder.glob("sm90/*.cu") if has_sm90 else ())])
    jobs = [_kernel(path, variant, CSRC) for path in sources if path.relative_to(folder).as_posix() not in files]
    if changed is not None:  # first: of functions that are in several objects, the linker takes the first
        jobs = [_kernel(changed / "cuda" / name, variant, changed, cutlass_edits) for name in files] + jobs
    torch_home = Path(torch.__file__).parent
    bindings = (*BINDINGS, *COMMON, f"-isystem{torch_home / 'include'}")
    jobs += [_Job(source, bindings, CSRC) for source in sorted(CSRC.glob("bindings_cuda*.cpp"))]
    if has_sm90:  # without tensor_maps.cpp, in whose place the emulator has its own
        own = (CSRC / "bindings_sm90.cpp", CSRC / "cuda/sm90/conv.cpp", CSRC / "bindings_sm100.cpp", HERE / "sm100.cpp")
        jobs += [_Job(source, bindings, CSRC) for source in own]
    link = [*variant.link, f"-L{torch_home / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    return _link("resfuse_cuda", variant, [*jobs, *_runtime(variant)], link)


def probes(variant: Variant = PLAIN) -> Path:
    """The library of probes.cu: the tests of the emulator itself."""
    jobs = [_kernel(HERE / "probes.cu", variant, CSRC), *_runtime(variant)]
    return _link("probes", variant, jobs, list(variant.link))


def im2col() -> Path:
    """The library of im2col.cu."""
    return _link("im2col", PLAIN, [_kernel(HERE / "im2col.cu", PLAIN, CSRC), *_runtime(PLAIN)], [])


def sanitizer_environment(variant: Variant) -> dict[str, str]:
    """The environment of a process that loads the variant; any finding ends it."""
    if variant.preload is None:
        return {}
    answer = subprocess.run([*_compiler(), f"-print-file-name={variant.preload}"], capture_output=True, text=True)
    return {
        "LD_PRELOAD": answer.stdout.strip(),
        # Leaks are Python's own. The sanitizers' symbolizers miss many lines: with_lines() finds them.
        "ASAN_OPTIONS": "detect_leaks=0:symbolize=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:symbolize=0",
        "TSAN_OPTIONS": "halt_on_error=1:symbolize=0",
    }


def with_lines(report: str, library: Path) -> str:
    """A sanitizer's report with functions and lines in place of addresses in the library."""
    address = re.compile(rf"(?:<null> <null> )?\(\S*{re.escape(library.name)}\+(0x[0-9a-f]+)\)")
    addresses = sorted(set(address.findall(report)))
    command = ["addr2line", "--addresses", "-ifCe", str(library), *addresses]
    answer = subprocess.run(command, capture_output=True, text=True).stdout if addresses else ""
    places: dict[str, str] = {}
    for block in re.split(r"^0x", answer, flags=re.MULTILINE)[
        1:
    ]:  # an address, then function and line, innermost first
        number, *pairs = block.splitlines()
        places[hex(int(number, 16))] = "\n       in ".join(
            f"{function[:160]} {line}" for function, line in zip(pairs[::2], pairs[1::2], strict=True)
        )
    return address.sub(lambda match: places.get(hex(int(match[1], 16)), match[0]), report)


@dataclasses.dataclass(frozen=True)
class _Job:
    source: Path
    flags: tuple[str, ...]
    csrc: Path

    def object(self) -> Path:
        """Compile, unless the same text was compiled with the same flags before, in whatever folder it lay."""
        texts = [path.read_text() for path in _with_includes(self.source, self.csrc)]
        target = OUT / "objects" / f"{self.source.stem}_{_digest(*self.flags, *texts)}.o"
        places = [f"-I{self.csrc}", f"-ffile-prefix-map={self.csrc}=csrc", f"-ffile-prefix-map={HERE}=tests/emulator"]
        _make(target, [*_compiler(), *self.flags, *places, "-c", str(self.source)])
        return target


def _kernel(source: Path, variant: Variant, csrc: Path, cutlass_edits: tuple[cutlass.Edit, ...] = ()) -> _Job:
    first = ["-x", "c++", "-include", str(RUNTIME / "emulator.h")]
    headers = _toolkit_flags()
    if "cuda/sm90/" in f"{source} {source.read_text()}":
        headers += _cutlass_flags(cutlass_edits)
    return _Job(source, (*KERNELS, *COMMON, *variant.kernels, f"-I{RUNTIME}", *headers, *first), csrc)


@cache
def _cutlass_flags(edits: tuple[cutlass.Edit, ...]) -> list[str]:
    """Those of the headers of cutlass.py, which are made where they are not there yet."""
    source = _build.find_cutlass(sys.path)
    assert source is not None
    texts = (Path(cutlass.__file__), source / "include" / "cutlass" / "version.h")
    name = f"cutlass_{_digest(str(source), repr(edits), *(path.read_text() for path in texts))}"
    headers, utilities = OUT / name, source / "tools" / "util" / "include"
    OUT.mkdir(parents=True, exist_ok=True)
    with _locked(headers.with_suffix(".lock")):
        if not headers.exists():
            cutlass.overlay(source / "include", headers, edits)
    return [*cutlass.FLAGS, *(f"-isystem{path}" for path in (headers, utilities, f"{_toolkit_headers()}/cccl"))]


def _runtime(variant: Variant) -> list[_Job]:
    flags = (*RUNTIME_FLAGS, *COMMON, *variant.runtime, *_toolkit_flags())
    return [_Job(source, flags, CSRC) for source in sorted(RUNTIME.glob("*.cpp"))]


def _link(name: str, variant: Variant, jobs: list[_Job], flags: list[str]) -> Path:
    reason = unavailable_reason()
    if reason:
        raise RuntimeError(reason)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 2)) as pool:
        objects = [str(path) for path in pool.map(_Job.object, jobs)]
    target = OUT / variant.name / f"{name}_{_digest(*objects, *flags)}.so"
    _make(target, [*_compiler(), "-shared", "-pthread", "-Wl,-z,defs", *objects, *flags])
    return target


def _make(target: Path, command: list[str]) -> None:
    """Run the command that makes `target`, once, however many processes want it."""
    done = target.with_suffix(".done")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_suffix(".lock")):
        if done.exists():
            return
        result = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{result.stderr[-8000:]}")
        done.write_text(result.stderr)  # warnings


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _with_includes(source: Path, csrc: Path) -> list[Path]:
    """The source, the header that comes first, and every header of the project that they include."""
    found = [source, RUNTIME / "emulator.h"]
    for path in found:
        for name in re.findall(r'^#include ["<]([^">]+)[">]', path.read_text(), re.MULTILINE):
            for folder in (path.parent, RUNTIME, csrc):
                header = (folder / name).resolve()
                if header.is_file() and header not in found:
                    found.append(header)
    return found


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join([_version(), torch.__version__, *parts]).encode()).hexdigest()[:16]


def _compiler() -> list[str]:
    return (_build.find_compiler(os.environ) or "g++").split()


@cache
def _version() -> str:
    return subprocess.run([*_compiler(), "--version"], capture_output=True, text=True).stdout


@cache
def _toolkit_headers() -> Path | None:
    for home in _build.candidate_homes(os.environ, sys.path):
        for header in (home / "include" / "cuda_bf16.h", *home.glob("targets/*/include/cuda_bf16.h")):
            if header.is_file():
                return header.parent
    return None


def _toolkit_flags() -> list[str]:
    return [f"-isystem{_toolkit_headers()}"]


if __name__ == "__main__":
    for name in sys.argv[1:] or ["plain"]:
        print(library(VARIANTS[name]))
