"""The residual blocks of ResNet-18 and ResNet-50, and pre-activation blocks, by every provider; see test_ops_bench.py.

pytest benchmarks/test_blocks_bench.py --benchmark-only --benchmark-group-by=group
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("pytest_benchmark")
pytest.importorskip("torchvision")

LEVEL = "block"


def test_block(benchmark: Any, step: Callable[[], None], group: str, provider: str) -> None:
    benchmark.name, benchmark.group = provider, group
    benchmark(step)
