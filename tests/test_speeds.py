"""What rows say about each other: comparisons, runs, graphs, ceilings and their names."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import labels, roofs, speeds
from tests import made_up_results as made_up


def test_the_best_peer_is_none_of_ours() -> None:
    rows = made_up.case({**made_up.CPU_SPEEDS, "resfuse_compiled": 9.0}, 1.0)
    (one,) = speeds.comparisons(rows)
    assert one.best_peer == "onnxruntime"
    assert one.against_best_peer() == pytest.approx(0.8)
    assert one.speed("resfuse", one.base) == pytest.approx(1.6)
    assert (one.batch, one.image) == (16, "3x224x224")


def test_the_latest_run_of_a_case_counts() -> None:
    later = dataclasses.replace(made_up.CPU, date="2027-01-01")
    old, new = made_up.case(made_up.CPU_SPEEDS, 1.0), made_up.case(made_up.CPU_SPEEDS, 2.0, conditions=later)
    memory = [made_up.row("resfuse", 5.0, metric="peak_memory", unit="B")]
    for rows in (old + new + memory, new + memory + old):
        timed = [one for one in speeds.comparisons(rows) if one.times]
        assert [one.first.conditions.date for one in timed] == ["2027-01-01"]
    apart = [made_up.row("resfuse", 5.0, metric="peak_memory", unit="B", conditions=later)]
    assert len(speeds.comparisons(old + apart)) == 2


def test_graphs_are_a_view_of_their_own() -> None:
    rows = made_up.case(made_up.CPU_SPEEDS, 1.0)
    own = made_up.case({"inductor_reduce_overhead": 3.0}, 1.0)  # which captures its graphs itself
    (one,) = speeds.comparisons(rows + own + made_up.graphs(rows, 4.0))
    by_calls, by_graphs = one.views
    assert by_calls.best_peer == "inductor_reduce_overhead"
    assert by_graphs.best_peer == "onnxruntime"
    assert by_graphs.median("resfuse") == pytest.approx(1 / 1.6 / 4)
    assert by_graphs.median("inductor_reduce_overhead") == pytest.approx(1 / 3)
    assert [view.graphed for view in speeds.views(speeds.comparisons(rows))] == [False]


def test_parts_of_models_may_have_graphs_only() -> None:
    rows = made_up.case(made_up.CPU_SPEEDS, 1.0)
    own = made_up.case({"tensorrt": 3.0}, 1.0)  # not captured, and timed by calls
    other = dataclasses.replace(made_up.CPU, date="2027-01-01")
    memory = [made_up.row("resfuse", 5.0, metric="peak_memory", unit="B", conditions=other)]
    found = speeds.comparisons(made_up.graphs(rows, 4.0) + own + memory)
    assert [one.timed for one in found] == [True, False]
    (view,) = found[0].views
    assert view.graphed
    assert view.best_peer == "onnxruntime"
    assert view.median("tensorrt") == pytest.approx(1 / 3)


def test_a_roof_is_that_of_the_run() -> None:
    other = dataclasses.replace(made_up.GPU, date="2027-01-01")
    rows = made_up.ceilings() + [
        dataclasses.replace(row, p50=row.p50 / 2) for row in made_up.ceilings(other)
    ]  # fmt: skip
    assert roofs.ceilings(rows, made_up.GPU).bandwidth == made_up.BANDWIDTH
    assert roofs.ceilings(rows, other).rates == {"bfloat16": made_up.RATE / 2}
    roof = roofs.ceilings(rows, made_up.GPU)
    assert roof.attainable(1.0, "bfloat16") == made_up.BANDWIDTH
    assert roof.attainable(1e6, "bfloat16") == made_up.RATE
    assert roofs.ceilings(rows, made_up.CPU) == roofs.Ceilings(0.0, {})


def test_geometric_mean() -> None:
    assert speeds.geometric_mean([0.5, None, 2.0]) == pytest.approx(1.0)
    assert speeds.geometric_mean([4.0]) == pytest.approx(4.0)
    assert speeds.geometric_mean([None]) is None


def test_versions_are_told_once() -> None:
    versions = ("torch 2.11.0, resfuse 0.1.0 (cpu, reference)", "torch 2.11.0, resfuse 0.1.0 (cpu, reference), peer v1")
    runs = [dataclasses.replace(made_up.CPU, versions=text) for text in versions]
    text = labels.conditions_text(made_up.row("resfuse", 1.0, conditions=run) for run in runs)
    assert (
        text == "a processor, 2 threads; torch 2.11.0, resfuse 0.1.0 (cpu, reference), peer v1; commit abc, 2026-11-21"
    )


def test_names_of_providers() -> None:
    assert labels.label("inductor_max_autotune") == "torch.compile max autotune"
    assert labels.label("resfuse_cuda") == "resfuse cuda"
    assert labels.label("eager_channels_last") == "eager channels_last"
