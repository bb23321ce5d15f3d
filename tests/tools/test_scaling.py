"""The figures of docs/scaling.md, by the script that makes them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("torchvision")

from tools import scaling
from tools.scaling import all_gather, all_reduce

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text()


@pytest.mark.parametrize("arguments", [[], ["--step-time", "0.00279", "--batch", "32"]])
def test_the_tables_of_the_page(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["scaling.py", *arguments])
    scaling.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all(line in PAGE for line in lines)


def test_the_collectives_of_the_page() -> None:
    for gpus in (8, 64, 1024):
        times = [all_reduce(size, gpus) for size in (4 << 10, 1 << 20, 25 << 20)]
        cells = " | ".join(f"{1e6 * seconds:,.0f}" for seconds in (*times, all_gather(4 << 10, gpus)))
        assert f"| {gpus} | {cells} |" in PAGE


def test_synchronised_batch_norm_of_the_page() -> None:
    channels = [module.num_features for module in scaling.resnet50().modules() if hasattr(module, "num_features")]
    assert len(channels) == 53
    for gpus in (8, 64, 1024):
        seconds = scaling.sync_bn(channels, gpus)
        latency = scaling.sync_bn([0] * 53, gpus)
        assert f"| {gpus} | 106 | 425 | {1e3 * seconds:.2f} | {latency / seconds:.0%} |" in PAGE


def test_one_gpu_communicates_nothing() -> None:
    assert all_reduce(1 << 20, 1) == scaling.sync_bn([64], 1) == 0.0
    communication, after = scaling.exposed(scaling.resnet50(), 0.02, 8)
    assert communication > after > 0
