"""The benchmarks run from end to end, on settings so small that their figures mean nothing."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("torchvision")

from benchmarks import measure, ops, overhead, records, report, saved_bytes
from benchmarks.providers import BASELINE, PROVIDERS, Setting
from benchmarks.records import Record, Subject
from benchmarks.worker import ProviderError, Worker
from benchmarks.workload import Workload, make_workload

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def run(*arguments: object) -> str:
    """Output of `python <arguments>` in the repository's root."""
    environment = {**os.environ, "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def metrics(rows: list[Record], provider: str) -> dict[str, float]:
    return {row.metric: row.p50 for row in rows if row.provider == provider}


def record(provider: str, dtype: str, seconds: list[float], date: str = "2026-01-01") -> Record:
    subject = Subject("model", "resnet50", provider, "inference", "1x3x8x8", dtype, "nchw")
    return subject.record("time", seconds, "s", records.Conditions("a processor", 2, "torch 0", "abc", date))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workload, Path]:
    """A small workload, and the file that it is in."""
    setting = Setting("inference", torch.float32, CPU, torch.get_num_threads())
    workload, path = make_workload("resnet18", 2, 32, setting), tmp_path_factory.mktemp("job") / "workload.pt"
    workload.save(path)
    return workload, path


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["inference", "train"])
def test_models(mode: str, tmp_path: Path) -> None:
    providers = [BASELINE, "resfuse", *(["onnxruntime"] if mode == "train" else [])]  # which says why it can not
    output = run(
        "-m", "benchmarks.models", "--quick", "--mode", mode, "--device", "cpu", "--provider", *providers,
        "--output", tmp_path,
    )  # fmt: skip
    assert all(len(line) <= 80 for line in output.splitlines() if not line.startswith("Wrote"))
    path = tmp_path / f"models-{mode}.csv"
    rows = records.read(path)
    assert {row.shape for row in rows} == {"2x3x64x64"}
    errors = {"error_output"} if mode == "inference" else {"error_loss", "error_gradient"}
    for provider in (BASELINE, "resfuse"):
        found = metrics(rows, provider)
        assert found.keys() == {"time", "minor_faults", "system_time", "peak_memory"} | errors
        assert found["time"] > 0
        assert found["peak_memory"] > 0
        assert all(found[error] < 1e-2 for error in errors)


def test_overhead(tmp_path: Path) -> None:
    assert overhead.main(["--quick", "--device", "cpu", "--output", str(tmp_path)]) == 0
    rows = records.read(tmp_path / "overhead.csv")
    assert {row.name for row in rows} == {ops.title(case) for case in ops.TINY}
    assert all(row.metric == "host_time" and row.p50 > 0 and row.conditions.threads == 1 for row in rows)


def test_saved_bytes(tmp_path: Path) -> None:
    assert saved_bytes.main(["--batch", "1", "--device", "cpu", "--output", str(tmp_path)]) == 0
    rows = records.read(tmp_path / "saved_bytes.csv")
    eager = {(row.name, row.dtype): row.p50 for row in rows if row.provider != "resfuse"}
    fused = {(row.name, row.dtype): row.p50 for row in rows if row.provider == "resfuse"}
    assert eager.keys() == fused.keys()
    assert all(fused[key] <= eager[key] for key in eager), "a fused block keeps more than an eager one"


def test_saved_bytes_are_those_of_the_formula() -> None:
    # Input, z and output of two convolutions, where the first one's output is the second one's input; mean and invstd.
    block = saved_bytes.Block("BasicBlock", 8, 8, 6).build()
    expected = 4 * (2 * 8 * 6 * 6 * 5 + 2 * 2 * 8)
    setting = Setting("train", torch.float32, CPU, 1)
    assert saved_bytes.saved_bytes(block, torch.randn(2, 8, 6, 6), setting) == expected


def test_operators_by_pytest_benchmark() -> None:
    pytest.importorskip("pytest_benchmark")
    output = run(
        "-m", "pytest", "benchmarks/", "--benchmark-only", "--bench-batch", 1, "--benchmark-min-rounds=1",
        "--benchmark-max-time=1e-6", "--benchmark-warmup=off", "-q", "-p", "no:cacheprovider", "-k", "deep or add_relu",
    )  # fmt: skip
    assert "resfuse_" in output


def test_wrong_results_are_seen(job: tuple[Workload, Path]) -> None:
    workload, _ = job
    assert workload.errors(workload.exact) == {"output": 0.0}
    off = {name: tensor * 1.001 for name, tensor in workload.exact.items()}
    assert workload.errors(off)["output"] > workload.limit("output")
    assert workload.eager_errors["output"] < workload.limit("output")


def test_a_failing_provider_is_an_error_with_its_reason(job: tuple[Workload, Path]) -> None:
    with Worker("no such provider", job[1]) as worker, pytest.raises(ProviderError, match="no such provider"):
        worker.errors()


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


def test_times_that_scatter_are_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    report.warn_if_restless(Console(), [record(BASELINE, "float32", [1.0, 1.01, 1.02])])
    assert not capsys.readouterr().out
    report.warn_if_restless(Console(), [record(BASELINE, "float32", [1.0, 1.5, 2.0])])
    assert "in 1 of these rows" in capsys.readouterr().out


def test_page_faults_are_counted() -> None:
    size = 1 << 20
    fresh = mmap.mmap(-1, size)
    fresh.madvise(mmap.MADV_NOHUGEPAGE)
    (sample,) = measure.call_samples(lambda: fresh.write(b"1" * size), 1, CPU)
    assert sample.seconds > 0
    assert sample.minor_faults >= size // mmap.PAGESIZE
