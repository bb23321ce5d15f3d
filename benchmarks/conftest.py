"""Options of the pytest-benchmark suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("resfuse's benchmarks of operators")
    group.addoption("--bench-batch", type=int, default=16, help="images in a batch (default 16)")
    group.addoption("--bench-threads", type=int, help="threads on the CPU (default: torch's own choice)")
    group.addoption("--bench-dtype", default="float32", choices=["float32", "bfloat16"], help="default float32")


@pytest.fixture(autouse=True, scope="session")
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Host overhead is measured with one thread whatever this says: see the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--bench-threads") or before)
    yield
    torch.set_num_threads(before)
