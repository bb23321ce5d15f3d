"""The page about results, and the files that it comes with."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import lost_time, plots, records, result_page, speeds, summary
from benchmarks.records import ROOT
from tests import made_up_results as made_up


def test_layers_on_which_a_peer_is_faster() -> None:
    rows = made_up.layers(6)
    rows = [dataclasses.replace(row, name=row.name + " x3") if row.name.endswith("layer0") else row for row in rows]
    slower = lost_time.to_peers(lost_time.layers(speeds.comparisons(rows)))
    assert [entry.one.first.name for entry in slower] == ["resnet50 layer0 x3", "resnet50 layer3"]
    assert {entry.against for entry in slower} == {"tensorrt"}
    most = slower[0]
    each = most.one.times["resfuse"].p50 - most.one.times["tensorrt"].p50
    assert most.lost == pytest.approx(3 * each)
    text = result_page.page(rows)
    assert "2 of 6, which lose" in text
    assert "| resnet50 layer0 x3 | inference, bfloat16, batch 128 | TensorRT | 10 | 8 | 6 | 0.80x | 50% |" in text


def test_layers_by_their_time_above_the_roofline() -> None:
    rows = made_up.layers(3)
    most, *_, least = lost_time.to_roofline(lost_time.layers(speeds.comparisons(rows)))
    assert (most.one.first.name, least.one.first.name) == ("resnet50 layer0", "resnet50 layer1")
    row = most.one.times["resfuse"]
    assert most.could == pytest.approx(2e7 / made_up.BANDWIDTH, rel=1e-4)
    assert most.lost == pytest.approx(row.p50 - most.could)
    text = result_page.page(rows)
    assert "| resnet50 layer0 | inference, bfloat16, batch 128 | roofline | 10 | 5 | 5 | 0.80x | 50% |" in text
    known = [dataclasses.replace(row, roofline=None) for row in rows]
    assert lost_time.to_roofline(lost_time.layers(speeds.comparisons(known))) == []


def test_graphs_decide_where_there_are_any() -> None:
    rows = made_up.layers(2)
    captured = made_up.graphs([row for row in rows if row.provider != "tensorrt" and row.level == "layer"], 10.0)
    assert lost_time.to_peers(lost_time.layers(speeds.comparisons(rows)))
    assert not lost_time.to_peers(lost_time.layers(speeds.comparisons(rows + captured)))
    assert "None of 2." in result_page.page(rows + captured)


def test_it_tells_machines_ceilings_means_and_failures() -> None:
    failed = made_up.row("cudnn_graph", 1.0, metric="left_out", unit="1", level="layer", conditions=made_up.GPU)
    idle = dataclasses.replace(failed, provider="tensorrt", p50=0.0)  # which had nothing to offer
    wide = dataclasses.replace(made_up.row("eager_nchw", 1.0, shape="2x3x224x224"), p80=2.0)
    text = result_page.page([*made_up.layers(3), failed, idle, *made_up.case(made_up.CPU_SPEEDS, 1.0), wide])
    assert "Ceilings, measured in the run: 4000 GB/s; bfloat16 800 TFLOP/s." in text
    assert "in so many cases: cuDNN graph (1)." in text
    assert "The spread is over 15% in 1 of 6 times" in text
    mean = (0.8 * 1.2 * 1.2) ** (1 / 3)
    assert f"{mean:.2f}x that of the best peer" in text
    assert "## Models, inference, float32, a processor, 2 threads" in text


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    records.update(tmp_path / "model-inference.csv", made_up.case(made_up.CPU_SPEEDS, 1.0))
    (tmp_path / "resources.csv").write_text("kernel,registers\nconv,200\n")  # somebody else's

    def no_plots(*_: object) -> list[Path]:
        raise ModuleNotFoundError("No module named 'matplotlib'")

    with monkeypatch.context() as patch:
        patch.setattr(plots, "draw", no_plots)
        assert summary.main([str(tmp_path)]) == 0
    assert "Plots were left out: No module named 'matplotlib'." in (tmp_path / "report.md").read_text()
    pytest.importorskip("matplotlib")
    assert summary.main([str(tmp_path)]) == 0
    assert "](model-inference.png)" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "model-inference.png").exists()
    assert str(tmp_path / "report.md") in capsys.readouterr().out


def test_several_folders(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "first", tmp_path / "second"
    records.update(first / "model-inference.csv", made_up.case(made_up.CPU_SPEEDS, 1.0))
    records.update(second / "layer-inference.csv", made_up.layers(2))
    assert summary.write([first, tmp_path / "none", second])[-1] == first / "report.md"
    page = (first / "report.md").read_text()
    assert "## Layers, inference" in page
    assert "](../second/layer-inference-roofline.png)" in page
    assert (second / "layer-inference-roofline.png").exists()


def test_a_bare_machine_gets_its_page(tmp_path: Path) -> None:
    """Without rich and matplotlib, as a GPU server may be."""
    records.update(tmp_path / "layer-inference.csv", made_up.layers(3))
    code = (
        "import sys; sys.modules.update(rich=None, matplotlib=None)\n"
        "from benchmarks import markdown, summary\n"
        "sys.exit(summary.main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.md").read_text()
    assert "Plots were left out" in page
    assert "## Layers, inference, bfloat16" in page


def test_a_folder_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        assert summary.main([str(folder)]) == 1
        assert f"no CSV files that the benchmarks wrote in {folder}" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
