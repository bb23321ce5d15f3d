"""The groups of rows: what each counts, where it can be counted, and what its values depend on."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

import resfuse
from benchmarks.static import compiled, launches, predicted, saved
from benchmarks.static.table import Row
from resfuse import _extension


class Group(NamedTuple):
    """Rows that are counted together."""

    name: str
    count: Callable[[str, str], list[Row]]
    """(name, toolchain) -> the rows."""
    unavailable_reason: Callable[[], str | None]
    """Why this machine can not count them, or None."""
    toolchain: Callable[[], str]

    def rows(self) -> list[Row]:
        """What is true here and now; takes seconds."""
        return self.count(self.name, self.toolchain())


def torch_release() -> str:
    """torch 2.11: other releases call other operators."""
    return "torch " + ".".join(torch.__version__.split(".")[:2])


def nvcc_release() -> str:
    """nvcc 13.0, of the build that is installed."""
    return "nvcc " + str(_extension.build_info().get("toolkit") or "unknown").removeprefix("CUDA ").split()[0]


def _torchvision_reason() -> str | None:
    return None if importlib.util.find_spec("torchvision") else "torchvision is not installed"


def _cpu_reason() -> str | None:
    if "cpu" not in resfuse.available_backends():
        return "the CPU library is not built"
    if not torch.backends.mkldnn.is_available():
        return "torch has no oneDNN, whose primitives are counted"
    return _torchvision_reason()


def _emulator_reason() -> str | None:
    from tests.emulator import build

    return build.unavailable_reason() or _torchvision_reason()


def _triton_reason() -> str | None:
    from resfuse.backends import triton

    return triton.unavailable_reason() or _torchvision_reason()


def _interpreter_reason() -> str | None:
    """The operators around the kernels are those of the CPU, and autocast's."""
    from resfuse.backends import triton

    if not triton.INTERPRETED:
        return "kernels are listed on the CPU, where TRITON_INTERPRET=1 lets it have them"
    return _triton_reason()


def _launches_of_triton(capability: int) -> Callable[[str, str], list[Row]]:
    def count(group: str, toolchain: str) -> list[Row]:
        from resfuse.backends.triton.devices import A100, H100

        return launches.of_triton(group, toolchain, {80: A100, 90: H100}[capability])

    return count


def _registers(capability: int) -> tuple[Group, ...]:
    library = functools.partial(compiled.of_the_library, arch=capability)
    triton = functools.partial(compiled.of_triton, capability=capability)
    return (
        Group(f"registers cuda sm_{capability}", library, compiled.library_reason, nvcc_release),
        Group(
            f"registers triton sm_{capability}", triton, lambda: _triton_reason() or compiled.rich_reason(), _nothing
        ),
    )


def _nothing() -> str:
    return ""


GROUPS = {
    group.name: group
    for group in (
        Group("launches cpu", launches.on_the_cpu, _cpu_reason, torch_release),
        Group("launches cuda", launches.in_the_emulator, _emulator_reason, torch_release),
        Group("launches triton sm_80", _launches_of_triton(80), _interpreter_reason, torch_release),
        Group("launches triton sm_90", _launches_of_triton(90), _interpreter_reason, torch_release),
        Group("saved bytes", saved.rows, _cpu_reason, torch_release),
        Group("predicted for H200", predicted.rows, _torchvision_reason, torch_release),
        *_registers(80),
        *_registers(90),
    )
}


def reason_against(group: Group, table: Sequence[Row], *, comparing: bool = True) -> str | None:
    """Why a group can not be counted here or, if it is to be compared, not with these rows of the table."""
    reason = group.unavailable_reason()
    others = {row.toolchain for row in table} - {group.toolchain()} if reason is None else set()
    if comparing and others:
        return f"the table has {', '.join(sorted(others))}, here is {group.toolchain() or 'none'}"
    return reason
