"""Configurations of the Triton convolutions: the heuristics' limits, and those of tables."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resfuse.backends import measured
from resfuse.backends.triton import config, plan
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

SMALL = DeviceProperties("NVIDIA GeForce RTX 3060", (8, 6), 28, 101376)
LAYER = ConvProblem("forward", torch.bfloat16, 32, 28, 28, 128, 128, 3, 3, padding=(1, 1))


@pytest.fixture(autouse=True)
def _own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No table but those that a test writes."""
    monkeypatch.setenv("RESFUSE_TABLES", str(tmp_path / "user"))
    monkeypatch.setattr(measured, "SHIPPED", tmp_path / "shipped")
    plan.forget()
    yield
    plan.forget()


def install(configs: dict[ConvProblem, ConvConfig | None], folder: Path | None = None) -> None:
    """Write a table to where it is looked for."""
    entries = {problem: measured.Entry({"reference": 12.5}, {}, config) for problem, config in configs.items()}
    measured.write((folder or measured.user_folder()) / measured.file_name(H100.name), H100.name, entries)
    plan.forget()


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
    chosen, problem = chosen_config(problem, device), plan.tile_problem(problem)
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
    assert chosen_config(LAYER, A100) == heuristic_config(LAYER, A100), "of another GPU"
    assert not caplog.records
    install({LAYER: None, LAYER._replace(n=30): second})
    assert chosen_config(LAYER, H100) == second, "a problem that no configuration solved has none"


def test_configurations_do_not_depend_on_residuals_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    install({LAYER._replace(residual=True): OTHER, LAYER._replace(n=33): ranked(LAYER, H100)[1]})
    monkeypatch.setattr(measured, "versions", lambda: {"torch": "3.0"})
    assert chosen_config(LAYER, H100) == OTHER


def test_packed_problems_are_looked_up_as_the_convolutions_that_they_are() -> None:
    stem = ConvProblem("forward", torch.bfloat16, 32, 224, 224, 3, 64, 7, 7, (2, 2), (3, 3))
    other = ranked(plan.tile_problem(stem), H100)[-1]
    assert plan.tile_problem(stem) != stem
    install({stem: other})
    assert chosen_config(stem, H100) == other


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
    install({LAYER: shipped}, folder=measured.SHIPPED)
    assert chosen_config(LAYER, H100) == shipped
    install({LAYER: own})
    assert chosen_config(LAYER, H100) == own
