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
    ("backend", "variant", "seeds"),
    [
        ("cuda_emulator", build.PLAIN, "012345"),
        ("cuda_emulator", build.ASAN, "01"),
        ("cuda_emulator", build.TSAN, "1"),
        ("sm90_emulator", build.PLAIN, "02345"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_no_findings(backend: str, variant: build.Variant, seeds: str) -> None:
    if backend == "sm90_emulator" and build.sm90_unavailable_reason():
        pytest.skip(str(build.sm90_unavailable_reason()))
    done = run(variant, build.library(variant), backend, "--seed", *seeds)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    assert ", 0 failed" in done.stdout


def test_cases_reach_every_line() -> None:
    lines = coverage.measure()
    percent, table = coverage.report(lines)
    assert percent >= 98, table
    sm90 = set() if build.sm90_unavailable_reason() else {"csrc/cuda/sm90/conv_kernel.cuh"}
    assert sm90 | {"csrc/cuda/add_relu.cu", "csrc/cuda/bn_act_backward.cu", "csrc/cuda/conv_tile.cuh"} <= lines.keys()
