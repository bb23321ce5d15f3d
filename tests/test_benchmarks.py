"""The benchmarks run from end to end, on settings so small that their figures mean nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("torchvision")

from benchmarks import ops, overhead, records, report, terminal
from benchmarks.providers import BASELINE, PROVIDERS, Setting
from benchmarks.records import Record, Subject

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def run(*arguments: object) -> str:
    """Output of `python <arguments>` in the repository's root."""
    environment = {**os.environ, "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def record(provider: str, dtype: str, seconds: list[float], date: str = "2026-01-01") -> Record:
    subject = Subject("model", "resnet50", provider, "inference", "1x3x8x8", dtype, "nchw")
    return subject.record("time", seconds, "s", records.Conditions("a processor", 2, "torch 0", "abc", date))


def test_overhead(tmp_path: Path) -> None:
    assert overhead.main(["--quick", "--device", "cpu", "--output", str(tmp_path)]) == 0
    rows = records.read(tmp_path / "overhead.csv")
    assert {row.name for row in rows} == {ops.title(case) for case in ops.TINY}
    assert all(row.metric == "host_time" and row.p50 > 0 and row.conditions.threads == 1 for row in rows)


def test_peers_say_why_they_can_not_run() -> None:
    training = Setting("train", torch.float32, CPU, 1)
    assert all(PROVIDERS[name].unavailable_reason(training) for name in ("onnxruntime", "openvino"))
    assert PROVIDERS[BASELINE].unavailable_reason(training) is None


def test_a_file_keeps_what_a_run_did_not_measure(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    narrow = record("resfuse", "bfloat16", [1.0, 2.0, 3.0])
    records.update(path, [record(BASELINE, "float32", [4.0]), narrow])
    newer = record("resfuse", "float32", [5.0], date="2026-01-02")
    records.update(path, [newer])
    assert records.read(path) == [narrow, newer]
    assert narrow.quantiles == pytest.approx((1.4, 2.0, 2.6))
    assert [file.name for file in tmp_path.iterdir()] == ["results.csv"], "what was written aside is in its place"


def test_ceilings_stay_as_long_as_rows_of_their_run(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"

    def ceiling(date: str) -> Record:
        copy = Subject(records.CEILINGS, "copy", "pytorch", "inference", "", "", "")
        return copy.record("bandwidth", [4e12], "B/s", records.Conditions("a processor", 2, "torch 0", "abc", date))

    old = [record(BASELINE, "float32", [4.0], "2026-01-01"), record(BASELINE, "bfloat16", [4.0], "2026-01-01")]
    records.update(path, [ceiling("2026-01-01"), *old])
    records.update(path, [ceiling("2026-01-02"), record(BASELINE, "float32", [4.0], "2026-01-02")])
    dates = [row.conditions.date for row in records.read(path) if row.level == records.CEILINGS]
    assert dates == ["2026-01-01", "2026-01-02"]
    records.update(path, [ceiling("2026-01-03"), record(BASELINE, "bfloat16", [4.0], "2026-01-03")])
    dates = [row.conditions.date for row in records.read(path) if row.level == records.CEILINGS]
    assert dates == ["2026-01-02", "2026-01-03"]


def test_a_time_has_its_part_of_the_roofline(tmp_path: Path) -> None:
    cost = records.Roofline(bytes=3_000_000_001, flops=0, seconds=1e-3)
    subject = Subject("op", "add_relu", "resfuse", "inference", "1x3x8x8", "float32", "nchw")
    conditions = records.Conditions("a processor", 2, "torch 0", "abc", "2026-01-01")
    row = subject.record("time", [4e-3], "s", conditions, cost)
    faults = subject.record("minor_faults", [3.0], "1", conditions)
    assert (row.bytes, row.flops, row.roofline) == (3_000_000_001, 0, 0.25)
    assert (faults.bytes, faults.flops, faults.roofline) == (None, None, None)
    records.update(tmp_path / "results.csv", [row, faults])
    assert records.read(tmp_path / "results.csv") == [row, faults]


def test_files_from_before_the_roofline_can_be_read(tmp_path: Path) -> None:
    path, row = tmp_path / "results.csv", record(BASELINE, "float32", [2193453056.0])
    records.update(path, [row])
    head, line = path.read_text().splitlines()
    assert "2193453056" in line, "no digit is lost"
    assert ",,,," in line
    path.write_text(head.replace("bytes,flops,roofline,", "") + "\n" + line.replace(",,,,", ",") + "\n")
    assert records.read(path) == [row]


def test_times_that_scatter_are_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    report.warn_if_restless(Console(), [record(BASELINE, "float32", [1.0, 1.01, 1.02])])
    assert not capsys.readouterr().out
    report.warn_if_restless(Console(), [record(BASELINE, "float32", [1.0, 1.5, 2.0])])
    assert "in 1 of these rows" in capsys.readouterr().out


def test_machines_without_rich_get_plain_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal.importlib.util, "find_spec", lambda name: None)
    plain = terminal.Terminal()
    with plain.progress() as progress:
        progress.begin("measuring", 2)
        progress.advance()
    row = record(BASELINE, "float32", [1.0, 2.0, 3.0])
    plain.results([row])
    plain.pairs("Host time", [row], "ms", 1e3)
    assert capsys.readouterr().out.splitlines() == [
        "resnet50, inference, 1x3x8x8, float32: eager_nchw time 2000 ms (spread 60%)",
        "Host time",
        "resnet50, inference: eager_nchw 2e+03 ms",
    ]
