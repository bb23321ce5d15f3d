"""The operators on ResNet-50's shapes by every provider, in this process.

    pytest benchmarks/test_ops_bench.py --benchmark-only --benchmark-group-by=group

Every group of the output is one operator, shape and mode; the providers in it compute the same.  For results to keep
there is `python -m benchmarks.run --level op`, where each provider has a process of its own and they take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("pytest_benchmark")

LEVEL = "op"


def test_operator(benchmark: Any, step: Callable[[], None], group: str, provider: str) -> None:
    benchmark.name, benchmark.group = provider, group
    benchmark(step)
