"""Every path of the CUDA kernels, executed under sanitizers and under several schedules, and that it is every path."""

from __future__ import annotations

import pytest

from tests.emulator import build, coverage
from tests.emulator.run import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason())),
]


@pytest.mark.parametrize(
    ("variant", "seeds"),
    [(build.PLAIN, "012345"), (build.ASAN, "01"), (build.TSAN, "1")],
    ids=lambda value: getattr(value, "name", None),
)
def test_no_findings(variant: build.Variant, seeds: str) -> None:
    done = run(variant, build.library(variant), "--seed", *seeds)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    assert ", 0 failed" in done.stdout


def test_cases_reach_every_line() -> None:
    lines = coverage.measure()
    percent, table = coverage.report(lines)
    assert percent >= 98, table
    assert {"csrc/cuda/add_relu.cu", "csrc/cuda/bn_act_backward.cu", "csrc/cuda/conv_tile.cuh"} <= lines.keys()
