"""`python -m resfuse bench`: what it would measure, what it hands on, and its reports."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import estimate, records
from benchmarks import run as measuring
from resfuse.cli import bench
from tests import made_up_results as made_up


def parse(*line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(line)


@pytest.fixture(autouse=True)
def _laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_an_installed_package_says_where_the_benchmarks_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "benchmarks" in name else find(name))
    assert bench.run(parse("--report")) == 1
    assert "The benchmarks come with a checkout of resfuse" in capsys.readouterr().err


def test_a_checkout_is_found_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert bench.benchmarks_found()


def test_the_plan_is_that_of_the_machine() -> None:
    runs = bench.plan(parse())
    assert [run[:2] for run in runs] == [("model", "inference"), ("model", "train"), ("layer", "inference")]
    assert {run.model for run in runs} == {("resnet50",)}
    assert {run.dtype for run in bench.plan(parse("--device", "cuda"))} == {("bfloat16",)}
    assert [run.batch for run in bench.plan(parse("--device", "cuda", "--mode", "train"))] == [(256,), (128,)]


def test_what_is_asked_for_comes_before_the_plan() -> None:
    runs = bench.plan(parse("--level", "op", "model", "--dtype", "bfloat16", "--batch", "4", "--mode", "inference"))
    assert [run[:2] for run in runs] == [("op", "inference"), ("model", "inference")]
    assert {(run.dtype, run.batch) for run in runs} == {(("bfloat16",), (4,))}
    assert all(run.batch == run.model == () for run in bench.plan(parse("--quick")))


def test_it_hands_on_what_the_benchmarks_understand(tmp_path: Path) -> None:
    args = parse("--quick", "--resume", "--output", str(tmp_path), "--provider", "resfuse", "eager_nchw")
    for run in bench.plan(args):
        understood = measuring._parse(bench.arguments(run, args, 12.5))
        assert (understood.level, understood.mode, understood.device.type) == (run.level, run.mode, "cpu")
        assert (understood.limit, understood.resume, understood.quick) == (12.5, True, True)
        assert (understood.output, understood.provider) == (tmp_path, ["resfuse", "eager_nchw"])


def test_a_dry_run_tells_and_measures_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring, "main", lambda line: pytest.fail("something was measured"))
    assert bench.run(parse("--dry-run", "--provider", "eager_nchw", "resfuse", "--device", "cpu")) == 0
    said = capsys.readouterr().out
    assert "model, inference, resnet50, float32, bfloat16: 2 cases, 4 entries each, about " in said
    assert "Together about" in said


@pytest.mark.parametrize(("line", "folder"), [([], bench.RESULTS), (["--quick"], bench.TRIALS)])
def test_trials_do_not_mix_with_results(line: list[str], folder: Path) -> None:
    args = parse("--dry-run", "--level", "op", "--provider", "resfuse", *line)
    assert bench.run(args) == 0
    assert args.output == folder


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (["--model", "nonsense"], 2, "nonsense"),
        (["--provider", "nobody"], 2, "got nobody"),
        (["--device", "cuda"], 1, "sees no GPU"),
        (["--report", "nowhere"], 1, "no CSV files that the benchmarks wrote in nowhere"),
    ],
)
def test_bad_input(line: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.run(parse(*line)) == code
    assert said in capsys.readouterr().err


def test_runs_share_the_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second gets what the first leaves, nothing is begun when it is over; then come tables and the worst code."""
    pytest.importorskip("rich")
    clock, lines = [0.0], []

    def measure(line: list[str]) -> int:
        lines.append(line)
        clock[0] += 40.0
        records.update(tmp_path / "model-inference.csv", made_up.case({"eager_nchw": 1.0, "resfuse": 2.0}, 1.0))
        return int(len(lines) == 1)

    monkeypatch.setattr(measuring, "main", measure)
    monkeypatch.setattr(bench, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    args = parse("--level", "model", "op", "--output", str(tmp_path), "--limit", "100", "--provider", "resfuse")
    assert bench.run(args) == 1
    assert [line[line.index("--limit") + 1] for line in lines] == ["100", "60", "20"]
    said = capsys.readouterr().out
    assert "The time is up" in said
    assert "2.00x" in said


def test_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records.update(tmp_path / "model-inference.csv", made_up.case({"eager_nchw": 1.0, "resfuse": 2.0}, 1.0))
    assert bench.run(parse("--report", str(tmp_path))) == 0
    page = tmp_path / "report.md"
    before = page.read_text()
    assert "2.00x" in before
    page.unlink()
    assert bench.run(parse("--report", "--output", str(tmp_path))) == 0
    assert page.read_text() == before


def test_an_estimate_grows_with_the_work() -> None:
    def minutes(**given: Any) -> float:
        return estimate.extent("layer", "inference", torch.device("cpu"), models=["resnet50"], **given).minutes

    one = minutes(batches=[8], providers=["resfuse"])
    assert one > 0
    assert minutes(batches=[8, 16], providers=["resfuse"]) == pytest.approx(2 * one)
    assert minutes(batches=[8], providers=["resfuse", "eager_nchw"]) == pytest.approx(2 * one)
    both = minutes(batches=[8], providers=["resfuse"], dtypes=[torch.float32, torch.bfloat16])
    assert both == pytest.approx(2 * one)
    trial = estimate.extent("layer", "inference", torch.device("cpu"), providers=["resfuse"], quick=True)
    assert trial.minutes < one
    assert trial.cases == 2


@pytest.mark.slow
def test_from_measuring_to_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--quick", "--level", "op", "--mode", "inference", "--device", "cpu", "--output", str(tmp_path)]
    assert bench.run(parse(*line, "--provider", "eager_channels_last", "resfuse")) == 0
    rows = records.read(tmp_path / "op-inference.csv")
    assert {row.provider for row in rows if row.metric == "time"} == {"eager_channels_last", "resfuse"}
    assert "geometric mean" in capsys.readouterr().out
    assert bench.run(parse("--report", str(tmp_path))) == 0
    page = (tmp_path / "report.md").read_text()
    assert "## Ops, inference, float32" in page
    assert "Ceilings, measured in the run" in page
