"""The CPU kernels of every instruction set that this machine has, not only of the widest."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import resfuse

pytestmark = pytest.mark.skipif("cpu" not in resfuse.available_backends(), reason="the CPU library is not built")


def run(instruction_set: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RESFUSE_CPU_ISA": instruction_set}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


NAME = "import resfuse; resfuse.available_backends(); from resfuse.backends import cpu; print(cpu.instruction_set())"


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", ["avx2", "baseline"])
def test_contract(instruction_set: str) -> None:
    if run(instruction_set, "-c", NAME).stdout.strip() != instruction_set:
        pytest.skip(f"this processor has no {instruction_set}")
    result = run(instruction_set, "-m", "resfuse", "verify", "--backend", "cpu")
    assert result.returncode == 0, result.stdout + result.stderr


def test_unknown_name_is_a_reason() -> None:
    code = "from resfuse.backends import dispatch; print(dispatch.unavailable_reasons()['cpu'])"
    assert "RESFUSE_CPU_ISA: expected one of avx512, avx2, baseline, got 'sse'" in run("sse", "-c", code).stdout
