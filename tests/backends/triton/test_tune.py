"""Configurations of the Triton convolutions: the heuristics' limits, tables, and `python -m resfuse tune`."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from resfuse.backends.triton import configs, heuristics, tuning
from resfuse.backends.triton.problems import DTYPES, KINDS, PRECISIONS, ConvConfig, ConvProblem
from resfuse.cli import main, tune, tune_layers
from resfuse.cli.tune_trials import Measure, Trial

pytest.importorskip("triton")
from resfuse.backends.triton import launch
from resfuse.backends.triton.launch import A100, H100, DeviceProperties

SMALL = DeviceProperties("NVIDIA GeForce RTX 3060", (8, 6), 28, 101376)
LAYER = ConvProblem("forward", torch.bfloat16, 32, 28, 28, 128, 128, 3, 3, padding=(1, 1))


@pytest.fixture(autouse=True)
def _own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No table but those that a test writes."""
    monkeypatch.setenv("RESFUSE_TRITON_TABLES", str(tmp_path / "user"))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    configs.forget()
    yield
    configs.forget()


def other_config(problem: ConvProblem, device: DeviceProperties = H100) -> ConvConfig:
    """A configuration that is allowed, and not the one that heuristics choose."""
    return configs.ranked(problem, device)[-1]


def install(
    entries: dict[ConvProblem, ConvConfig], device: DeviceProperties = H100, folder: Path | None = None
) -> Path:
    """Write a table to where it is looked for."""
    path = (folder or tuning.user_folder()) / tuning.file_name(device.name)
    table = tuning.Table(device.name, "3.6.0", {key: tuning.Entry(value, 12.5) for key, value in entries.items()})
    tuning.write(path, table)
    configs.forget()
    return path


# --- heuristics ------------------------------------------------------------------------------------------------------


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


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
    config = configs.conv_config(problem, device)
    blocks = (config.block_m, config.block_n, config.block_k)
    assert all(is_power_of_two(block) and block >= 16 for block in blocks)
    assert is_power_of_two(config.num_warps) and is_power_of_two(config.split_k)
    assert heuristics.shared_memory(problem, config) <= device.shared_memory
    channels = problem.group_out if problem.kind in ("forward", "train") else problem.group_in
    assert config.block_n < 2 * max(16, channels), "wider than the channels, padded to a power of two"
    steps = heuristics.split_steps(problem, config)
    assert (config.split_k - 1) * math.ceil(steps / config.split_k) < steps, "a part of split_k has nothing to do"
    assert not (problem.kind == "train" and config.split_k > 1), "batch statistics need whole sums"
    if problem.uses_tensor_cores:
        assert config.block_m >= 64, "wgmma has 64 rows"
    every = configs.every_config(problem, device)
    assert config in every
    assert len(set(every)) == len(every)
    assert configs.ranked(problem, device)[0] == config
    assert set(configs.ranked(problem, device)) == set(every)


def test_large_problems_get_large_tiles_and_small_ones_fill_the_gpu() -> None:
    def choice(n: int, size: int, c: int, k: int, kernel: int) -> tuple[ConvProblem, ConvConfig]:
        padding = (kernel // 2, kernel // 2)
        problem = ConvProblem("forward", torch.bfloat16, n, size, size, c, k, kernel, kernel, padding=padding)
        return problem, configs.conv_config(problem, H100)

    assert choice(256, 14, 256, 256, 3)[1].block_n == 128
    for arguments in ((1, 7, 512, 512, 3), (1, 7, 2048, 512, 1), (1, 14, 1024, 256, 1)):
        problem, config = choice(*arguments)
        assert heuristics.tiles(problem, config) * config.split_k >= H100.num_sms / 2
    assert choice(1, 7, 2048, 512, 1)[1].split_k > 1


def test_gemm_sizes() -> None:
    problem = dataclasses.replace(LAYER, n=2, h=9, w=7, c=6, k=10, stride=(2, 2), groups=2)
    sizes = {
        kind: (p.gemm_m, p.gemm_n, p.gemm_k)
        for kind in KINDS
        for p in [dataclasses.replace(problem, kind=kind)]
    }  # fmt: skip
    assert sizes == {
        "forward": (40, 5, 27), "train": (40, 5, 27), "dgrad": (126, 3, 45), "wgrad": (5, 27, 40),
    }  # fmt: skip


def test_forced_configurations() -> None:
    usual, forced = configs.conv_config(LAYER, H100), other_config(LAYER)
    with configs.forced("forward", forced):
        assert configs.conv_config(LAYER, H100) == forced
        with configs.forced("forward", usual):
            assert configs.conv_config(LAYER, H100) == usual
        assert configs.conv_config(LAYER, H100) == forced
        assert configs.conv_config(dataclasses.replace(LAYER, kind="dgrad"), H100) != forced
    assert configs.conv_config(LAYER, H100) == usual != forced


# --- tables ----------------------------------------------------------------------------------------------------------


def test_no_table_is_no_trouble(caplog: pytest.LogCaptureFixture) -> None:
    assert configs.conv_config(LAYER, H100) == heuristics.heuristic_config(LAYER, H100)
    assert not caplog.records


def test_exact_shape(caplog: pytest.LogCaptureFixture) -> None:
    near = dataclasses.replace(LAYER, n=33)
    install({near: configs.ranked(near, H100)[1], LAYER: other_config(LAYER)})
    assert configs.conv_config(LAYER, H100) == other_config(LAYER)
    tf32 = dataclasses.replace(LAYER, precision="tf32")
    assert configs.conv_config(tf32, H100) == other_config(LAYER), "bfloat16 has no precision"
    assert not caplog.records


def test_nearest_shape_of_the_family() -> None:
    wanted, farther = other_config(LAYER), configs.ranked(LAYER, H100)[1]
    install({dataclasses.replace(LAYER, n=8): farther, dataclasses.replace(LAYER, n=24): wanted})
    assert configs.conv_config(LAYER, H100) == wanted


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 512, "h": 112}, {"kind": "dgrad"}, {"dtype": torch.float16}, {"r": 1, "s": 1, "padding": (0, 0)},
        {"stride": (2, 2)}, {"dilation": (2, 2)}, {"groups": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_far_shapes_and_other_families_do_not_count(changes: dict[str, object]) -> None:
    other = dataclasses.replace(LAYER, **changes)  # type: ignore[arg-type]
    install({other: other_config(other)})
    assert configs.conv_config(LAYER, H100) == heuristics.heuristic_config(LAYER, H100)


def test_precisions_of_float32_are_families() -> None:
    ieee = dataclasses.replace(LAYER, dtype=torch.float32)
    install({ieee: other_config(ieee)})
    assert configs.conv_config(ieee, H100) == other_config(ieee)
    tf32 = dataclasses.replace(ieee, precision="tf32")
    assert configs.conv_config(tf32, H100) == heuristics.heuristic_config(tf32, H100)


def test_configurations_that_do_not_fit_the_problem_are_passed_over() -> None:
    beyond = dataclasses.replace(other_config(LAYER), block_n=512)
    split = next(config for config in configs.ranked(LAYER, H100) if config.split_k == 2)
    shallow = dataclasses.replace(LAYER, c=32)
    install({LAYER: beyond, dataclasses.replace(LAYER, c=64): split})
    assert configs.conv_config(LAYER, H100) == split
    assert configs.conv_config(shallow, H100) == heuristics.heuristic_config(shallow, H100)


def test_users_table_comes_before_the_shipped_one() -> None:
    shipped, own = configs.ranked(LAYER, H100)[1:3]
    path = install({LAYER: shipped}, folder=tuning.SHIPPED)
    assert configs.conv_config(LAYER, H100) == shipped
    install({LAYER: own})
    assert configs.conv_config(LAYER, H100) == own
    path.unlink()


def test_tables_are_of_one_device(caplog: pytest.LogCaptureFixture) -> None:
    path = install({LAYER: other_config(LAYER)})
    assert configs.conv_config(LAYER, A100) == heuristics.heuristic_config(LAYER, A100)
    assert not caplog.records
    path.rename(path.with_name(tuning.file_name(A100.name)))
    configs.forget()
    assert configs.conv_config(LAYER, A100) == heuristics.heuristic_config(LAYER, A100)
    assert f"it is of {H100.name}, not of {A100.name}" in caplog.text


def _change(path: Path, *keys: str | int, value: object) -> None:
    content = json.loads(path.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text(path.read_text()[:-9]),
        lambda path: path.write_bytes(b"\xff\xfe"),
        lambda path: path.write_text("[]"),
        lambda path: _change(path, "version", value=2),
        lambda path: _change(path, "entries", value={}),
        lambda path: _change(path, "entries", 0, value=[]),
        lambda path: _change(path, "entries", 0, "microseconds", value="fast"),
        lambda path: _change(path, "entries", 0, "problem", "kind", value="sideways"),
        lambda path: _change(path, "entries", 0, "problem", "dtype", value="nn"),
        lambda path: _change(path, "entries", 0, "problem", "dtype", value=3),
        lambda path: _change(path, "entries", 0, "problem", "stride", value=[1]),
        lambda path: _change(path, "entries", 0, "problem", "stride", value=[0, 1]),
        lambda path: _change(path, "entries", 0, "problem", "groups", value=3),
        lambda path: _change(path, "entries", 0, "problem", "h", value=0),
        lambda path: _change(path, "entries", 0, "problem", "n", value=1.5),
        lambda path: _change(path, "entries", 0, "problem", "color", value="red"),
        lambda path: _change(path, "entries", 0, "config", "block_m", value=True),
        lambda path: _change(path, "entries", 0, "config", "num_stages", value=-1),
        lambda path: _change(path, "entries", 0, "config", value={"block_m": 64}),
    ],
)
def test_malformed_tables_are_a_warning(damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture) -> None:
    path = install({LAYER: other_config(LAYER)})
    damage(path)
    configs.forget()
    assert configs.conv_config(LAYER, H100) == heuristics.heuristic_config(LAYER, H100)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"{path} is not used: " in caplog.text
    configs.conv_config(dataclasses.replace(LAYER, n=1), H100)
    assert len(caplog.records) == 1, "one warning per file"


def test_unreadable_table_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    (tuning.user_folder() / tuning.file_name(H100.name)).mkdir(parents=True)
    assert configs.conv_config(LAYER, H100) == heuristics.heuristic_config(LAYER, H100)
    assert "is not used" in caplog.text


def test_where_tables_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tuning.user_folder() == tmp_path / "user"
    monkeypatch.delenv("RESFUSE_TRITON_TABLES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert tuning.user_folder() == tmp_path / "cache" / "resfuse" / "triton"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.user_folder() == tmp_path / ".cache" / "resfuse" / "triton"
    assert tuning.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"


def test_writing_is_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    path = install({LAYER: other_config(LAYER)})
    before = path.read_text()

    def interrupted(*paths: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuning.write(path, tuning.Table(H100.name, "3.6.0"))
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path], "nothing is left behind"


def test_tables_are_read_as_they_were_written(tmp_path: Path) -> None:
    entries = {
        dataclasses.replace(LAYER, kind=kind, dtype=dtype): tuning.Entry(other_config(LAYER), 1.5)
        for kind in KINDS
        for dtype in DTYPES
    }
    table = tuning.Table(H100.name, "3.6.0", entries)
    tuning.write(tmp_path / "new" / "table.json", table)
    assert tuning.read(tmp_path / "new" / "table.json") == table


# --- python -m resfuse tune ------------------------------------------------------------------------------------------


def test_layers_of_networks() -> None:
    found = tune_layers.layer_problems("cifar_resnet", [4], torch.float16, kinds=["forward", "dgrad"])
    assert len(found) == 8 + 7, "the images need no gradient"
    assert found[0] == ConvProblem("forward", torch.float16, 4, 32, 32, 3, 16, 3, 3, padding=(1, 1))
    pytest.importorskip("torchvision")
    found = tune_layers.layer_problems("resnet18", [1, 2], torch.bfloat16, kinds=["wgrad"], size=64)
    assert len(found) == 2 * 11
    assert found[0].stride == (2, 2) and found[0].padding == (3, 3) and (found[0].h, found[0].c) == (64, 3)
    grouped = tune_layers.layer_problems("resnext50_32x4d", [1], torch.bfloat16, kinds=["forward"])
    assert {problem.groups for problem in grouped} == {1, 32}


def test_tune_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == tune.CANNOT_RUN == 2
    assert "tune needs a GPU: torch sees no CUDA GPU" in capsys.readouterr().out


def test_commands_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None  # `import triton` raises ImportError
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name == "triton" else find_spec(name, *args)
from resfuse.cli import main
print(main(["tune"]), main(["tune", "--dry-run"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("2 2\n")
    assert "tune needs Triton" in done.stdout


def test_dry_run_lists_problems(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "120")
    arguments = ["--model", "cifar_resnet", "--batch", "2", "8", "--kind", "forward", "wgrad", "--candidates", "5"]
    assert main(["tune", "--dry-run", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "32 problems, " in printed
    assert "forward 8x32x32x16 > 32, 3x3 /2 bfloat16" in printed
    assert not tuning.user_folder().exists()


def test_unknown_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    assert main(["tune", "--dry-run", "--model", "resnet51"]) == 2
    assert "resnet51" in capsys.readouterr().out


class Bench:
    """Stands for a GPU: knows how long each configuration takes, which are wrong, and which do not run."""

    def __init__(self) -> None:
        self.tried: list[tuple[ConvProblem, ConvConfig]] = []
        self.wrong: set[ConvConfig] = set()
        self.broken: set[ConvConfig] = set()

    def prepare(self, problem: ConvProblem) -> Trial:
        bench = self

        class Stub(Trial):
            def __init__(self) -> None:
                self.problem = problem
                self.result = torch.zeros(1)
                self.config: ConvConfig | None = None

            def run(self, config: ConvConfig) -> None:
                if config in bench.broken:
                    raise RuntimeError("out of resource: shared memory")
                self.config = config

            def deviation(self) -> float:
                bench.tried.append((problem, self.config))  # type: ignore[arg-type]
                return math.inf if self.config in bench.wrong else 0.0

        return Stub()

    def measure(self, call: Callable[[], None]) -> float:
        call()
        config = self.tried[-1][1]
        return 1000.0 / config.block_m + config.num_stages + 10 * (config in self.wrong)


def tuned(bench: Bench, problems: list[ConvProblem], path: Path, candidates: int = 8) -> list[tune.Outcome]:
    outcomes: list[tune.Outcome] = []
    table = tune.open_table(path, H100)
    tune.tune(
        problems, H100, path, table, bench.prepare, bench.measure, candidates, Console(quiet=True), outcomes.append
    )
    return outcomes


def test_the_fastest_correct_candidate_wins_and_is_used() -> None:
    path = tuning.user_folder() / tuning.file_name(H100.name)
    candidates = configs.ranked(LAYER, H100)[:8]
    fastest = sorted(candidates, key=lambda config: 1000.0 / config.block_m + config.num_stages)
    bench = Bench()
    bench.wrong, bench.broken = {fastest[0]}, {fastest[1]}
    (outcome,) = tuned(bench, [LAYER, LAYER], path)
    assert outcome.best is not None and outcome.best.config == fastest[2]
    assert sorted(str(failure)[:15] for failure in outcome.failures) == ["ConvConfig(bloc", "out of resource"]
    assert configs.conv_config(LAYER, H100) == fastest[2], "from the table that was written"
    assert outcome.heuristic is None or outcome.heuristic >= outcome.best.microseconds


def test_tuning_goes_on_where_it_stopped() -> None:
    path = tuning.user_folder() / "table.json"
    problems = [LAYER, dataclasses.replace(LAYER, kind="wgrad"), dataclasses.replace(LAYER, kind="dgrad")]
    bench = Bench()
    real, calls = bench.prepare, 0

    def interrupted(problem: ConvProblem) -> Trial:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(problem)

    bench.prepare = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        tuned(bench, problems, path)
    assert list(tuning.read(path).entries) == problems[:2]
    bench.prepare, bench.tried = real, []  # type: ignore[method-assign]
    assert [outcome.problem for outcome in tuned(bench, problems, path)] == problems[2:]
    assert {problem for problem, _ in bench.tried} == {problems[2]}
    assert list(tuning.read(path).entries) == problems


def test_problems_that_no_candidate_solves_are_not_written() -> None:
    path = tuning.user_folder() / "table.json"
    bench = Bench()
    bench.wrong = set(configs.every_config(LAYER, H100))
    (outcome,) = tuned(bench, [LAYER], path)
    assert outcome.best is None and outcome.heuristic is None
    assert len(outcome.failures) == 8
    assert not path.exists()


def test_foreign_files_are_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.write_text("{}")
    with pytest.raises(tuning.TableError, match="not a table of version 1"):
        tune.open_table(path, H100)
    with pytest.raises(tuning.TableError, match=f"it is the table of {A100.name}"):
        tune.open_table(install({}, A100), H100)


def test_the_whole_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With the GPU, its clock and its kernels stubbed."""
    bench = Bench()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "_device", lambda measured: (torch.device("cuda", 0), H100))
    monkeypatch.setattr(tune.registry.backend("triton"), "unavailable_reason", lambda: None)
    monkeypatch.setattr(tune, "Trial", lambda problem, device: bench.prepare(problem))
    monkeypatch.setattr(tune, "gpu_time", bench.measure)
    monkeypatch.setenv("COLUMNS", "120")
    command = ["tune", "--model", "cifar_resnet", "--batch", "4", "--kind", "forward", "--candidates", "3"]
    assert main(command) == 0
    path = tuning.user_folder() / tuning.file_name(H100.name)
    assert len(tuning.read(path).entries) == 8
    assert "8 of 8 problems measured" in " ".join(capsys.readouterr().out.split())
    assert main(command) == 0
    assert "0 of 8 problems measured" in " ".join(capsys.readouterr().out.split())
    path.write_text("mine")
    assert main(command) == 2
    assert "is not overwritten" in capsys.readouterr().out
    assert path.read_text() == "mine"


# --- the trials, by the kernels themselves ---------------------------------------------------------------------------

TINY = ConvProblem("forward", torch.float32, 2, 6, 6, 8, 16, 3, 3, (2, 2), (1, 1))


def trial_device() -> torch.device:
    """Where the kernels run here; skips where they do not."""
    reason = tune.registry.backend("triton").unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_trials_are_held_against_float64(kind: str, dtype: torch.dtype) -> None:
    problem = dataclasses.replace(TINY, kind=kind, dtype=dtype)  # type: ignore[arg-type]
    device = trial_device()
    trial = Trial(problem, device)
    calls = []

    def measure(call: Callable[[], None]) -> float:
        calls.append(call)
        return 3.0

    properties = launch.properties(device)
    candidates = configs.ranked(tune_layers.tile_problem(problem), properties)
    for config in (candidates[0], next((c for c in candidates if c.split_k > 1), candidates[-1])):
        assert trial.attempt(config, measure) == 3.0
    assert len(calls) == 2
    trial.exact[0, 0, 0, 0] += 1.0
    with pytest.raises(ArithmeticError, match="is wrong by"):
        trial.attempt(candidates[0], _never)
    trial.run = lambda config: None  # type: ignore[method-assign]
    with pytest.raises(ArithmeticError, match="is wrong by inf"):
        trial.attempt(candidates[0], _never)


_never: Measure = lambda call: pytest.fail("a wrong result was timed")  # noqa: E731
