"""examples/demo.py: it runs, prints its tables and writes its files."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
from examples import demo

needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in demo.PACKAGES), reason="a package of the demo is missing"
)


@needs_packages
@pytest.mark.slow
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MODEL", "resnet18")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    threads = torch.get_num_threads()
    assert demo.main(["--quick", "--threads", "1", "--output", str(tmp_path / "results")]) == 0
    assert torch.get_num_threads() == threads
    output = capsys.readouterr().out
    assert max(len(line) for line in output.splitlines()) <= 80
    for expected in ("What runs where", "backend", "accuracy", "images/s", "benchmarks/"):
        assert expected in output
    assert (tmp_path / "results" / "demo.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "results" / "demo.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["version"] for row in rows} == {"eager", "eager, channels_last", "fused"}
    assert {row["threads"] for row in rows} == {"1"}
    accuracy = {row["version"]: float(row["value"]) for row in rows if row["quantity"] == "test_accuracy"}
    assert min(accuracy.values()) > 0.5
    assert all(float(row["value"]) > 0 for row in rows)


def test_bad_options_and_missing_packages(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    with pytest.raises(SystemExit):
        demo.main([])
    said = capsys.readouterr().err
    assert "scikit-learn" in said and "pip install 'resfuse[demo]'" in said
    monkeypatch.setattr(demo, "PACKAGES", {})
    with pytest.raises(SystemExit):
        demo.main(["--threads", "0"])
    assert "--threads: expected at least 1, got 0" in capsys.readouterr().err


def test_timing_takes_turns_and_keeps_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    alternatives = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    seconds = demo.interleave(alternatives, 2, torch.device("cpu"))
    assert calls == ["a", "b"] * 3  # a warm-up and two rounds
    assert [len(seconds[name]) for name in ("a", "b")] == [2, 2]
    monkeypatch.setattr(demo, "BUDGET", 0)
    assert len(demo.interleave({"a": lambda: None}, 100, torch.device("cpu"))["a"]) == 3
