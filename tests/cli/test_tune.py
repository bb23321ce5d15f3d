"""`python -m resfuse tune`: what it measures, what it leaves out, and the table that dispatch then chooses by."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from rich.console import Console
from torch import Tensor

from resfuse.backends import cuda, dispatch, first_contact, measured, reference, sm90, triton
from resfuse.backends.triton import config, plan
from resfuse.backends.triton.config import A100, DTYPES, H100, KINDS, ConvConfig, ConvProblem, every_config, ranked
from resfuse.backends.triton.plan import chosen_config
from resfuse.cli import main, tune
from resfuse.cli.tune import Trial
from resfuse.types import AbsentDevice, Convolution, Problem

LAYER = ConvProblem("forward", torch.bfloat16, 32, 28, 28, 128, 128, 3, 3, padding=(1, 1))
SMALL = ConvProblem("forward", torch.float32, 2, 6, 6, 8, 16, 3, 3, (2, 2), (1, 1))
CPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(triton.unavailable_reason() is not None, reason="Triton cannot be used")


@pytest.fixture(autouse=True)
def _own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No table but those that a test writes."""
    monkeypatch.setenv("RESFUSE_TABLES", str(tmp_path / "user"))
    monkeypatch.setattr(measured, "SHIPPED", tmp_path / "shipped")
    plan.forget()
    dispatch.forget_choices()
    yield
    plan.forget()
    dispatch.forget_choices()


# --- problems --------------------------------------------------------------------------------------------------------


def test_layers_of_networks() -> None:
    found = tune.layer_problems("cifar_resnet", [4], torch.float16, ["forward"])
    assert len(found) == 9
    stem = ConvProblem("forward", torch.float16, 4, 32, 32, 3, 16, 3, 3, padding=(1, 1))
    assert found[0]._replace(precision="ieee") == stem
    first, second = (problem for problem in found if (problem.h, problem.c, problem.k) == (32, 16, 16))
    assert second == first._replace(residual=True), "of a block"
    pytest.importorskip("torchvision")
    found = tune.layer_problems("resnet18", [1, 2], torch.bfloat16, ["train"], size=64)
    assert len(found) == 2 * 15 and {problem.kind for problem in found} == {"train"}
    assert found[0].stride == (2, 2) and found[0].padding == (3, 3) and (found[0].h, found[0].c) == (64, 3)
    grouped = tune.layer_problems("resnext50_32x4d", [1], torch.bfloat16, ["forward"])
    assert {problem.groups for problem in grouped} == {1, 32}


def test_tune_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["tune"]) == tune.CANNOT_RUN == 2
    assert "tune needs a GPU: torch sees no CUDA GPU" in capsys.readouterr().out
    arguments = ["--model", "cifar_resnet", "--batch", "2", "8", "--kind", "forward", "--candidates", "5"]
    assert main(["tune", "--dry-run", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "18 problems, " in printed
    assert "forward 8x32x32x16 > 32, 3x3 /2 bfloat16" in printed
    assert not measured.user_folder().exists()
    pytest.importorskip("torchvision")
    assert main(["tune", "--dry-run", "--model", "resnet51"]) == 2
    assert "resnet51" in capsys.readouterr().out
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["tune", "--dry-run"]) == 2
    assert "tune needs Triton" in capsys.readouterr().out


# --- measurements, with stand-ins for the trials ---------------------------------------------------------------------


class Trials:
    """In place of trials on a GPU: times by backend, of triton by configuration, and what fails."""

    bad: Collection[str | ConvConfig] = ()
    interrupted_at: ConvProblem | None = None

    def __init__(self) -> None:
        self.tried: list[ConvProblem] = []

    def __call__(self, problem: ConvProblem, device: object = None) -> Any:
        if problem == self.interrupted_at:
            raise KeyboardInterrupt
        self.tried.append(problem)
        return self

    def attempt(self, engine: str, candidate: ConvConfig | None) -> float:
        if engine in self.bad or candidate in self.bad:
            raise ArithmeticError("it is wrong\nand so on")
        if candidate is not None:
            return 1000.0 / candidate.block_m + candidate.num_stages
        return {"cuda": 30.0, "sm90": 20.0, "cudnn": 25.00049, "reference": 40.0}[engine]

    def tune(self, problems: list[ConvProblem], path: Path) -> list[tune.Outcome]:
        outcomes: list[tune.Outcome] = []
        entries = measured.read(path, H100.name).entries if path.exists() else {}
        tune.tune(problems, H100, CPU, path, entries, self, 8, Console(quiet=True), outcomes.append)
        return outcomes


def test_every_backend_is_timed_and_the_fastest_is_used() -> None:
    trials, path = Trials(), measured.user_folder() / measured.file_name(H100.name)
    fastest = sorted(ranked(LAYER, H100)[:8], key=lambda candidate: trials.attempt("triton", candidate))
    trials.bad = {"sm90", *fastest[:2]}
    shapes = torch.Size((32, 128, 28, 28)), torch.Size((128, 128, 3, 3))
    device, convolution = AbsentDevice(H100.capability, name=H100.name), Convolution(*LAYER[9:12], 1)
    asked = Problem("conv_bn_act_forward", device, torch.bfloat16, *shapes, convolution)
    assert dispatch.choose(asked, None).measured is None
    (outcome,) = trials.tune([LAYER, LAYER._replace(precision="tf32")], path)
    best = trials.attempt("triton", fastest[2])
    times = {"cuda": 30.0, "cudnn": 25.0, "reference": 40.0, "triton": round(best, 3)}
    assert outcome.entry == measured.Entry(times, {"sm90": "it is wrong"}, fastest[2])
    assert sorted(outcome.failures) == ["sm90: it is wrong", *2 * ["triton: it is wrong"]]
    assert outcome.heuristic is None or outcome.heuristic >= best
    assert measured.read(path, H100.name).entries == {LAYER: outcome.entry}
    assert chosen_config(LAYER, H100) == fastest[2]
    chosen = dispatch.choose(asked, None)
    assert chosen.name == min(times, key=times.__getitem__) and f"measured on {H100.name}: " in str(chosen.measured)


def test_tuning_continues_where_it_stopped(tmp_path: Path) -> None:
    trials, path = Trials(), tmp_path / "table.json"
    problems = [LAYER, LAYER._replace(kind="train"), LAYER._replace(n=1)]
    with patch.object(trials, "interrupted_at", problems[2]), pytest.raises(KeyboardInterrupt):
        trials.tune(problems, path)
    assert list(measured.read(path, H100.name).entries) == problems[:2]
    assert [outcome.problem for outcome in trials.tune(problems, path)] == problems[2:]
    assert trials.tried == problems
    assert list(measured.read(path, H100.name).entries) == problems


def test_what_a_new_library_could_run_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials, path = Trials(), tmp_path / "table.json"
    with patch.object(tune, "ENGINES", tuple(engine for engine in tune.ENGINES if engine != "sm90")):
        trials.tune([LAYER], path)
    monkeypatch.setattr(dispatch, "reasons_against", lambda engine, problem, automatic: ("it was not built",))
    assert trials.tune([LAYER], path) == []
    monkeypatch.setattr(dispatch, "reasons_against", lambda engine, problem, automatic: ())
    (outcome,) = trials.tune([LAYER], path)
    assert "sm90" in outcome.entry.microseconds
    assert trials.tune([LAYER], path) == []


def test_problems_that_eager_does_not_solve_are_not_written(tmp_path: Path) -> None:
    trials = Trials()
    trials.bad = set(every_config(LAYER, H100))
    (outcome,) = trials.tune([LAYER], tmp_path / "table.json")
    assert outcome.entry.config is None and outcome.heuristic is None
    assert outcome.entry.left_out == {"triton": "it is wrong"} and len(outcome.failures) == 8
    trials.bad = {"reference"}
    (outcome,) = trials.tune([LAYER], tmp_path / "other.json")
    assert set(outcome.entry.microseconds) == {"cuda", "sm90", "triton", "cudnn"}
    assert not (tmp_path / "other.json").exists()
    assert [engine for engine, _ in tune._attempts(LAYER, H100, 1)][-1] == "reference", "after what may ruin it"


def test_the_whole_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With the GPU, its clock and its kernels stubbed."""
    trials = Trials()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(config, "cuda_properties", lambda device: H100)
    monkeypatch.setattr(tune, "Trial", trials)
    monkeypatch.setenv("COLUMNS", "140")
    command = ["tune", "--model", "cifar_resnet", "--batch", "4", "--kind", "forward", "--candidates", "3"]
    path = measured.user_folder() / measured.file_name(H100.name)

    def printed() -> str:
        return " ".join(capsys.readouterr().out.split())

    trials.bad = {"cuda"}
    assert main(command) == 0
    assert len(measured.read(path, H100.name).entries) == 9
    output = printed()
    assert "9 of 9 problems measured, 0 were known" in output and "9 x left out: cuda: it is wrong" in output
    assert "┃ problem ┃ cuda ┃ triton ┃ sm90 ┃ cudnn ┃ reference ┃ triton as ┃ heuristic ┃" in output
    assert "│ forward 4x32x32x3 > 16, 3x3 bfloat16 │ - │ 9.8 │ 20.0 │ 25.0 │ 40.0 │ 128x16x16/4/2 │ 17.6 │" in output
    assert main(command) == 0
    assert "0 of 9 problems measured, 9 were known" in printed()
    path.write_text(path.read_text().replace(torch.__version__, "1.13.0"))
    assert main(command) == 0
    output = printed()
    assert "is begun anew: measured with torch 1.13.0, not" in output and "9 of 9 problems measured" in output
    assert measured.read(path, H100.name).outdated() is None
    for foreign in ("mine", json.dumps({"version": 2, "device": A100.name, "entries": []})):
        path.write_text(foreign)
        assert main(command) == 2
        assert "is not overwritten" in printed()
        assert path.read_text() == foreign
    trials.bad = {"reference"}
    assert main([*command, "--output", str(path.parent / "other")]) == 1
    assert "0 of 9 problems measured, 0 were known" in printed() and not (path.parent / "other").exists()


# --- the trials, by the backends themselves --------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """What was timed, with a clock of which each measurement takes 3 us less than the one before it."""
    calls: list[Callable[[], object]] = []
    monkeypatch.setattr(tune, "gpu_time", lambda call: calls.append(call) or 100.0 - 3 * len(calls))
    monkeypatch.setattr(triton, "only_on_request_reason", lambda: None)  # that is the interpreter
    return calls


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_trials_are_held_against_float64(
    kind: config.Kind, dtype: torch.dtype, timed: list[Callable[[], object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = SMALL._replace(kind=kind, dtype=dtype, residual=kind == "forward")
    trial = Trial(problem, CPU)
    candidates = ranked(plan.tile_problem(problem), H100)
    for candidate in (candidates[0], next((c for c in candidates if c.split_k > 1), candidates[-1])):
        trial.attempt("triton", candidate)
    trial.attempt("cudnn", None)
    trial.attempt("reference", None)
    assert len(timed) == 4
    trial.exact[0, 0, 0, 0] += 1.0
    for engine in ("triton", "reference"):
        with pytest.raises(ArithmeticError, match="is wrong by"):
            trial.attempt(engine, None)
    monkeypatch.setattr(trial, "run", lambda engine, candidate: torch.full_like(trial.exact, math.nan))
    with pytest.raises(ArithmeticError, match=r"triton is wrong by inf on .*, 3x3 /2"):
        trial.attempt("triton", None)
    assert len(timed) == 4, "a wrong result was timed"


@needs_triton
def test_real_backends_end_to_end(
    timed: list[Callable[[], object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is wrong and one that raises are planted for the two that need a GPU."""

    def wrong(input: Tensor, *args: Any) -> Any:
        output, *rest = reference.conv_bn_act_forward(input, *args)
        output[1, 2, 1, 1] += 1.0
        return output, *rest

    def raising(*args: Any) -> Any:
        raise RuntimeError("planted: no kernel image")

    for module, planted in ((cuda, wrong), (sm90, raising)):
        monkeypatch.setattr(module, "unavailable_reason", lambda: None)
        monkeypatch.setattr(module, "unsupported_reasons", lambda problem: [] if problem.convolution else ["no"])
        monkeypatch.setattr(module, "conv_bn_act_forward", planted)
    problem, outcomes = SMALL._replace(residual=True), list[tune.Outcome]()

    def run(path: Path) -> measured.Entry:
        tune.tune([problem], H100, CPU, path, {}, lambda one: Trial(one, CPU), 2, Console(quiet=True), outcomes.append)
        return measured.read(path, H100.name).entries[problem]

    entry = run(tmp_path / "table.json")
    assert entry.microseconds == {"triton": 94.0, "cudnn": 91.0, "reference": 88.0}
    assert entry.config == ranked(plan.tile_problem(problem), H100)[1], "the second of two, and the faster one"
    assert entry.left_out["sm90"] == "planted: no kernel image" and "cuda is wrong by" in entry.left_out["cuda"]
    monkeypatch.setattr(first_contact, "objection", lambda name, asked: "it failed" if name == "triton" else None)
    entry = run(tmp_path / "other.json")
    assert set(entry.left_out) == {"cuda", "sm90"} and set(entry.microseconds) == {"cudnn", "reference"}
    assert "triton: it failed" in outcomes[-1].failures, "shown, but it says nothing about its speed"
    assert len(timed) == 6
