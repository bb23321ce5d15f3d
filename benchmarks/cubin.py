"""What compiled CUDA code needs and is made of, as the toolkit's cuobjdump tells it; for GPUs that need not be here.

Read from the finished binary, a cubin or a shared library, so that nothing has to be compiled again to look at it.
"""

from __future__ import annotations

import bisect
import collections
import concurrent.futures
import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from resfuse import _build
from resfuse.backends.triton.devices import DeviceProperties

RESERVED = 1024
"""Bytes of shared memory that CUDA takes for itself, per block."""
BLOCKS = 32
"""Blocks that a multiprocessor of sm_80, sm_90 or sm_100 holds at most."""

_BRANCH = re.compile(r"(?:BRA|JMP)\b.*? 0x([0-9a-f]+) ?;")


@dataclasses.dataclass(frozen=True)
class Code:
    """One kernel for one architecture."""

    arch: int
    """80 for sm_80, 90 for sm_90a."""
    name: str
    """As the linker knows it (mangled)."""
    registers: int
    """Per thread."""
    stack: int
    """Bytes of local memory per thread: what did not fit into registers, and arrays with computed indices."""
    shared: int
    """Bytes of static shared memory per block."""


@dataclasses.dataclass
class Instructions:
    """How often each instruction is in a kernel, and in its loops; the full names, "LDGSTS.E.BYPASS.128"."""

    all: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    looped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def count(self, *opcodes: str, suffix: str = "", looped: bool = False) -> int:
        """Instructions with one of these opcodes ("LDL"), of those whose name has `suffix` (".128") in it."""
        counter = self.looped if looped else self.all
        return sum(n for name, n in counter.items() if name.split(".")[0] in opcodes and suffix in name)


def tool(name: str = "cuobjdump") -> Path | None:
    """A tool of the CUDA toolkit: the one in Triton's wheel, which is as new as torch, of a toolkit, or on PATH."""
    triton = importlib.util.find_spec("triton")
    wheels = list(triton.submodule_search_locations or []) if triton else []
    folders = [Path(wheel, "backends", "nvidia", "bin") for wheel in wheels]
    folders += [home / "bin" for home in _build.candidate_homes(os.environ, sys.path)]
    on_path = shutil.which(name)
    found = [folder / name for folder in folders if (folder / name).is_file()] + ([Path(on_path)] if on_path else [])
    return next(iter(found), None)


def compile_program(toolkit: _build.Toolkit, source: Path, program: Path, arch: str) -> None:
    """An executable of one .cu file that may include those of csrc; nvcc does not find a pip toolkit's libraries."""
    command = [str(toolkit.home / "bin" / "nvcc"), "-std=c++17", f"-arch={arch}", f"-I{_build.csrc_dir()}"]
    libraries = [f"-L{toolkit.home / name}" for name in ("lib64", "lib")]
    subprocess.run([*command, str(source), "-o", str(program), *libraries], check=True)


def codes(binary: Path) -> list[Code]:
    """All kernels of a cubin or a library, for every architecture that it has machine code for."""
    found = []
    for arch, line, following in _by_architecture(_dump(binary, "-res-usage")):
        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", following)
        if line.startswith(" Function ") and usage is not None:
            registers, stack, shared, local = map(int, usage.groups())
            if arch >= 90 and shared >= RESERVED:  # since sm_90 counted with every kernel that uses any
                shared -= RESERVED
            name = line.removeprefix(" Function ").removesuffix(":")
            found.append(Code(arch, name, registers, stack + local, shared))
    return found


def launch_bounds(binary: Path) -> dict[tuple[int, str], int]:
    """(architecture, kernel) -> threads of a block at most, for kernels with `__launch_bounds__`."""
    found, kernel, attribute = {}, "", ""
    for arch, line, _ in _by_architecture(_dump(binary, "-elf")):
        if line.startswith(".nv.info"):
            kernel = line.removeprefix(".nv.info").removeprefix(".")
        elif "Attribute:" in line:
            attribute = line.split()[-1]
        elif "Value:" in line and attribute == "EIATTR_MAX_THREADS":
            x, y, z = (int(value, 16) for value in line.split()[-3:])
            found[arch, kernel] = x * y * z
    return found


def instructions(binary: Path, archs: Iterable[int]) -> dict[tuple[int, str], Instructions]:
    """(architecture, kernel) -> what it is made of."""
    with concurrent.futures.ThreadPoolExecutor(_build.usable_cores()) as pool:
        parts = pool.map(functools.partial(_instructions, binary), archs)
    return {key: value for part in parts for key, value in part.items()}


def occupancy(device: DeviceProperties, registers: int, warps: int, shared: int) -> int:
    """Blocks that a multiprocessor holds at a time, by what a block needs."""
    return min(
        BLOCKS,
        device.registers // (-(-registers // 8) * 8 * 32 * warps),
        device.warps // warps,
        (device.shared_memory + RESERVED) // (shared + RESERVED),
    )


def demangler() -> str | None:
    """c++filt, of binutils or LLVM, or None."""
    return shutil.which("c++filt") or shutil.which("llvm-cxxfilt")


def demangled(names: Iterable[str]) -> list[str]:
    """C++ names for people; as they are where there is no `demangler`."""
    names = list(names)
    filt = demangler()
    if filt is None:
        return names
    done = subprocess.run([filt], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def _dump(binary: Path, *options: str) -> Iterator[str]:
    """Lines of cuobjdump's output, which can be hundreds of megabytes."""
    cuobjdump = tool()
    if cuobjdump is None:
        raise FileNotFoundError("cuobjdump: no CUDA toolkit or Triton wheel has it")
    command = [str(cuobjdump), *options, str(binary)]
    last = collections.deque[str](maxlen=5)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last.append(line)
            yield line.rstrip("\n")
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {''.join(last)}")


def _by_architecture(lines: Iterable[str]) -> Iterator[tuple[int, str, str]]:
    """(architecture, line, the line after it)."""
    arch, previous = 0, ""
    for line in lines:
        found = re.match(r"arch = sm_(\d+)", line)
        arch = int(found[1]) if found else arch
        if previous:
            yield arch, previous, line
        previous = line


def _instructions(binary: Path, arch: int) -> dict[tuple[int, str], Instructions]:
    kernels: dict[tuple[int, str], Instructions] = {}
    name, code = "", list[tuple[int, str, str]]()
    for line in _dump(binary, "-sass", "-arch", _targets(binary)[arch]):
        started = re.match(r"\s+Function : (\S+)", line)
        if started:
            kernels |= {(arch, name): _counted(code)} if code else {}
            name, code = started[1], []
        instruction = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)(.*?;)", line)
        if instruction:
            code.append((int(instruction[1], 16), instruction[2], instruction[3]))
    return kernels | ({(arch, name): _counted(code)} if code else {})


def _counted(code: list[tuple[int, str, str]]) -> Instructions:
    """The instructions of a kernel; a loop is what a branch backwards jumps over."""
    loops = []
    for address, name, operands in code:
        target = _BRANCH.match(name + operands)
        # Less, not equal: a kernel ends with a jump to itself, which is no loop of its source.
        if target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    addresses = [address for address, _, _ in code]
    inside = set[int]()
    for first, last in loops:
        inside.update(range(bisect.bisect_left(addresses, first), bisect.bisect_right(addresses, last)))
    result = Instructions()
    result.all.update(name for _, name, _ in code)
    result.looped.update(code[i][1] for i in inside)
    return result


@functools.cache
def _targets(binary: Path) -> dict[int, str]:
    """Architectures that a binary has machine code for: {80: "sm_80", 90: "sm_90a"}."""
    lines = _dump(binary, "-res-usage")
    return {int(found[2]): found[1] for line in lines if (found := re.match(r"arch = (sm_(\d+)\w*)", line))}
