"""What kernels were compiled to: registers and spills, of the library and of the Triton kernels that are chosen."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from pathlib import Path

import torch

from benchmarks import cubin
from benchmarks.static.table import TABLE, Row
from resfuse import _build, _extension

LIBRARY = Path(_build.__file__).with_name("_cuda.abi3.so")
TRITON_TABLE = TABLE.parent / "triton" / "resources.csv"
BATCH = 32


def rich_reason() -> str | None:
    """The scripts whose functions are used here print tables."""
    return None if importlib.util.find_spec("rich") else "rich is not installed"


def library_reason() -> str | None:
    """Why the built CUDA library can not tell, or None."""
    if rich_reason():
        return rich_reason()
    info = _extension.build_info()
    if info.get("debug"):
        return "the library was built with DEBUG=1"
    if info.get("arch_list", _build.DEFAULT_ARCH_LIST) != _build.DEFAULT_ARCH_LIST:
        return f"the library was built for {info['arch_list']}"
    if not LIBRARY.is_file():
        return f"{LIBRARY.name} is not built"
    if not cubin.tool():
        return "cuobjdump is not here: neither Triton's wheel nor a CUDA toolkit has it"
    return None if cubin.demangler() else "c++filt is not here, nor LLVM's"


def of_the_library(group: str, toolchain: str, arch: int) -> list[Row]:
    """Registers of every kernel for one architecture, and the bytes of local memory of all."""
    from benchmarks import cuda_resources

    codes = [code for code in cubin.codes(LIBRARY) if code.arch == arch]
    names = ["".join(cuda_resources.split_name(name)) for name in cubin.demangled(code.name for code in codes)]
    named = sorted(zip((name.replace(" ", "") for name in names), codes, strict=True), key=lambda pair: pair[0])
    spilling = [f"{name} {code.stack}" for name, code in named if code.stack]
    stack = sum(code.stack for _, code in named)
    return [
        _row(group, toolchain, "local memory of all kernels", stack, ", ".join(spilling)),
        *(_row(group, toolchain, name, code.registers, "") for name, code in named),
    ]


def of_triton(group: str, toolchain: str, capability: int) -> list[Row]:
    """Registers and spills of the kernels that the heuristics choose for ResNet-50's convolutions in bfloat16.

    Nothing is compiled: they are looked up in what `benchmarks.triton_resources` wrote when it compiled them.

    Raises:
        LookupError: a kernel is chosen that was not compiled.
    """
    from benchmarks import triton_resources

    compiled = defaultdict(list)
    for line in triton_resources.read(TRITON_TABLE):
        compiled[_identity(line)].append((int(line["registers"]), int(line["spill"])))
    found = []
    for identity in _chosen(capability):
        if identity not in compiled:
            raise LookupError(
                f"{TRITON_TABLE} has no {' '.join(identity)}: it should have all that tests/test_triton_compile.py "
                "compiles; write it again with benchmarks.triton_resources"
            )
        registers, spill = (max(values) for values in zip(*compiled[identity], strict=True))
        found.append(_row(group, toolchain, " ".join(identity[1:]), registers, f"spills {spill} bytes"))
    return found


def _chosen(capability: int) -> list[tuple[str, ...]]:
    from benchmarks import triton_resources
    from benchmarks.triton_compile import DEVICES, Job, Usage
    from benchmarks.triton_specs import every_spec
    from resfuse.cli.tune_layers import layer_problems

    nothing = Usage(0, 0, 0, 0, 0, "", 0, 0, 0)
    problems = layer_problems("resnet50", [BATCH], torch.bfloat16)
    found = set()
    for _, spec in every_spec(problems, DEVICES[capability], tables=False):
        if "BLOCK_K" in spec.constants:  # a convolution
            row = triton_resources.row_of(Job.of(capability, spec), "", 0, nothing)
            found.add(
                _identity({name: str(value) for name, value in vars(row).items()} | {"warps": str(spec.num_warps)})
            )
    return sorted(found)


def _identity(values: dict[str, str]) -> tuple[str, ...]:
    """What a configuration is known by, into how many parts it splits left out; layers of one differ in constants."""
    flags = [flag for flag in values["flags"].split() if not flag.isdigit()]
    options = f"{values['warps']} warps", f"{values['num_stages']} stages"
    return values["capability"], values["kernel"], values["dtype"], values["tile"], *flags, *options


def _row(group: str, toolchain: str, name: str, value: int, detail: str) -> Row:
    return Row(group, "kernel", name, "", "", "resfuse", value, detail, toolchain)
