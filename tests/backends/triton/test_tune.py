"""Configurations of the Triton convolutions: the heuristics' limits, tables, and `python -m resfuse tune`."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from resfuse.backends import dispatch
from resfuse.backends.triton import config, plan, tables
from resfuse.backends.triton.config import (
    A100,
    DTYPES,
    H100,
    KINDS,
    PRECISIONS,
    ConvConfig,
    ConvProblem,
    DeviceProperties,
    every_config,
    heuristic_config,
    ranked,
)
from resfuse.backends.triton.plan import chosen_config
from resfuse.cli import main, tune
from resfuse.cli.tune import Trial

SMALL = DeviceProperties("NVIDIA GeForce RTX 3060", (8, 6), 28, 101376)
LAYER = ConvProblem("forward", torch.bfloat16, 32, 28, 28, 128, 128, 3, 3, padding=(1, 1))


@pytest.fixture(autouse=True)
def _own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No table but those that a test writes."""
    monkeypatch.setenv("RESFUSE_TRITON_TABLES", str(tmp_path / "user"))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    plan.forget()
    yield
    plan.forget()


def install(
    configs: dict[ConvProblem, ConvConfig], device: DeviceProperties = H100, folder: Path | None = None
) -> Path:
    """Write a table to where it is looked for."""
    path = (folder or tables.user_folder()) / tables.file_name(device.name)
    tables.write(path, device.name, {problem: tables.Entry(config, 12.5) for problem, config in configs.items()})
    plan.forget()
    return path


OTHER = ranked(LAYER, H100)[-1]
"""A configuration that is allowed, and that the heuristics do not choose."""


# --- heuristics ------------------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> ConvProblem:
    groups = draw(st.sampled_from([1, 1, 1, 2, 32]))
    kernel = draw(st.sampled_from([1, 3, 5, 7]))
    size = st.integers(kernel, 64)
    return ConvProblem(
        draw(st.sampled_from(KINDS)), draw(st.sampled_from(DTYPES)), draw(st.integers(1, 512)), draw(size), draw(size),
        groups * draw(st.integers(1, 2048 // groups)), groups * draw(st.integers(1, 2048 // groups)), kernel, kernel,
        draw(st.sampled_from([(1, 1), (2, 2), (2, 1)])), (kernel // 2, kernel // 2), groups=groups,
        precision=draw(st.sampled_from(PRECISIONS)),
    )  # fmt: skip


@given(problem=problems(), device=st.sampled_from([A100, H100, SMALL]))
def test_heuristics_keep_within_limits(problem: ConvProblem, device: DeviceProperties) -> None:
    chosen = chosen_config(problem, device)
    assert min(chosen[:3]) >= 16
    powers_of_two = (*chosen[:3], chosen.num_warps, chosen.split_k)
    assert all(value.bit_count() == 1 for value in powers_of_two)
    assert chosen.shared_memory(problem) <= device.shared_memory
    assert chosen.block_n < 2 * max(16, problem.group_out), "wider than the channels, padded to a power of two"
    steps = chosen.steps(problem)
    assert (chosen.split_k - 1) * math.ceil(steps / chosen.split_k) < steps, "a part of split_k has nothing to do"
    assert not (problem.kind == "train" and chosen.split_k > 1), "batch statistics need whole sums"
    if problem.uses_tensor_cores:
        assert chosen.block_m >= 64, "wgmma has 64 rows"
    every = every_config(problem, device)
    assert chosen in every and len(set(every)) == len(every)
    assert ranked(problem, device)[0] == chosen
    assert set(ranked(problem, device)) == set(every)


def test_large_problems_get_large_tiles_and_small_ones_fill_the_gpu() -> None:
    def choice(n: int, size: int, c: int, k: int, kernel: int) -> tuple[ConvProblem, ConvConfig]:
        padding = (kernel // 2, kernel // 2)
        problem = ConvProblem("forward", torch.bfloat16, n, size, size, c, k, kernel, kernel, padding=padding)
        return problem, chosen_config(problem, H100)

    assert choice(256, 14, 256, 256, 3)[1].block_n == 128
    for arguments in ((1, 7, 512, 512, 3), (1, 7, 2048, 512, 1), (1, 14, 1024, 256, 1)):
        problem, chosen = choice(*arguments)
        assert math.prod(chosen.tiles(problem)) * chosen.split_k >= H100.num_sms / 2
    assert choice(1, 7, 2048, 512, 1)[1].split_k > 1


def test_gemm_sizes() -> None:
    assert LAYER._replace(n=2, h=9, w=7, c=6, k=10, stride=(2, 2), groups=2).gemm == (40, 5, 27)


def test_forced_configurations() -> None:
    def current(kind: config.Kind = "forward") -> ConvConfig:
        x, w = (
            torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((32, 128, 28, 28), (128, 128, 3, 3))
        )
        return plan.conv_plan(kind, x, w, plan.Convolution((1, 1), (1, 1), (1, 1), 1), H100).config

    usual, trained = current(), current("train")
    with plan.forced("forward", OTHER):
        assert current() == OTHER
        with plan.forced("forward", usual):
            assert current() == usual
        assert (current(), current("train")) == (OTHER, trained)
    assert current() == usual != OTHER


# --- tables ----------------------------------------------------------------------------------------------------------


def test_exact_shape_before_the_nearest(caplog: pytest.LogCaptureFixture) -> None:
    second = ranked(LAYER, H100)[1]
    assert chosen_config(LAYER, H100) == heuristic_config(LAYER, H100), "without a table"
    install({LAYER._replace(n=33): second, LAYER: OTHER, LAYER._replace(n=100): second})
    assert chosen_config(LAYER, H100) == OTHER
    assert chosen_config(LAYER._replace(precision="tf32"), H100) == OTHER, "bfloat16 has no precision"
    assert chosen_config(LAYER._replace(n=31), H100) == OTHER
    assert chosen_config(LAYER._replace(n=90), H100) == second
    assert not caplog.records


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 512, "h": 112}, {"kind": "train"}, {"dtype": torch.float16}, {"r": 1, "s": 1, "padding": (0, 0)},
        {"stride": (2, 2)}, {"dilation": (2, 2)}, {"groups": 2}, {"precision": "tf32"},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_far_shapes_and_other_families_do_not_count(changes: dict[str, object]) -> None:
    layer = LAYER._replace(dtype=torch.float32) if "precision" in changes else LAYER
    other = layer._replace(**changes)  # type: ignore[arg-type]
    install({other: ranked(other, H100)[-1]})
    assert chosen_config(layer, H100) == heuristic_config(layer, H100)
    assert chosen_config(other, H100) == ranked(other, H100)[-1]


def test_configurations_that_do_not_fit_the_problem_are_passed_over() -> None:
    split = next(candidate for candidate in ranked(LAYER, H100) if candidate.split_k == 2)
    shallow = LAYER._replace(c=32)
    install({LAYER: OTHER._replace(block_n=512), LAYER._replace(c=64): split})
    assert chosen_config(LAYER, H100) == split
    assert chosen_config(shallow, H100) == heuristic_config(shallow, H100)


def test_users_table_comes_before_the_shipped_one() -> None:
    shipped, own = ranked(LAYER, H100)[1:3]
    install({LAYER: shipped}, folder=tables.SHIPPED)
    assert chosen_config(LAYER, H100) == shipped
    install({LAYER: own})
    assert chosen_config(LAYER, H100) == own


def test_tables_are_for_one_device(caplog: pytest.LogCaptureFixture) -> None:
    path = install({LAYER: OTHER})
    assert chosen_config(LAYER, A100) == heuristic_config(LAYER, A100)
    assert not caplog.records
    path.rename(path.with_name(tables.file_name(A100.name)))
    plan.forget()
    assert chosen_config(LAYER, A100) == heuristic_config(LAYER, A100)
    assert f"a table for {H100.name}, not for {A100.name}" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text(path.read_text()[:-9]),
        lambda path: path.write_bytes(b"\xff\xfe"),
        lambda path: path.write_text("[]"),
        lambda path: (path.unlink(), path.mkdir()),
        ('"version": 1', '"version": 2'),
        ('"entries": [', '"entries": {}, "others": ['),
        ('"entries": [', '"entries": [[], '),
        ("12.5", '"fast"'),
        ('"forward"', '"sideways"'),
        ('"bfloat16"', '"nn"'),
        ('"stride": [1, 1]', '"stride": [1]'),
        ('"stride": [1, 1]', '"stride": [0, 1]'),
        ('"groups": 1', '"groups": 3'),
        ('"h": 28', '"h": 0'),
        ('"n": 32', '"n": 1.5'),
        ('"n": 32', '"n": 32, "color": "red"'),
        ('"num_warps"', '"warps"'),
    ],
)
def test_malformed_tables_are_a_warning(
    damage: Callable[[Path], object] | tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    path = install({LAYER: OTHER})
    if isinstance(damage, tuple):
        assert damage[0] in path.read_text()
        path.write_text(path.read_text().replace(*damage))
    else:
        damage(path)
    plan.forget()
    assert chosen_config(LAYER, H100) == heuristic_config(LAYER, H100)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"{path} is not used: " in caplog.text
    chosen_config(LAYER._replace(n=1), H100)
    assert len(caplog.records) == 1, "one warning per file"


def test_where_tables_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tables.user_folder() == tmp_path / "user"
    monkeypatch.delenv("RESFUSE_TRITON_TABLES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert tables.user_folder() == tmp_path / "cache" / "resfuse" / "triton"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tables.user_folder() == tmp_path / ".cache" / "resfuse" / "triton"
    assert tables.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"


def test_writing_is_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    path = install({LAYER: OTHER})
    before = path.read_text()

    def interrupted(*paths: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tables.write(path, H100.name, {})
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path], "nothing is left behind"


def test_tables_are_read_as_they_were_written(tmp_path: Path) -> None:
    entries = {LAYER._replace(kind=kind, dtype=dtype): tables.Entry(OTHER, 1.5) for kind in KINDS for dtype in DTYPES}
    tables.write(tmp_path / "new" / "table.json", H100.name, entries)
    assert tables.read(tmp_path / "new" / "table.json", H100.name) == entries


# --- python -m resfuse tune ------------------------------------------------------------------------------------------


def test_layers_of_networks() -> None:
    found = tune.layer_problems("cifar_resnet", [4], torch.float16, ["forward"])
    assert len(found) == 8
    assert found[0]._replace(precision="ieee") == ConvProblem(
        "forward", torch.float16, 4, 32, 32, 3, 16, 3, 3, padding=(1, 1)
    )
    pytest.importorskip("torchvision")
    found = tune.layer_problems("resnet18", [1, 2], torch.bfloat16, ["train"], size=64)
    assert len(found) == 2 * 11
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
    assert "16 problems, " in printed
    assert "forward 8x32x32x16 > 32, 3x3 /2 bfloat16" in printed
    assert not tables.user_folder().exists()
    pytest.importorskip("torchvision")
    assert main(["tune", "--dry-run", "--model", "resnet51"]) == 2
    assert "resnet51" in capsys.readouterr().out
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["tune", "--dry-run"]) == 2
    assert "tune needs Triton" in capsys.readouterr().out


class Trials:
    """In place of trials on a GPU: times that follow from the configuration, and configurations that fail."""

    bad: Collection[ConvConfig] = ()
    interrupted_at: ConvProblem | None = None

    def __init__(self) -> None:
        self.tried: list[ConvProblem] = []

    def __call__(self, problem: ConvProblem, device: object = None) -> Any:
        if problem == self.interrupted_at:
            raise KeyboardInterrupt
        self.tried.append(problem)
        return self

    def attempt(self, candidate: ConvConfig) -> float:
        if candidate in self.bad:
            raise ArithmeticError("wrong")
        return 1000.0 / candidate.block_m + candidate.num_stages

    def tune(self, problems: list[ConvProblem], path: Path) -> list[tune.Outcome]:
        outcomes: list[tune.Outcome] = []
        entries = tables.read(path, H100.name) if path.exists() else {}
        tune.tune(problems, H100, path, entries, self, 8, Console(quiet=True), outcomes.append)
        return outcomes


def test_the_fastest_correct_candidate_wins_and_is_used() -> None:
    trials, path = Trials(), tables.user_folder() / tables.file_name(H100.name)
    fastest = sorted(ranked(LAYER, H100)[:8], key=trials.attempt)
    trials.bad = set(fastest[:2])
    (outcome,) = trials.tune([LAYER, LAYER], path)
    assert outcome.best is not None and outcome.best.config == fastest[2]
    assert len(outcome.failures) == 2
    assert chosen_config(LAYER, H100) == fastest[2], "from the table that was written"
    assert outcome.heuristic is None or outcome.heuristic >= outcome.best.microseconds


def test_tuning_continues_where_it_stopped(tmp_path: Path) -> None:
    trials, path = Trials(), tmp_path / "table.json"
    problems = [LAYER, LAYER._replace(kind="train"), LAYER._replace(n=1)]
    with patch.object(trials, "interrupted_at", problems[2]), pytest.raises(KeyboardInterrupt):
        trials.tune(problems, path)
    assert list(tables.read(path, H100.name)) == problems[:2]
    assert [outcome.problem for outcome in trials.tune(problems, path)] == problems[2:]
    assert trials.tried == problems
    assert list(tables.read(path, H100.name)) == problems


def test_problems_that_no_candidate_solves_are_not_written(tmp_path: Path) -> None:
    trials = Trials()
    trials.bad = set(every_config(LAYER, H100))
    (outcome,) = trials.tune([LAYER], tmp_path / "table.json")
    assert outcome.best is None and outcome.heuristic is None
    assert len(outcome.failures) == 8
    assert not (tmp_path / "table.json").exists()


def test_the_whole_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With the GPU, its clock and its kernels stubbed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(config, "cuda_properties", lambda device: H100)
    monkeypatch.setattr(dispatch.backend("triton"), "unavailable_reason", lambda: None)
    monkeypatch.setattr(tune, "Trial", Trials())
    monkeypatch.setenv("COLUMNS", "120")
    command = ["tune", "--model", "cifar_resnet", "--batch", "4", "--kind", "forward", "--candidates", "3"]
    path = tables.user_folder() / tables.file_name(H100.name)

    def printed() -> str:
        return " ".join(capsys.readouterr().out.split())

    assert main(command) == 0
    assert len(tables.read(path, H100.name)) == 8
    assert "8 of 8 problems measured" in printed()
    assert main(command) == 0
    assert "0 of 8 problems measured" in printed()
    for foreign in ("mine", json.dumps({"version": 1, "device": A100.name, "entries": []})):
        path.write_text(foreign)
        assert main(command) == 2
        assert "is not overwritten" in printed()
        assert path.read_text() == foreign


# --- the trials, by the kernels themselves ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_trials_are_held_against_float64(
    kind: config.Kind, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = dispatch.backend("triton").unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    problem = ConvProblem(kind, dtype, 2, 6, 6, 8, 16, 3, 3, (2, 2), (1, 1))
    trial = Trial(problem, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    timed: list[Callable[[], object]] = []
    monkeypatch.setattr(tune, "gpu_time", lambda call: timed.append(call) or 3.0)
    candidates = ranked(plan.tile_problem(problem), H100)
    for candidate in (candidates[0], next((c for c in candidates if c.split_k > 1), candidates[-1])):
        assert trial.attempt(candidate) == 3.0
    assert len(timed) == 2
    trial.exact[0, 0, 0, 0] += 1.0
    with pytest.raises(ArithmeticError, match="is wrong by"):
        trial.attempt(candidates[0])
    monkeypatch.setattr(trial, "run", lambda candidate: torch.full_like(trial.exact, math.nan))
    with pytest.raises(ArithmeticError, match="is wrong by inf"):
        trial.attempt(candidates[0])
    assert len(timed) == 2, "a wrong result was timed"
