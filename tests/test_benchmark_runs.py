"""Runs of the benchmarks, in settings so small that their figures mean nothing: what is measured, kept and left out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchvision")

from resfuse.costs import DEVICES

from benchmarks import ceilings, crew, presets, records, run, runner, workload
from benchmarks.cases import make_cases
from benchmarks.contest import Contest
from benchmarks.crew import Crew, OutOfTimeError, Plan
from benchmarks.measure import Sample
from benchmarks.outcome import LEFT_OUT
from benchmarks.providers import BASELINE, PROVIDERS, Setting
from benchmarks.providers.base import Provider, Step, UnsuitableError
from benchmarks.providers.native import Eager
from benchmarks.records import CEILINGS, Record
from benchmarks.terminal import Terminal
from benchmarks.worker import LateError
from tests.bench_workers import LocalWorker, recorder

CPU = torch.device("cpu")
SYSTEM = {"time", "minor_faults", "system_time", "peak_memory"}
QUICK = ("--quick", "--device", "cpu", "--provider", BASELINE, "resfuse")


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Providers run in this process, and the names of those that were started; ceilings are made up."""
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    started: list[str] = []
    monkeypatch.setattr(LocalWorker, "started", started, raising=False)
    monkeypatch.setattr(crew, "Worker", LocalWorker)
    machine = dataclasses.replace(DEVICES["h200"], type="cpu")
    monkeypatch.setattr(run, "measure_device", lambda device, seconds: machine)
    yield started
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = benchmark


@pytest.fixture
def unpriced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks what the cases cost on paper."""
    monkeypatch.setattr(ceilings, "cost_of", lambda case, setting, device: None)


def metrics(rows: list[Record], provider: str) -> dict[str, Record]:
    return {row.metric: row for row in rows if row.provider == provider}


def measured(output: Path, name: str, *arguments: str, status: int = 0) -> list[Record]:
    """The rows of a run."""
    level, mode = name.split("-")
    assert run.main([*QUICK, "--level", level, "--mode", mode, "--output", str(output), *arguments]) == status
    return records.read(output / f"{name}.csv")


@pytest.mark.parametrize(
    ("name", "case", "dtype", "errors"),
    [
        ("op-inference", "1x1 reduce", "bfloat16", {"error_output"}),
        ("op-train", "add_relu stage 4", "bfloat16", {"error_output", "error_gradient"}),
        ("layer-train", "layer1.0.conv2", "float32", {"error_output", "error_gradient"}),
        ("block-train", "layer2.0", "float32", {"error_output", "error_gradient"}),
        ("model-inference", "cifar_resnet20", "bfloat16", {"error_output"}),
        ("model-train", "cifar_resnet20", "float32", {"error_loss", "error_gradient"}),
    ],
)
def test_every_level_is_measured(
    name: str, case: str, dtype: str, errors: set[str], local: list[str], tmp_path: Path
) -> None:
    rows = measured(tmp_path, name, "--case", case, "--dtype", dtype)
    assert local == [BASELINE, "resfuse"]
    for provider in local:
        found = metrics(rows, provider)
        assert found.keys() == SYSTEM | errors
        assert found["time"].p50 > 0
        assert found["time"].dtype == dtype
        assert all(found[error].p50 < (0.2 if dtype == "bfloat16" else 1e-3) for error in errors)
    ours, eager = (metrics(rows, provider)["time"] for provider in ("resfuse", BASELINE))
    assert ours.bytes == eager.bytes > 0
    assert ours.roofline == pytest.approx(eager.roofline * eager.p50 / ours.p50, rel=1e-4)
    assert (ours.flops == 0) == ("add_relu" in case)
    copy, *products = (row for row in rows if row.level == CEILINGS)
    assert copy.p50 == DEVICES["h200"].bandwidth
    assert {row.dtype for row in products} >= {"bfloat16", "float32"}


@pytest.mark.slow
def test_a_run_from_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In processes of their own, with measured ceilings."""
    rows = measured(tmp_path, "model-train", "--case", "cifar")
    assert {row.provider for row in rows} == {BASELINE, "resfuse", "pytorch"}
    assert all(len(line) <= 80 for line in capfd.readouterr().out.splitlines() if not line.startswith("Wrote"))


@pytest.mark.usefixtures("unpriced")
def test_what_a_file_has_of_this_commit_is_not_measured_again(
    local: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BENCH_COMMIT", "one")
    one = ("--case", "add_relu stage 4", "--resume")
    rows = measured(tmp_path, "op-inference", *one)
    assert {row.name for row in rows if row.level == "op"} == {"add_relu stage 4"}
    local.clear()
    assert measured(tmp_path, "op-inference", *one) == rows
    assert not local, "nothing is started where nothing is to be done"
    dtypes = {row.dtype for row in measured(tmp_path, "op-inference", *one, "--dtype", "bfloat16") if row.level == "op"}
    assert dtypes == {"float32", "bfloat16"}
    monkeypatch.setenv("BENCH_COMMIT", "two")
    rows = measured(tmp_path, "op-inference", *one)
    assert {(row.dtype, row.conditions.commit) for row in rows if row.level == "op"} == {
        ("float32", "two"), ("bfloat16", "one"),
    }  # fmt: skip


@pytest.mark.usefixtures("unpriced")
def test_a_run_ends_when_its_time_is_up(
    local: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = measured(tmp_path, "op-inference", "--case", "add_relu stage", "--limit", "0.001")
    assert not rows
    assert "left are add_relu stage 1 (2x256x7x7), add_relu stage 4" in capsys.readouterr().out
    # As if the first case had taken most of the time: the second one is not begun.
    hold = Contest.hold

    def slow(self: Contest, *arguments: Any) -> list[Record]:
        found = hold(self, *arguments)
        now = time.monotonic()
        monkeypatch.setattr(run.time, "monotonic", lambda: now + 60)
        return found

    monkeypatch.setattr(Contest, "hold", slow)
    rows = measured(tmp_path, "op-inference", "--case", "add_relu stage", "--limit", "100")
    assert {row.name for row in rows if row.level == "op"} == {"add_relu stage 1"}
    assert "left are add_relu stage 4" in capsys.readouterr().out


class Wrong(Eager):
    """Computes something else."""

    def prepare(self, module: nn.Module, examples: tuple[Tensor, ...], setting: Setting) -> Step:
        step = super().prepare(module, examples, setting)
        return lambda *inputs: step(*inputs) * 1.01


class Broken(Provider):
    def prepare(self, module: nn.Module, examples: tuple[Tensor, ...], setting: Setting) -> Step:
        raise RuntimeError("no such kernel")


class Late(Eager):
    """Breaks when it is timed."""

    def prepare(self, module: nn.Module, examples: tuple[Tensor, ...], setting: Setting) -> Step:
        step, calls = super().prepare(module, examples, setting), iter(range(2))

        def call(*inputs: Tensor) -> Any:
            if next(calls, None) is None:
                raise RuntimeError("out of memory")
            return step(*inputs)

        return call


class Choosy(Eager):
    def prepare(self, module: nn.Module, examples: tuple[Tensor, ...], setting: Setting) -> Step:
        raise UnsuitableError("it likes convolutions only")


@pytest.mark.usefixtures("unpriced")
@pytest.mark.parametrize(
    ("provider", "failed", "message"),
    [
        (Wrong("other"), 1, "wrong: output 1.0e-02; limit"),
        (Broken("other"), 1, "no such kernel"),
        (Late("other"), 1, "out of memory"),
        (Choosy("other"), 0, "it likes convolutions only"),
    ],
)
def test_who_fails_is_left_out_and_the_others_go_on(
    provider: Provider, failed: int, message: str, local: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(PROVIDERS, "other", provider)
    arguments = ("--case", "add_relu stage 4", "--provider", "other", BASELINE)
    rows = measured(tmp_path, "op-inference", *arguments, status=failed)
    assert message in capsys.readouterr().out
    assert metrics(rows, BASELINE)["time"].p50 > 0
    assert {name: row.p50 for name, row in metrics(rows, "other").items()} == {LEFT_OUT: failed}
    local.clear()
    assert measured(tmp_path, "op-inference", *arguments, "--resume") == rows
    assert not local, "who failed is not tried again"


@pytest.mark.parametrize(
    ("level", "name", "graphs", "steps"), [("op", "add_relu stage 4", 1, 4), ("model", "cifar_resnet20", 4, 1)]
)
def test_a_graph_is_checked_and_timed_per_step(
    level: Any, name: str, graphs: int, steps: int, local: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """All of it but the capture, in whose place the functions are called."""
    log: list[str] = []
    monkeypatch.setattr(runner, "recorder", lambda setting: recorder(log))

    def samples(call: Any, calls: int, *rest: object) -> list[Sample]:
        call()
        return [Sample(1.0, 0.0, 0.0)] * calls

    monkeypatch.setattr(runner.measure, "call_samples", samples)
    (case,) = (case for case in make_cases(level, ["cifar_resnet20"], 2, 32) if case.name == name)
    setting = Setting("train", torch.float32, CPU, 1, graph=True, level=level)
    contest = Contest(case, [("resfuse", setting)], Plan(2, 0.0, 0.0), Terminal())
    with Crew(keep=True) as workers:
        rows = contest.hold(workers, lambda setting: None, records.current_conditions(CPU, 1))
    found = metrics(rows, "resfuse")
    assert found["graph_time"].p50 == 1.0 / steps, capsys.readouterr().out
    others = {"minor_faults", "system_time", "peak_memory", "error_output", "error_gradient"}
    assert found.keys() - {"graph_time"} == (set() if level == "model" else others)
    captured = [entry for entry in log if not entry.startswith("replay")]
    assert len(captured) == graphs
    assert log[graphs] == f"replay {captured[-1]}", "what is checked is the graph of the first batch"


def graphless(setting: Setting) -> Any:
    raise RuntimeError("operation not permitted when stream is capturing")


def test_a_part_that_can_not_be_captured_is_timed_by_calls(local: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "recorder", graphless)
    (case,) = (case for case in make_cases("op", [], 2, 32) if case.name == "add_relu stage 4")
    setting = Setting("inference", torch.float32, CPU, 1, graph=True, level="op")
    contest = Contest(case, [("resfuse", setting)], Plan(2, 0.0, 0.0), Terminal())
    with Crew(keep=True) as workers:
        rows = contest.hold(workers, lambda setting: None, records.current_conditions(CPU, 1))
    found = metrics(rows, "resfuse")
    assert found["graph_left_out"].p50 == 1
    assert found["time"].p50 > 0


@pytest.mark.parametrize("last_chance", [False, True])
def test_who_is_late_is_left_out_only_where_another_run_would_not_help(
    last_chance: bool, local: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []

    def late(self: LocalWorker, path: Path, patience: float | None = None) -> dict[str, float]:
        given.append(patience or 0.0)
        raise LateError("it was not ready")

    monkeypatch.setattr(LocalWorker, "prepare", late)
    (case,) = (case for case in make_cases("op", [], 2, 32) if case.name == "add_relu stage 4")
    setting = Setting("inference", torch.float32, CPU, 1, level="op")
    plan = Plan(2, 0.0, 0.0, patience=100.0, deadline=time.monotonic() + 50)
    contest = Contest(case, [("resfuse", setting)], plan, Terminal(), last_chance)
    with Crew(keep=True) as workers:
        if last_chance:
            (row,) = contest.hold(workers, lambda setting: None, records.current_conditions(CPU, 1))
            assert row.metric == LEFT_OUT
        else:
            with pytest.raises(OutOfTimeError):
                contest.hold(workers, lambda setting: None, records.current_conditions(CPU, 1))
    assert 0 < given[0] <= 50


def test_a_case_that_is_too_large_to_be_checked_is_left_out(
    local: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_room(*arguments: object, **options: object) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 100 GiB")

    monkeypatch.setattr(workload, "_compute", no_room)
    rows = measured(tmp_path, "op-inference", "--case", "add_relu stage 4", status=1)
    assert "add_relu stage 4 is left out: no room for the computation in float64" in capsys.readouterr().out
    assert {(row.provider, row.metric) for row in rows if row.level == "op"} == {
        (BASELINE, LEFT_OUT), ("resfuse", LEFT_OUT),
    }  # fmt: skip


@pytest.mark.usefixtures("unpriced")
def test_small_cases_share_their_processes(local: list[str], tmp_path: Path) -> None:
    measured(tmp_path, "op-inference", "--case", "add_relu stage")
    assert local == [BASELINE, "resfuse"]


def test_time_that_is_over_is_noticed() -> None:
    plan = Plan(rounds=2, warmup=1.0, turn=1.0)
    plan.check_time()
    assert plan.time_to_prepare(100) == float("inf")
    assert dataclasses.replace(plan, patience=3.0).time_to_prepare(0) == 3.0
    short = dataclasses.replace(plan, deadline=time.monotonic() + 20)
    assert short.time_to_prepare(0) <= 20 - 1.5 * 3
    assert short.time_to_prepare(9) < 0, "measuring the nine takes longer than there is"
    with pytest.raises(OutOfTimeError):
        dataclasses.replace(plan, deadline=time.monotonic() - 1).check_time()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--graph"], "--graph: expected a GPU, got device cpu"),
        (["--limit", "0"], "--limit: expected a number of seconds above 0, got 0"),
        (["--case", "no such"], "--case: no case has 'no such' in its name"),
        (["--model", "resnet19"], "resnet19"),
        (["--batch", "0"], "--batch: expected a whole number above 0, got '0'"),
    ],
)
def test_arguments_are_checked_first(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        run.main([*QUICK, *arguments, "--output", str(tmp_path)])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_a_machine_does_by_default() -> None:
    gpu, quick = presets.choose(False, "cuda"), presets.choose(True, "cuda")
    assert presets.batches(gpu, "model", "inference", "resnet50") == [1, 128]
    assert presets.batches(gpu, "model", "train", "cifar_resnet110") == [128]
    assert presets.batches(gpu, "layer", "train", "") == [128]
    assert presets.batches(quick, "model", "train", "cifar_resnet20") == [2]
    everyone, parts = presets.providers(gpu, "model"), presets.providers(gpu, "layer")
    assert set(everyone) - set(parts) == {"inductor_max_autotune"}
    assert set(everyone) <= set(PROVIDERS)
    assert presets.providers(quick, "op") == [BASELINE, "eager_channels_last", "resfuse"]
