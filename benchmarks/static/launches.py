"""Kernel launches of operators, blocks and models: forward, and backward with all gradients.

An operator of PyTorch counts once, whatever it launches; so do the primitives of the `cpu` backend.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import resfuse
from benchmarks.static import counting
from benchmarks.static.subjects import BLOCKS, EAGER, FUSED, OPS, Call, Subject, models
from benchmarks.static.table import Row

Counts = Callable[[], Counter[str]]
EMULATED, OF_THE_LIBRARY = "kernel", "resfuse_cuda::"
FULL_SIZE = models(32, 224)


def on_the_cpu(group: str, toolchain: str) -> list[Row]:
    """Primitives that the `cpu` backend calls, and the operators that eager PyTorch does."""
    with resfuse.use_backend(None):
        return of_subjects((*OPS, *BLOCKS, *models(2, 32)), group, toolchain)


def of_subjects(subjects: Iterable[Subject], group: str, toolchain: str) -> list[Row]:
    """Operators called by the backend that is in use, and by eager PyTorch, on the CPU in float32."""
    return [
        row
        for subject in subjects
        for provider in (EAGER, FUSED)
        for call in subject.calls(provider)
        for row in _rows(group, toolchain, call, _operators)
    ]


def in_the_emulator(group: str, toolchain: str) -> list[Row]:
    """Of the `cuda` backend: kernels that the emulator ran, and what PyTorch's operators add to them."""
    from resfuse.backends import registry
    from tests.emulator import backend as emulator

    registry.register("cuda_emulator", emulator)

    @contextmanager
    def counted() -> Iterator[Counts]:
        with _operators() as operators, emulator.launches() as launched:
            yield lambda: _with_kernels(operators(), launched.launches)

    with resfuse.use_backend("cuda_emulator"):
        return _of_fused((*OPS, *BLOCKS), group, toolchain, counted)


def of_triton(group: str, toolchain: str, device: Any) -> list[Row]:
    """Of the `triton` backend in bfloat16, as on a given GPU: kernels are listed there, not run."""
    from resfuse.backends.triton import launch

    @contextmanager
    def counted() -> Iterator[Counts]:
        with _operators() as operators:
            before = len(specs)
            yield lambda: operators() + Counter(spec.name for spec in specs[before:])

    subjects = (*OPS, *BLOCKS, *FULL_SIZE)
    with resfuse.use_backend("triton"), launch.collected(device) as specs:
        return _of_fused(subjects, group, toolchain, counted, torch.bfloat16)


def _of_fused(
    subjects: Iterable[Subject], group: str, toolchain: str, counted: Any, dtype: torch.dtype = torch.float32
) -> list[Row]:  # fmt: skip
    return [
        row
        for subject in subjects
        for call in subject.calls(FUSED, dtype)
        for row in _rows(group, toolchain, call, counted)
    ]


def _rows(group: str, toolchain: str, call: Call, counted: Any) -> Iterator[Row]:
    """A row per phase of a call."""
    call.prepare()
    subject = call.subject
    for phase, run in call.phases().items():
        with counted() as counts:
            run()
        found = counts()
        yield Row(
            group, subject.level, subject.name, call.mode, phase, call.provider,
            sum(found.values()), counting.described(found), toolchain,
        )  # fmt: skip


@contextmanager
def _operators() -> Iterator[Counts]:
    with counting.Operators() as mode:
        yield lambda: mode.counts


def _with_kernels(operators: Counter[str], launches: int) -> Counter[str]:
    """An operator of the library is as many launches as it made; which of them made how many is not known."""
    others = {name: count for name, count in operators.items() if not name.startswith(OF_THE_LIBRARY)}
    return Counter(others | {EMULATED: launches})
