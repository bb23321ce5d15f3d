"""The CPU kernels of every instruction set that this machine has, not only of the widest."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import resfuse
from resfuse.backends import cpu


@pytest.mark.skipif("cpu" not in resfuse.available_backends(), reason="the CPU library is not built")
@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", ["avx2", "baseline"])
def test_contract(instruction_set: str) -> None:
    environment = {**os.environ, "RESFUSE_CPU_ISA": instruction_set}
    name = "import resfuse; resfuse.available_backends(); print(resfuse.backends.cpu.instruction_set())"
    found = subprocess.run([sys.executable, "-c", name], env=environment, capture_output=True, text=True)
    if found.stdout.strip() != instruction_set:
        pytest.skip(f"this processor has no {instruction_set}")
    command = [sys.executable, "-m", "resfuse", "verify", "--backend", "cpu"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_unknown_name_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESFUSE_CPU_ISA", "sse")
    assert "RESFUSE_CPU_ISA: expected one of avx512, avx2, baseline, got 'sse'" in (cpu.unavailable_reason() or "")
