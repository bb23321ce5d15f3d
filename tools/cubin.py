"""Registers, memory and instructions of compiled CUDA code, read from a cubin or library by the toolkit's cuobjdump."""

from __future__ import annotations

import bisect
import concurrent.futures
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from resfuse import _build
from resfuse.backends.triton.config import DeviceProperties

RESERVED = 1024  # bytes of shared memory that CUDA takes for itself, per block
BLOCKS = 32  # that a multiprocessor of sm_80, sm_90 or sm_100 holds at most

_ARCH = re.compile(r"arch = (sm_(\d+)\w*)")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)(.*?;)")
_BRANCH = re.compile(r"(?:BRA|JMP)\b.*? 0x([0-9a-f]+) ?;")


class Code(NamedTuple):
    """One kernel for one architecture."""

    target: str  # sm_80, sm_90a; empty for a cubin, which has one
    name: str  # mangled
    registers: int  # per thread
    stack: int  # bytes of local memory per thread: spilled registers, and arrays with computed indices
    shared: int  # bytes of static shared memory per block

    @property
    def arch(self) -> int:
        return int(re.sub(r"\D", "", self.target) or 0)


class Instructions(NamedTuple):
    """Occurrences of each instruction in a kernel and in its loops; full names, "LDGSTS.E.BYPASS.128"."""

    all: Counter[str]
    looped: Counter[str]
    loads_after_stores: int
    """How often the code goes back to loading from global memory after it has stored there: each time it waits."""
    loads_at_once: int
    """The longest run, without a branch or a division, of loads that bypass L1: of what other blocks have written."""

    def count(self, *opcodes: str, suffix: str = "", looped: bool = False) -> int:
        """Instructions with one of these opcodes ("LDL") and `suffix` (".128") in their name."""
        counter = self.looped if looped else self.all
        return sum(n for name, n in counter.items() if name.split(".")[0] in opcodes and suffix in name)


def tool(name: str = "cuobjdump") -> Path | None:
    """A tool of the CUDA toolkit: from Triton's wheel, which is as new as torch, from a toolkit, or on PATH."""
    triton = importlib.util.find_spec("triton")
    folders = (
        [Path(wheel, "backends", "nvidia", "bin") for wheel in (triton.submodule_search_locations or [])]
        if triton
        else []
    )
    folders += [home / "bin" for home in _build.candidate_homes(os.environ, sys.path)]
    on_path = shutil.which(name)
    found = [folder / name for folder in folders if (folder / name).is_file()]
    return next(iter(found), Path(on_path) if on_path else None)


def codes(binary: Path) -> list[Code]:
    """All kernels of a cubin or a library, for every architecture that it has machine code for."""
    found, target, name = [], "", ""
    for line in _dump(binary, "-res-usage"):
        if match := _ARCH.match(line):
            target = match[1]
        elif line.startswith(" Function "):
            name = line.removeprefix(" Function ").removesuffix(":")
        elif name and (match := _USAGE.search(line)):
            registers, stack, shared, local = map(int, match.groups())
            code = Code(target, name, registers, stack + local, shared)
            if code.arch >= 90 and shared >= RESERVED:  # counted since sm_90, with every kernel that uses any
                code = code._replace(shared=shared - RESERVED)
            found.append(code)
            name = ""
    return found


def launch_bounds(binary: Path) -> dict[tuple[int, str], int]:
    """(architecture, kernel) -> threads of a block at most, for kernels with `__launch_bounds__`."""
    found, arch, kernel, attribute = {}, 0, "", ""
    for line in _dump(binary, "-elf"):
        if match := _ARCH.match(line):
            arch = int(match[2])
        elif line.startswith(".nv.info"):
            kernel = line.removeprefix(".nv.info").removeprefix(".")
        elif "Attribute:" in line:
            attribute = line.split()[-1]
        elif "Value:" in line and attribute == "EIATTR_MAX_THREADS":
            x, y, z = (int(value, 16) for value in line.split()[-3:])
            found[arch, kernel] = x * y * z
    return found


def instructions(binary: Path, targets: Iterable[str]) -> dict[tuple[str, str], Instructions]:
    """(target, kernel) -> its instructions."""
    with concurrent.futures.ThreadPoolExecutor(_build.usable_cores()) as pool:
        parts = pool.map(lambda target: list(_disassembled(binary, target)), targets)
    return dict(item for part in parts for item in part)


def occupancy(device: DeviceProperties, registers: int, warps: int, shared: int) -> int:
    """Blocks that a multiprocessor holds at a time, by the needs of a block."""
    return min(
        BLOCKS,
        device.registers // (-(-registers // 8) * 8 * 32 * warps),
        device.warps // warps,
        (device.shared_memory + RESERVED) // (shared + RESERVED),
    )


def demangled(names: Iterable[str]) -> list[str]:
    """C++ names for people; unchanged where neither binutils' nor LLVM's demangler is installed."""
    names = list(names)
    filt = shutil.which("c++filt") or shutil.which("llvm-cxxfilt")
    if filt is None:
        return names
    return subprocess.run(
        [filt], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()


def _dump(binary: Path, *options: str) -> Iterator[str]:
    """Lines of cuobjdump's output, which can be hundreds of megabytes."""
    cuobjdump = tool()
    if cuobjdump is None:
        raise FileNotFoundError("cuobjdump: no CUDA toolkit or Triton wheel has it")
    command = [str(cuobjdump), *options, str(binary)]
    line = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield line.rstrip("\n")
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {line}")


def _disassembled(binary: Path, target: str) -> Iterator[tuple[tuple[str, str], Instructions]]:
    name, code = "", list[tuple[int, str, str]]()
    for line in itertools.chain(_dump(binary, "-sass", "-arch", target), ["\tFunction : "]):
        if match := re.match(r"\s+Function : (\S*)", line):
            if code:
                yield (target, name), _counted(code)
            name, code = match[1], []
        elif match := _INSTRUCTION.match(line):
            code.append((int(match[1], 16), match[2], match[3]))


def _counted(code: list[tuple[int, str, str]]) -> Instructions:
    """The instructions of a kernel; a loop is the code that a branch backwards jumps over."""
    addresses, inside = [address for address, _, _ in code], set[int]()
    for address, name, operands in code:
        target = _BRANCH.match(name + operands)
        # Less, not equal: a kernel ends with a jump to itself, which is no loop of its source.
        if target and int(target[1], 16) < address:
            first = bisect.bisect_left(addresses, int(target[1], 16))
            inside.update(range(first, bisect.bisect_right(addresses, address)))
    opcodes = [name.partition(".")[0] for _, name, _ in code]
    accesses = [opcode == "STG" for opcode in opcodes if opcode in ("STG", "LDG", "LDGSTS")]
    waits = sum(stored and not stores for stored, stores in itertools.pairwise(accesses))
    parts = (".STRONG" in name for _, name, _ in code if re.match(r"BRA|CALL|MUFU|LDG\..*STRONG", name))
    runs = [sum(run) for _, run in itertools.groupby(parts)]
    return Instructions(
        Counter(name for _, name, _ in code), Counter(code[i][1] for i in inside), waits, max(runs, default=0)
    )
