"""Settings of every test, and the fixtures that several files share."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

# Before anything imports Triton, whose kernels are interpreted on the CPU by the one release that interpreter.py mends.
if not torch.cuda.is_available() and importlib.util.find_spec("triton") and version("triton").startswith("3.6."):
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests import needs

os.environ["RESFUSE_TABLES"] = os.devnull  # what was measured on this machine is not what tests expect

# The processes of pytest-xdist share the cores.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

# By torch's default cuDNN, and so every backend for GPUs, computes float32 convolutions in TF32.  That has tests of its
# own; in all others float32 means float32, or signs that TF32's rounding decides would be taken for errors.
torch.backends.cudnn.allow_tf32 = False

# `make compat` has torch releases that no torchvision can be had for, a machine with a GPU may have torch and no more.
_LEFT_OUT = needs.left_out(Path(__file__).parent)
collect_ignore = list(_LEFT_OUT)


def pytest_report_header() -> list[str]:
    return [f"left out, for what is not installed: {name}: {', '.join(why)}" for name, why in _LEFT_OUT.items()]


def pytest_configure(config: pytest.Config) -> None:
    """The same examples on every run, for a failure belongs to the change that caused it; more in the full suite."""
    if importlib.util.find_spec("hypothesis"):
        import hypothesis

        few = config.getoption("markexpr") == "not slow"
        hypothesis.settings.register_profile(
            "fixed", derandomize=True, deadline=None, print_blob=True, max_examples=15 if few else 120
        )
        hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def deterministic_cudnn() -> Iterator[None]:
    """For tests that compare bits: cuDNN, which computes some gradients, repeats its results only if it is told to."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def poison(tensor: Tensor) -> Tensor:
    """Fill with NaN, or with the largest integer."""
    if tensor.is_floating_point():
        return tensor.fill_(torch.nan)
    return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN: an output, or a part of one, that nobody writes cannot pass for zeros."""

    def poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: poison(allocate(*args, **kwargs))

    owners: list[tuple[Any, tuple[str, ...]]] = [
        (torch, ("empty", "empty_like", "empty_strided")),
        (Tensor, ("new_empty", "new_empty_strided")),
    ]
    for owner, names in owners:
        for name in names:
            monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))
    assert torch.empty(3).isnan().all()
    assert torch.ones(3).new_empty(2).isnan().all()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many small problems: threads that spin at each other's barriers take most of the time on a busy machine.

    Nothing is lost: the kernels give the same bits with any number of threads, which test_determinism holds.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
