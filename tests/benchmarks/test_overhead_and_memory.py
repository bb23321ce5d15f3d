"""Host time of tiny calls, and bytes kept by a training step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("pandas")

from benchmarks import memory, overhead, results
from tests.emulator import backend as emulator


@pytest.mark.parametrize("mode", overhead.MODES)
@pytest.mark.parametrize("name", overhead.TINY)
def test_both_sides_compute_the_same(name: str, mode: str) -> None:
    fused, plain = overhead.calls(overhead.TINY[name], mode, torch.float32, "cpu")
    overhead.check(fused, plain)
    with pytest.raises(AssertionError):
        overhead.check(lambda: torch.ones(3), lambda: torch.zeros(3))


def test_overhead_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert overhead.main(["--quick", "--device", "cpu", "--output", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    rows = results.read(tmp_path / "overhead.csv")
    assert len(rows) == 2 * len(overhead.TINY) * len(overhead.MODES)
    assert set(rows["metric"]) == {"host_time"} and (rows["p50"] > 0).all()
    assert "target is a ratio of at most 1.1" in capsys.readouterr().out


def test_host_time_up_to_the_launch(capsys: pytest.CaptureFixture[str]) -> None:
    if (reason := emulator.unavailable_reason()) is not None:
        pytest.skip(reason)
    with emulator.launches() as counted:
        assert overhead.main(["--stubbed", "cuda", "--quick"]) == 0
    assert counted.launches == 3 * 3 * 2 and counted.blocks == 0, "three rounds of two calls; no kernel ran"
    assert "at most 10 with the module" in capsys.readouterr().out


def test_storages_count_once_and_parameters_do_not() -> None:
    linear, x = nn.Linear(4, 4, bias=False), torch.randn(8, 4, requires_grad=True)

    def step() -> None:
        y = linear(x)  # keeps x and the weight
        (y * y.view_as(y)).sum().backward()  # keeps y, twice

    assert memory.saved_bytes(step, linear.parameters()) == 4 * (8 * 4 + 8 * 4)


def test_a_fused_step_keeps_what_eager_keeps() -> None:
    """MB per image, as docs/memory.md says."""
    counted = [memory.kept("cifar_resnet20", provider, torch.bfloat16)[1] for provider in (memory.EAGER, memory.FUSED)]
    assert counted[0] == counted[1] == pytest.approx(0.760e6, abs=500)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
def test_a_compiled_step_keeps_a_little_less() -> None:
    assert memory.kept("cifar_resnet20", memory.COMPILED, torch.bfloat16)[1] == pytest.approx(0.756e6, abs=500)


@pytest.mark.slow
def test_memory_is_measured_in_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "cifar_resnet8", "--batch", "2", "--provider", memory.EAGER, memory.FUSED, "--peak"]
    assert memory.main([*arguments, "--device", "cpu", "--output", str(tmp_path)]) == 0
    rows = results.read(tmp_path / "memory.csv")
    assert len(rows[rows["metric"] == "peak_memory"]) == 2
    assert (rows["p50"] > 0).all()
    assert "kept MB per image" in capsys.readouterr().out
