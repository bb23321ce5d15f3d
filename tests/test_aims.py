"""The project's aims, held against results."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import aims, result_page
from benchmarks.records import Record
from tests import made_up_results as made_up


def outcomes_of(rows: list[Record]) -> dict[str, tuple[str, str]]:
    return {outcome.aim.text: (outcome.text, outcome.verdict) for outcome in aims.outcomes(rows)}


def test_nothing_measured() -> None:
    assert {verdict for _, verdict in outcomes_of([]).values()} == {"not measured"}
    other = dataclasses.replace(made_up.GPU, device="NVIDIA A100")
    rows = made_up.case(made_up.SPEEDS, 1.0, shape="128x3x224x224", dtype="bfloat16", conditions=other)
    assert {verdict for _, verdict in outcomes_of(rows).values()} == {"not measured"}


def test_met_and_missed() -> None:
    found = outcomes_of(made_up.sweep())
    inference = "NVIDIA H200: inference, bfloat16, batch 128: at least "
    train = "NVIDIA H200: train, bfloat16, batch 256: "
    assert found[inference + "2.5x eager channels_last"] == ("2.00x", "missed")
    assert found[inference + "1.5x torch.compile max autotune"] == ("1.25x", "missed")
    assert found[train + "at least 1.5x eager channels_last"] == ("2.00x", "met")
    assert found[train + "at least 1.25x torch.compile"] == ("1.25x", "met")  # against its fastest mode
    assert found[train + "peak memory at most 1 of torch.compile's"] == ("0.94", "met")
    assert found[train + "peak memory at most 0.55 of eager channels_last's (later)"] == ("0.75", "missed")
    latency = next(text for text in found if "0.20 ms" in text)
    assert found[latency] == ("-", "not measured")  # only by calls, not by graphs


def test_every_run_can_tell() -> None:
    """A later run without the peer does not take the result away."""
    later = dataclasses.replace(made_up.CPU, date="2027-01-01")
    rows = made_up.case({"openvino": 2.0, "resfuse": 1.9}, 1.0)
    rows += made_up.case({"eager_nchw": 1.0, "resfuse": 5.0}, 1.0, conditions=later)
    assert "0.95x" in {text for text, _ in outcomes_of(rows).values()}
    (measured,) = [outcome for outcome in aims.outcomes(rows) if outcome.measured is not None]
    assert measured.run == made_up.CPU.date
    page = result_page.page(rows)  # and shows both runs
    assert "| resnet50, run of 2026-11-21 3x224x224 | 16 |" in page
    assert "| resnet50, run of 2027-01-01 3x224x224 | 16 |" in page


@pytest.mark.parametrize(("seconds", "verdict"), [(0.15e-3, "met"), (0.25e-3, "missed")])
def test_latency_is_that_of_graphs(seconds: float, verdict: str) -> None:
    subject = {"shape": "1x3x224x224", "dtype": "bfloat16", "conditions": made_up.GPU, "metric": "graph_time"}
    found = outcomes_of(made_up.case({"resfuse": 1.0}, seconds, **subject))
    (outcome,) = [outcome for text, outcome in found.items() if "0.20 ms" in text]
    assert outcome == (f"{seconds * 1e3:.3f} ms", verdict)


def test_a_processor_has_an_aim_of_its_own() -> None:
    found = outcomes_of(made_up.case({"openvino": 2.0, "resfuse": 1.9}, 1.0))
    assert found["CPU: inference, float32, batch 16: at least 1x OpenVINO"] == ("0.95x", "missed")


def test_memory_is_that_of_whole_steps() -> None:
    """Runs that took times leave weights and momenta out of their peaks, which would flatter the ratio."""
    rows = [row for row in made_up.sweep() if row.metric != "predicted_peak"]
    assert {outcomes_of(rows)[text][1] for text in outcomes_of(rows) if "peak memory" in text} == {"not measured"}
