"""What the kernels of csrc/cuda were compiled to: registers, stack, shared memory, occupancy and instructions.

Reads the installed library `resfuse/_cuda.abi3.so` (or --library), for sm_80 and sm_90; needs no GPU, and compiles
nothing but a few lines that print sizes.  Writes a CSV too, a row per kernel and architecture.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import cubin
from benchmarks.options import RESULTS, summary
from resfuse import _build
from resfuse.backends.triton.devices import A100, H100, DeviceProperties

LIBRARY = Path(_build.__file__).with_name("_cuda.abi3.so")
DEVICES = {80: A100, 90: H100}
"""By architecture: that of the A100 and of the H100 and H200."""
DEFINITION = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s+)?(\w+)\(")
CONVOLUTIONS = ("conv_inference_kernel", "conv_training_kernel")
ALL_THERE_IS = ("bn_train_forward_kernel", "bn_backward_kernel")
"""One block per multiprocessor by design, which keeps in shared memory what fits of its input."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A kernel for one architecture."""

    arch: int
    kernel: str
    variant: str
    """Template arguments."""
    threads: int
    """Of a block, at most."""
    registers: int
    stack: int
    """Bytes of local memory per thread: spilled registers, and arrays with computed indices."""
    shared: int
    """Bytes per block, static and dynamic; of kernels that take what there is, the device's limit."""
    blocks: int
    """That a multiprocessor holds at a time."""
    warps: float
    """Part of a multiprocessor's warps that they are, in percent: static occupancy."""
    instructions: int
    mma: int
    """Tensor-core instructions (HMMA), and of those below, how many are in loops."""
    mma_looped: int
    copies_looped: int
    """Asynchronous copies from global to shared memory (LDGSTS)."""
    matrix_loads: int
    """From shared memory (LDSM, PTX's ldmatrix)."""
    fma_looped: int
    """On the ordinary cores (FFMA)."""
    local: int
    """Loads from and stores to local memory (LDL, STL)."""
    wide_loads: int
    """From global memory, 16 bytes per thread, asynchronous copies included."""
    wide_stores: int


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_resources", description=summary(__doc__))
    parser.add_argument("--library", type=Path, default=LIBRARY, help="default %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS / "cuda" / "resources.csv", help="default %(default)s")
    args = parser.parse_args(argv)
    reason = missing(args.library)
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    console = Console(highlight=False)
    with console.status("disassembling"):
        rows = inspect(args.library)
    for arch, group in itertools.groupby(rows, key=lambda row: row.arch):
        console.print(_table(f"sm_{arch}", list(group)))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)
    console.print(f"{len(rows)} kernels, a row each in {args.output}")
    return 0


def missing(library: Path = LIBRARY) -> str | None:
    """Why a library can not be inspected here, or None."""
    if not library.is_file():
        return f"{library} is not there: build it first (CONTRIBUTING.md)"
    if cubin.tool() is None:
        return "cuobjdump is not here: neither Triton's wheel nor a CUDA toolkit has it"
    toolkit = _build.find_toolkit(os.environ, sys.path, torch.version.cuda or "")
    return toolkit if isinstance(toolkit, str) else None


def inspect(library: Path = LIBRARY) -> list[Row]:
    """A row per kernel and architecture of the library, sorted."""
    codes = [code for code in cubin.codes(library) if code.arch in DEVICES]
    bounds = cubin.launch_bounds(library)
    code_of = cubin.instructions(library, sorted({code.arch for code in codes}))
    names = [split_name(name) for name in cubin.demangled(code.name for code in codes)]
    tiles = _tile_bytes({tile for _, variant in names for tile in _TILE.findall(variant)})
    rows = []
    for code, (kernel, variant) in zip(codes, names, strict=True):
        device, threads = DEVICES[code.arch], bounds.get((code.arch, code.name), 0)
        shared = code.shared + _dynamic_shared(kernel, variant, tiles, device)
        warps = -(-threads // 32)
        blocks = cubin.occupancy(device, code.registers, warps, shared) if threads else 0
        found = code_of[code.arch, code.name]
        rows.append(
            Row(
                code.arch, kernel, variant.replace(" ", ""), threads, code.registers, code.stack, shared, blocks,
                warps=100 * blocks * warps / device.warps,
                instructions=sum(found.all.values()),
                mma=found.count("HMMA"),
                mma_looped=found.count("HMMA", looped=True),
                copies_looped=found.count("LDGSTS", looped=True),
                matrix_loads=found.count("LDSM"),
                fma_looped=found.count("FFMA", looped=True),
                local=found.count("LDL", "STL"),
                wide_loads=found.count("LDG", "LDGSTS", suffix=".128"),
                wide_stores=found.count("STG", suffix=".128"),
            )
        )  # fmt: skip
    return sorted(rows, key=lambda row: (row.arch, row.kernel, row.variant))


def defined_kernels(csrc: Path | None = None) -> set[str]:
    """Names of all kernels in the sources."""
    folder = (csrc or _build.csrc_dir()) / "cuda"
    texts = (path.read_text() for path in (*folder.glob("*.cu"), *folder.glob("*.cuh")))
    return {name for text in texts for name in DEFINITION.findall(text)}


def split_name(demangled: str) -> tuple[str, str]:
    """("a_kernel", "<Bf16, 4>") of "void resfuse::cuda::a_kernel<resfuse::cuda::Bf16, 4>(...)"."""
    short = re.sub(r"\(anonymous namespace\)::|resfuse::(?:cuda::)?|^void ", "", demangled)
    short = re.sub(r"\((\w+)\)(\d+)", lambda value: _enumerator(value[1], int(value[2])), short)
    found = re.match(r"(\w+)(<(?:[^<>]|<[^<>]*>)*>)?", short)
    assert found is not None, demangled
    return found[1], found[2] or ""


@functools.cache
def _enumerator(enumeration: str, value: int) -> str:
    """The name of "(Copies)0", from the sources; the text itself where it is none of theirs."""
    definition = re.compile(rf"enum class {enumeration}\b[^{{]*{{([^}}]*)}}")
    for path in (_build.csrc_dir() / "cuda").glob("*.cuh"):
        if found := definition.search(path.read_text()):
            return re.sub(r"//.*", "", found[1]).split(",")[value].strip()
    return f"({enumeration}){value}"


_TILE = re.compile(r"\bTile<[^<>]*>")
_PROGRAM = """
#include <cstdio>
#include "cuda/conv_kernels.cuh"
using namespace resfuse::cuda;
int main() {
%s}
"""


def _dynamic_shared(kernel: str, variant: str, tiles: dict[str, int], device: DeviceProperties) -> int:
    """Bytes that a kernel is launched with, as the launchers have it."""
    if kernel in CONVOLUTIONS:
        return tiles[_TILE.findall(variant)[0]]
    if kernel in ALL_THERE_IS:
        return device.shared_memory - cubin.RESERVED
    return 0  # or a few KiB, which limit nothing


def _tile_bytes(tiles: Iterable[str]) -> dict[str, int]:
    """Shared memory of a convolution's tiles: asked of the sources, by compiling a line of host code for each."""
    tiles = sorted(tiles)
    toolkit = _build.find_toolkit(os.environ, sys.path, torch.version.cuda or "")
    assert isinstance(toolkit, _build.Toolkit), toolkit
    lines = "".join(f'  std::printf("%zu\\n", sizeof(ConvShared<{tile}>));\n' for tile in tiles)
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "sizes")
        program.with_suffix(".cu").write_text(_PROGRAM % lines)
        cubin.compile_program(toolkit, program.with_suffix(".cu"), program, "sm_80")
        answer = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    return dict(zip(tiles, map(int, answer.split()), strict=True))


def _table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.pad_edge, table.padding = False, (0, 1, 0, 0)
    table.add_column("kernel", style="cyan", overflow="fold")
    for heading in ("threads", "regs", "stack", "shared", "blocks", "warps", "SASS", "HMMA", "LDGSTS", "LDL"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            escape(f"{row.kernel.removesuffix('_kernel')} {row.variant[1:-1]}"), str(row.threads), str(row.registers),
            f"[bold red]{row.stack}[/]" if row.stack else "0", str(row.shared), str(row.blocks), f"{row.warps:.0f} %",
            str(row.instructions), str(row.mma_looped or ""), str(row.copies_looped or ""), str(row.local or ""),
        )  # fmt: skip
    return table


if __name__ == "__main__":
    sys.exit(main())
