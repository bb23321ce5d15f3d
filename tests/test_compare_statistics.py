"""Comparing two commits: what counts as a change, whose turn it is, whether results are correct, and what is shown.

Times are made up.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("torchvision")

from benchmarks import records
from benchmarks.compare import contest, jobs, report, tasks, turns
from benchmarks.compare.contest import BASE, CONTROL, NOW, Comparison
from benchmarks.compare.statistics import FASTER, SAME, SLOWER, UNKNOWN, Ratio, median_interval, verdict
from benchmarks.compare.tasks import Task
from benchmarks.measure import quantiles

OP = Task("op", "bn_act", "train", torch.float32, "cpu", (2, 8, 5, 5))


# --- statistics ------------------------------------------------------------------------------------------------------


def test_interval_of_the_median() -> None:
    """The tables of the sign test: of 20 values the 4th and the 17th, of 8 all, of fewer none."""
    assert median_interval([*range(20, 0, -1)]) == (4, 17)
    assert median_interval([*range(1, 9)]) == (1, 8)
    assert median_interval([*range(7)]) is None
    assert median_interval([*range(1, 11)], confidence=0.95) == (2, 9)


def noisy(seed: int, rounds: int = 20, factor: float = 1.0, scatter: float = 0.02) -> tuple[list[float], list[float]]:
    """Times of two sides in a machine that becomes slower and has hiccups: (base, now)."""
    draw = random.Random(seed)
    base, now = [], []
    for index in range(rounds):
        common = 1e-3 * (1 + index / rounds) * (3 if draw.random() < 0.1 else 1)
        base.append(common * draw.lognormvariate(0, scatter))
        now.append(common * factor * draw.lognormvariate(0, scatter))
    return base, now


def test_the_same_code_is_the_same() -> None:
    """As often as the interval says: 5 of 500 are 1 in 100."""
    found = Counter(verdict(Ratio.of(now, base), None) for base, now in map(noisy, range(500)))
    assert found[SAME] >= 490
    ratio = Ratio.of(*noisy(0)[::-1])
    assert ratio.interval is not None
    assert ratio.interval[0] < 1 < ratio.interval[1]


@pytest.mark.parametrize(("factor", "expected"), [(1.05, SLOWER), (0.95, FASTER)])
def test_a_change_of_twice_the_scatter_is_found(factor: float, expected: str) -> None:
    found = Counter(
        verdict(Ratio.of(now, base), None) for base, now in (noisy(seed, factor=factor) for seed in range(200))
    )
    assert found[expected] >= 190
    assert found[expected] + found[SAME] == 200


def test_what_two_processes_of_base_differ_by_is_noise() -> None:
    base = [1.0 + index / 1000 for index in range(20)]
    control = Ratio.of([1.03 * value for value in base], base)
    for factor, expected in ((1.02, SAME), (0.98, SAME), (1.06, SLOWER), (0.94, FASTER)):
        ratio = Ratio.of([factor * value for value in base], base)
        assert verdict(ratio, control) == expected
        assert verdict(ratio, None) == (SLOWER if factor > 1 else FASTER)


def test_few_rounds_say_nothing() -> None:
    assert verdict(Ratio.of([9.0] * 7, [1.0] * 7), None) == UNKNOWN
    assert Ratio.of([2.0], [1.0]).quantiles.p50 == 2.0


@pytest.mark.parametrize(
    ("values", "base", "message"),
    [
        ([1.0], [1.0, 2.0], "rounds: expected as many on both sides, got 1 and 2"),
        ([], [], "got 0 and 0"),
        ([1.0], [0.0], "times: expected positive ones, got 0.0"),
        ([float("nan")], [1.0], "times: expected positive ones, got nan"),
    ],
)
def test_ratios_of_what_can_not_be_compared(values: list[float], base: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ratio.of(values, base)


# --- turns -----------------------------------------------------------------------------------------------------------


class FakeSide:
    """Says that calls take so long, and logs them; computes what eager PyTorch does."""

    def __init__(self, name: str, seconds: float, log: list[tuple[str, int]], off: float = 0.0) -> None:
        self.name, self.seconds, self.log, self.off = name, seconds, log, off

    def prepare(self, job: Path) -> dict[str, Tensor]:
        read = torch.load(job, weights_only=False)
        step, batches, quantities = tasks.prepare(read["task"], read["tensors"], read["batches"], fused=False)
        return {name: value + self.off for name, value in tasks.snapshot(quantities(step(*batches[0]))).items()}

    def warm_up(self, limit: float) -> float:
        return self.seconds

    def run(self, calls: int) -> float:
        self.log.append((self.name, calls))
        return self.seconds * (1 + len(self.log) / 1e6)


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_everyone_has_every_place_in_a_round_as_often(names: list[str]) -> None:
    rounds = 2 * len(names)
    orders = [turns.order_of(index, names) for index in range(rounds)]
    assert all(sorted(order) == names for order in orders)
    places = Counter((name, order.index(name)) for order in orders for name in names)
    assert set(places.values()) == {2}
    follows = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert len(set(follows.values())) <= 1


def test_sides_take_turns_with_the_same_number_of_calls() -> None:
    log: list[tuple[str, int]] = []
    advanced: list[None] = []
    sides = {BASE: FakeSide("a", 0.01, log), NOW: FakeSide("b", 0.05, log)}
    found = turns.take_turns(sides, 4, 1.0, lambda: advanced.append(None))
    assert [name for name, _ in log] == ["a", "b", "b", "a", "b", "a", "a", "b"]
    assert {calls for _, calls in log} == {5}
    assert {name: len(seconds) for name, seconds in found.items()} == {BASE: 4, NOW: 4}
    assert len(advanced) == 8


def test_calls_of_a_turn() -> None:
    assert [turns.calls_of_a_turn(seconds) for seconds in (2.0, 0.25, 0.1, 1e-7, 0.0)] == [1, 1, 3, 2000, 2000]


# --- the contest -----------------------------------------------------------------------------------------------------


def compared(off: float = 0.0, seconds: float = 0.01, task: Task = OP) -> Comparison:
    log: list[tuple[str, int]] = []
    names = {BASE: 0.01, NOW: seconds, CONTROL: 0.01}
    sides = {name: FakeSide(name, value, log, off if name == NOW else 0.0) for name, value in names.items()}
    (found,) = contest.compare([task], sides, 8, 0.0, 1)
    return found


def test_a_contest_of_equals() -> None:
    found = compared()
    assert (found.verdict, found.wrong) == (SAME, ())
    assert found.ratio.quantiles.p50 == pytest.approx(1, rel=1e-3)
    assert not found.fails(over=0.0)


def test_a_contest_with_a_slower_side() -> None:
    found = compared(seconds=0.02)
    assert found.verdict == SLOWER
    assert found.ratio.quantiles.p50 == pytest.approx(2, rel=1e-3)
    assert found.control is not None and found.control.quantiles.p50 == pytest.approx(1, rel=1e-3)
    assert found.fails(over=0.05) and found.fails(over=0.9) and not found.fails(over=1.1) and not found.fails(None)


def test_wrong_results_fail_however_fast() -> None:
    found = compared(off=0.1, seconds=0.001)
    assert found.verdict == contest.WRONG
    assert found.fails(None)
    assert all(text.startswith("now: ") for text in found.wrong)
    assert {text.split(" is off")[0] for text in found.wrong} >= {"now: output", "now: grad input"}


def small_tasks(dtype: torch.dtype) -> list[Task]:
    modes = ("inference", "train")
    found = list(jobs.micro_tasks(modes, [dtype], "cpu", scale=8))
    return [*found, *jobs.model_tasks(["resnet18"], modes, [2], [dtype], "cpu", 32)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_task_computes_by_resfuse_what_it_computes_eagerly(dtype: torch.dtype, one_thread: None) -> None:
    for task in small_tasks(dtype):
        job = jobs.make_job(task)
        step, batches, quantities = tasks.prepare(task, job.tensors, job.batches)
        assert len(batches) == jobs.INPUTS
        results = tasks.snapshot(quantities(step(*batches[0])))
        assert results.keys() == job.exact.keys()
        assert job.objections(results) == []
        assert job.objections({name: value * 2 + 1 for name, value in results.items()})
    assert {task.kind for task in small_tasks(dtype)} == {"model", "op", "host"}


def test_what_is_shown_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, now = noisy(1, factor=1.2)
    slower = Comparison(OP, quantiles(base), quantiles(now), Ratio.of(now, base), Ratio.of(base, base))
    wrong = compared(off=0.1)
    conditions = records.Conditions("a processor", 2, "torch 0", "abc", "2026-01-01")
    report.show([slower, wrong])
    shown = capsys.readouterr().out
    assert "2 compared: 1 slower, 1 wrong" in shown
    assert "two processes of base" in report.summary([slower])
    assert "two processes of base" not in report.summary([dataclasses.replace(slower, control=None)])
    assert "wrong: bn_act, train, 2x8x5x5, float32: now: output is off by" in shown
    heading, line, _ = report.lines([slower, wrong])
    assert heading.split()[0] == "base"
    assert f"{slower.ratio.quantiles.p50:.3f}" in line and line.endswith("slower")
    report.write(tmp_path / "compare.csv", [slower, wrong], ("abc", "def+"), conditions)
    with (tmp_path / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["verdict"] for row in rows] == ["slower", "wrong"]
    assert float(rows[0]["ratio_p50"]) == pytest.approx(slower.ratio.quantiles.p50, rel=1e-5)
    assert (rows[0]["base"], rows[0]["now"], rows[0]["device"]) == ("abc", "def+", "a processor")
