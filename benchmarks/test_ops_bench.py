"""The operators on ResNet-50's layers, and their host overhead on tiny tensors: eager against resfuse's backends.

    pytest benchmarks/ --benchmark-only

Every group of the output is one operator, shape and mode; the providers in it compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")

import resfuse
from benchmarks.measure import synchronize
from benchmarks.ops import MODES, TINY, OpCall, check, layers, title
from benchmarks.options import DTYPES
from benchmarks.providers.base import Layout
from resfuse.cli.cases import Case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EAGER: dict[str, Layout] = {"eager_nchw": "nchw", "eager_channels_last": "channels_last"}
BACKENDS = [name for name in resfuse.available_backends() if name != "reference"]
TINY_CALLS = 100


def modes(case: Case) -> list[str]:
    """A mode in which there is something to measure."""
    return [mode for mode in MODES if mode != "train_forward" or case.op != "add_relu"]


def parameters(cases: tuple[Case, ...]) -> list[Any]:
    return [
        pytest.param(index, mode, id=f"{title(case).replace(' ', '-')}-{mode}")
        for index, case in enumerate(cases)
        for mode in modes(case)
    ]


@contextmanager
def call_of(provider: str, case: Case, mode: str, dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    if provider in EAGER:
        call = OpCall(case, mode, dtype, DEVICE, EAGER[provider])
        with call.context():
            yield call.eager()
    else:
        call = OpCall(case, mode, dtype, DEVICE, backend=provider.removeprefix("resfuse_"))
        with call.context():
            check(call)
            yield call.fused()


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("provider", [*EAGER, *(f"resfuse_{name}" for name in BACKENDS)])
@pytest.mark.parametrize(("index", "mode"), parameters(layers(1)))
def test_layer(benchmark: Any, pytestconfig: pytest.Config, index: int, mode: str, provider: str) -> None:
    case = layers(pytestconfig.getoption("--bench-batch"))[index]
    dtype = pytestconfig.getoption("--bench-dtype")
    benchmark.name = provider
    benchmark.group = f"{title(case)}, {mode}, batch {case.shape[0]}, {dtype}"
    with call_of(provider, case, mode, DTYPES[dtype]) as call:

        def finished() -> None:
            call()
            synchronize(DEVICE)

        benchmark(finished)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("provider", ["eager_channels_last", *(f"resfuse_{name}" for name in BACKENDS)])
@pytest.mark.parametrize(("index", "mode"), parameters(TINY))
def test_host_overhead(benchmark: Any, pytestconfig: pytest.Config, index: int, mode: str, provider: str) -> None:
    case = TINY[index]
    dtype = pytestconfig.getoption("--bench-dtype")
    benchmark.name = provider
    benchmark.group = f"overhead of {TINY_CALLS} calls: {title(case)}, {mode}, {dtype}"
    with call_of(provider, case, mode, DTYPES[dtype]) as call:

        def calls() -> None:
            for _ in range(TINY_CALLS):
                call()

        benchmark(calls)
    synchronize(DEVICE)
