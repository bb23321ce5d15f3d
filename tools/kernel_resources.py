"""Registers, spills, shared memory, occupancy and instructions of the compiled kernels, as a table and a CSV.

`triton` compiles the kernels that the heuristics choose for residual networks at all batch sizes, for every GPU
generation.  `cuda`, `sm90` and `sm100` read the installed libraries, `resfuse/_cuda.abi3.so` and so on.  None needs a
GPU.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resfuse import _build
from resfuse.backends.triton import INTERPRETED
from resfuse.backends.triton.config import A100, H100, ConvConfig, ConvProblem, DeviceProperties
from resfuse.cli import tune
from resfuse.types import BatchNorm, Convolution
from tools import cubin

RESULTS = Path("benchmarks/results")
LIBRARY = Path(_build.__file__).with_name("_cuda.abi3.so")
CUTLASS_LIBRARIES = {name[1:]: LIBRARY.with_name(f"{name}.abi3.so") for name in _build.CUTLASS_LIBRARIES}
NETWORKS = ("resnet18", "resnet50", "cifar_resnet")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "tf32": torch.float32}
BATCHES = tuple(2**exponent for exponent in range(10))
B200 = DeviceProperties("NVIDIA B200", (10, 0), 148, 232448)
DEVICES = {80: A100, 90: H100, 100: B200}
"""By compute capability, as Triton writes it."""
MMA = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
"""The tensor-core instruction that suits each; a kernel with any other wastes the GPU."""

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.kernel_resources", description=(__doc__ or "").split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    triton = commands.add_parser("triton", help="compile the Triton kernels")
    add = triton.add_argument
    add("--network", nargs="+", choices=NETWORKS, default=NETWORKS)
    add("--arch", type=int, nargs="+", choices=tuple(DEVICES), default=list(DEVICES))
    add("--dtype", nargs="+", choices=tuple(DTYPES), default=["bfloat16"])
    add("--batch", type=int, nargs="+", default=list(BATCHES), metavar="N", help="default 1 2 4 ... 512")
    add("--convolutions", action="store_true", help="no other kernels")
    add("--quick", action="store_true", help="one layer of every configuration")
    add("--jobs", type=int, default=_build.usable_cores(), metavar="N", help="processes (default %(default)s)")
    cuda = commands.add_parser("cuda", help="read the CUDA library")
    cuda.add_argument("--library", type=Path, default=LIBRARY, help="default %(default)s")
    readers = [commands.add_parser(name, help="read that library of CUTLASS's kernels") for name in CUTLASS_LIBRARIES]
    for command, library in zip(readers, CUTLASS_LIBRARIES.values(), strict=True):
        command.add_argument("--library", type=Path, default=library, help="default %(default)s")
    for command in (triton, cuda, *readers):
        command.add_argument("--output", type=Path, help="CSV (default benchmarks/results/BACKEND/resources.csv)")
    args = parser.parse_args(argv)
    reason = missing(args.library) if args.command != "triton" else None
    if args.command == "triton" and INTERPRETED:
        reason = "TRITON_INTERPRET is set: this process cannot compile kernels"
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    if args.command == "triton":
        rows = triton_rows(args)
    else:
        rows = cuda_rows(args.library) if args.command == "cuda" else cutlass_rows(args.library)
    errors = [row for row in rows if "error" in row]
    rows = [row for row in rows if "error" not in row]
    for row in errors:
        print(f"sm_{row['arch']} {row['kernel']}, {row['layer']}: {row['error']}", file=sys.stderr)
    path = args.output or RESULTS / args.command / "resources.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, rows)
    print(f"{len(rows)} kernels, a row each in {path}; {len(errors)} could not be compiled")
    return 1 if errors else 0


def write(path: Path, rows: Sequence[Row]) -> None:
    """The CSV, and in print the most that any layer needs, a line per architecture, kernel and variant."""
    import pandas as pd

    frame = pd.DataFrame(rows)
    frame.to_csv(path, index=False, lineterminator="\n")
    if rows:
        needs = {"registers": "max", "spill": "max", "shared": "max", "blocks": "min"}
        needs = {column: most for column, most in needs.items() if column in frame}
        print(frame.groupby(["arch", "kernel", "variant"]).agg(needs).to_string())


# --- Triton ----------------------------------------------------------------------------------------------------------


def convolution_specs(problem: ConvProblem, device: DeviceProperties) -> list[Any]:
    """The kernels of a convolution in the form that takes the most registers, with a residual and a ReLU."""
    from resfuse.backends.triton import conv_bn_act, launch

    p = problem
    x, w, residual = (
        torch.empty(shape, dtype=p.dtype, device="meta", memory_format=torch.channels_last)
        for shape in ((p.n, p.c, p.h, p.w), (p.k, p.group_in, p.r, p.s), (p.n, p.k, p.oh, p.ow))
    )
    v = torch.empty(p.k, device="meta")
    bn = BatchNorm(v, v, v, v, p.kind == "train", 0.1, 1e-5)
    convolution = Convolution(p.stride, p.padding, p.dilation, p.groups)
    switch: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, switch.fp32_precision = switch.fp32_precision, p.precision
    try:
        with launch.collected(device) as specs:
            conv_bn_act.conv_bn_act_forward(x, w, None, convolution, bn, residual, True)
    finally:
        switch.fp32_precision = before
    return specs


def pointwise_specs(x: Tensor, device: DeviceProperties) -> list[Any]:
    """The kernels of add_relu, bn_act and synchronised batch norm on a tensor, with all optional operands or none."""
    from resfuse.backends.triton import add_relu, bn_act, launch

    v = torch.empty(x.shape[1], device="meta")
    with launch.collected(device) as specs:
        add_relu.add_relu_forward(x, x)
        add_relu.add_relu_backward(x, x)
        bn_act.bn_statistics(x)
        for (y, vector), training in itertools.product(((x, v), (None, None)), (True, False)):
            bn_act.bn_act_forward(x, BatchNorm(v, v, vector, vector, training, 0.1, 1e-5), y, y is not None)
            bn_act.bn_act_backward(x, x, y, vector, vector, v, v, y is not None, training, True, y is not None)
            bn_act.bn_backward_apply(x, x, vector, v, v, v, v, 7 if training else None)
        bn_act.bn_act_backward(x, x, None, v, v, v, v, True, True, True, False)  # the mask from the input
        bn_act.bn_apply(x, v, v, v, v, x, True)
        bn_act.bn_backward_reduce(x, x, x, v, v, v, v, True)
    return specs


def compile_for(spec: Any, capability: int) -> Any:
    """Triton's CompiledKernel for compute capability 80, 90, ...; needs no GPU, and TRITON_INTERPRET unset."""
    import triton
    from triton.backends.compiler import GPUTarget

    return triton.compile(source(spec), target=GPUTarget("cuda", capability, 32), options=spec.options)


def source(spec: Any) -> Any:
    """The kernel and its specialisation, as Triton's compiler takes them."""
    from triton.compiler import ASTSource

    index = {name: (i,) for i, name in enumerate(spec.signature)}
    constants = {index[name]: value for name, value in spec.constants.items()}
    return ASTSource(
        spec.kernel, spec.signature, constants, {index[name]: [["tt.divisibility", 16]] for name in spec.aligned}
    )


def triton_rows(args: argparse.Namespace) -> list[Row]:
    """A row per kernel, or one with its "error" where it cannot be compiled."""
    global _listed
    found = {}
    for arch, dtype in itertools.product(args.arch, args.dtype):
        for layer, spec, bound in _listed_specs(args, arch, dtype):
            row = _described(arch, layer, spec, bound)
            absent = [name for name, value in spec.constants.items() if value is None]
            identity = str(({**row, "layer": "", "shared_bound": 0}, absent) if args.quick else spec._replace(grid=()))
            found.setdefault((arch, identity), (row, spec))
    _listed = list(found.values())
    with multiprocessing.get_context("fork").Pool(args.jobs) as pool:  # kernels cannot be pickled
        return list(pool.imap(_measured, range(len(_listed))))


_listed: list[tuple[Row, Any]] = []


def _listed_specs(args: argparse.Namespace, arch: int, dtype: str) -> Iterator[tuple[str, Any, int]]:
    """(layer, kernel, bound of its shared memory) of everything asked for."""
    from resfuse.backends.triton import plan

    device, precision = DEVICES[arch], "tf32" if dtype == "tf32" else "ieee"
    layers = (p for network in args.network for p in tune.layer_problems(network, args.batch, DTYPES[dtype]))
    for p in dict.fromkeys(layer._replace(precision=precision, residual=False) for layer in layers):
        tiled = plan.tile_problem(p)
        for spec in convolution_specs(p, device):
            tile = spec.constants.get("CONV", (0,) * 16)[13:16]  # padding a stem has none
            bound = ConvConfig(*tile, spec.options["num_warps"], spec.options["num_stages"]).shared_memory(tiled)
            yield tune.describe(p), spec, bound
        if p.kind == "forward" and dtype != "tf32" and not args.convolutions:
            for memory_format in (torch.channels_last, torch.contiguous_format):
                x = torch.empty((p.n, p.k, p.oh, p.ow), dtype=p.dtype, device="meta", memory_format=memory_format)
                for spec in pointwise_specs(x, device):
                    yield f"{p.n}x{p.oh}x{p.ow}x{p.k} {str(memory_format)[6:]}", spec, 0


def _described(arch: int, layer: str, spec: Any, bound: int) -> Row:
    constants = dict(spec.constants)
    tile = constants.get("CONV") or constants.get("TILE")
    blocks = ("block_m", "block_n", "block_k") if "CONV" in constants else ("block_m", "block_n") if tile else ()
    variant = "x".join(str(getattr(tile, block)) for block in blocks)
    flags = [f"{name} {constants[name]}" for name in ("IN_REGISTERS", "PHASE") if constants.get(name)]
    if "CONV" in constants:
        flags += [f"{name} {getattr(tile, name)}" for name in ("split_k", "pack_groups") if getattr(tile, name) > 1]
        flags += [name for name in ("persistent", "pack_row") if getattr(tile, name)]
    dtype = "tf32" if "CONV" in constants and tile.precision == "tf32" else next(iter(spec.signature.values()))[1:]
    return {
        "arch": arch, "kernel": spec.name, "variant": variant, "dtype": dtype, "layer": layer,
        "flags": " ".join(flags), "stages": spec.options["num_stages"],
        "cooperative": spec.options["launch_cooperative_grid"], "shared_bound": bound,
    }  # fmt: skip


def _measured(index: int) -> Row:
    """Compile one kernel and look at the result."""
    row, spec = _listed[index]
    try:
        compiled = compile_for(spec, row["arch"])
    except Exception as error:
        return {**row, "error": f"{type(error).__name__}: {error}"}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (code,) = cubin.codes(Path(file.name))
    ptx, shared, warps = compiled.asm["ptx"], compiled.metadata.shared, compiled.metadata.num_warps
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, 0x(\w+)", ptx)
    bulk_stores = ptx.count("cp.async.bulk.tensor") and ptx.count("global.shared::cta")
    return {
        **row, "registers": code.registers, "spill": code.stack, "shared": shared,
        "blocks": cubin.occupancy(DEVICES[row["arch"]], code.registers, warps, shared), "warps": warps,
        "instructions": len(re.findall(r";$", ptx, re.MULTILINE)),
        "mma": next((name for name in MMA.values() if name in ptx), ""),
        "vector_loads": _wide(ptx, "ld") + copies.count("10") + ptx.count("shared::cluster.global"),
        "narrow_loads": len(re.findall(r"ld\.global\.(?![\w.]*acquire)", ptx)) - _wide(ptx, "ld"),
        "narrow_copies": len(copies) - copies.count("10"),
        "vector_stores": _wide(ptx, "st") + bulk_stores,
    }  # fmt: skip


def _wide(ptx: str, instruction: str) -> int:
    """Accesses to global memory of 16 bytes per thread."""
    return len(re.findall(instruction + r"\.global[\w.:]*\.(?:v4\.[a-z]32|v2\.[a-z]64|v8\.[a-z]16)\b", ptx))


# --- CUDA ------------------------------------------------------------------------------------------------------------

CONVOLUTIONS = ("conv_inference_kernel", "conv_training_kernel")
TAKE_ALL_SHARED_MEMORY = ("bn_train_forward_kernel", "bn_backward_kernel")
"""One block per multiprocessor by design, which keeps in shared memory what fits of its input."""

_DEFINITION = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s+)?(\w+)\(")
_TILE = re.compile(r"\bTile<[^<>]*>")
_SIZES = """
#include <cstdio>
#include "cuda/conv_kernels.cuh"
using namespace resfuse::cuda;
int main() {
%s}
"""


def missing(library: Path = LIBRARY) -> str | None:
    """Why a library cannot be inspected here, or None."""
    if not library.is_file():
        return f"{library} does not exist: build it first (CONTRIBUTING.md)"
    if cubin.tool() is None:
        return "no cuobjdump: neither Triton's wheel nor a CUDA toolkit has it"
    toolkit = _build.find_toolkit(os.environ, sys.path, torch.version.cuda or "")
    return toolkit if isinstance(toolkit, str) else None


def cuda_rows(library: Path = LIBRARY) -> list[Row]:
    """A row per kernel and architecture of the library, sorted."""
    codes = [code for code in cubin.codes(library) if code.arch in DEVICES]
    bounds = cubin.launch_bounds(library)
    instructions = cubin.instructions(library, sorted({code.target for code in codes}))
    names = [split_name(name) for name in cubin.demangled(code.name for code in codes)]
    tiles = _tile_bytes(sorted({tile for _, variant in names for tile in _TILE.findall(variant)}))
    rows = []
    for code, (kernel, variant) in zip(codes, names, strict=True):
        device, threads = DEVICES[code.arch], bounds.get((code.arch, code.name), 0)
        shared, found = code.shared, instructions[code.target, code.name]
        if kernel in CONVOLUTIONS:
            shared += tiles[_TILE.findall(variant)[0]]
        elif kernel in TAKE_ALL_SHARED_MEMORY:
            shared += device.shared_memory - cubin.RESERVED
        warps = -(-threads // 32)
        blocks = cubin.occupancy(device, code.registers, warps, shared) if threads else 0
        rows.append({
            "arch": code.arch, "kernel": kernel, "variant": variant.replace(" ", ""), "threads": threads,
            "registers": code.registers, "spill": code.stack, "shared": shared, "blocks": blocks,
            "occupancy": 100 * blocks * warps / device.warps,
            "instructions": sum(found.all.values()),
            "mma": found.count("HMMA"),
            "mma_looped": found.count("HMMA", looped=True),
            "copies_looped": found.count("LDGSTS", looped=True),
            "matrix_loads": found.count("LDSM"),
            "fma_looped": found.count("FFMA", looped=True),
            "local": found.count("LDL", "STL"),
            "loads_after_stores": found.loads_after_stores,
            "loads_at_once": found.loads_at_once,
            "wide_loads": found.count("LDG", "LDGSTS", suffix=".128"),
            "wide_stores": found.count("STG", suffix=".128"),
        })  # fmt: skip
    return sorted(rows, key=lambda row: (row["arch"], row["kernel"], row["variant"]))


def cutlass_rows(library: Path) -> list[Row]:
    """A row per kernel of the library for Hopper or for Blackwell, sorted."""
    codes = cubin.codes(library)
    bounds = cubin.launch_bounds(library)
    instructions = cubin.instructions(library, sorted({code.target for code in codes}))
    rows = []
    for code, name in zip(codes, cubin.demangled(code.name for code in codes), strict=True):
        (kernel, variant), found = split_name(name), instructions[code.target, code.name]
        mma, opcode = ("wgmma_looped", "HGMMA") if code.arch == 90 else ("tcgen05_looped", "UTCHMMA")
        rows.append({
            "arch": code.arch, "kernel": kernel, "variant": re.sub(r"cutlass::| ", "", variant[1:-1]),
            "threads": bounds.get((code.arch, code.name), 0), "registers": code.registers, "spill": code.stack,
            "instructions": sum(found.all.values()),
            mma: found.count(opcode, looped=True),
            "tma_im2col": found.count("UTMALDG", suffix=".IM2COL", looped=True),
            "tma_loads": found.count("UTMALDG", looped=True),
            "tma_stores": found.count("UTMASTG", looped=True),
            "local": found.count("LDL", "STL"),
        })  # fmt: skip
    return sorted(rows, key=lambda row: row["variant"])


def defined_kernels() -> set[str]:
    """Names of all kernels in the sources of the CUDA library."""
    folder = _build.csrc_dir() / "cuda"
    return {name for path in folder.glob("*.cu*") for name in _DEFINITION.findall(path.read_text())}


def split_name(demangled: str) -> tuple[str, str]:
    """("a_kernel", "<Bf16, 4>") of "void resfuse::cuda::a_kernel<resfuse::cuda::Bf16, 4>(...)"."""
    short = re.sub(r"\(anonymous namespace\)::|resfuse::(?:cuda::|sm\d+::)?|^void ", "", demangled)
    found = re.match(r"(\w+)(<(?:[^<>]|<[^<>]*>)*>)?", re.sub(r"\(\w+\)(?=\d)", "", short))  # (Copies)0: a number
    assert found is not None, demangled
    return found[1], found[2] or ""


def _tile_bytes(tiles: Sequence[str]) -> dict[str, int]:
    """Shared memory of a convolution's tiles: the sources know, through a line of compiled host code for each."""
    toolkit = _build.find_toolkit(os.environ, sys.path, torch.version.cuda or "")
    assert isinstance(toolkit, _build.Toolkit), toolkit
    lines = "".join(f'  std::printf("%zu\\n", sizeof(ConvShared<{tile}>));\n' for tile in tiles)
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "sizes")
        program.with_suffix(".cu").write_text(_SIZES % lines)
        command = [toolkit.home / "bin" / "nvcc", "-std=c++17", "-arch=sm_80", f"-I{_build.csrc_dir()}"]
        libraries = [f"-L{toolkit.home / name}" for name in ("lib64", "lib")]  # nvcc of a pip toolkit needs them
        subprocess.run([*command, program.with_suffix(".cu"), "-o", program, *libraries], check=True)
        answer = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    return dict(zip(tiles, map(int, answer.split()), strict=True))


if __name__ == "__main__":
    sys.exit(main())
