"""What the providers of the benchmarks are given and held against, and what it costs on paper."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")

from resfuse.costs import DEVICES

from benchmarks import ceilings
from benchmarks.cases import make_cases
from benchmarks.providers import Setting
from benchmarks.worker import ProviderError, Worker
from benchmarks.workload import Workload, make_workload

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workload, Path]:
    """A small workload, and the file that it is in."""
    (case,) = make_cases("layer", ["resnet18"], 2, 32)[1:2]
    workload = make_workload(case, Setting("train", torch.float32, CPU, 1, level="layer"))
    path = tmp_path_factory.mktemp("job") / "workload.pt"
    workload.save(path)
    return workload, path


def test_a_workload_is_the_same_in_every_process(job: tuple[Workload, Path]) -> None:
    made, loaded = job[0], Workload.load(job[1])
    assert (loaded.case.name, loaded.case.inputs) == (made.case.name, made.case.inputs)
    assert all(map(torch.equal, made.batch(2), loaded.batch(2)))
    assert not torch.equal(made.batch(0)[0], made.batch(1)[0])
    states = made.module().state_dict(), loaded.module().state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_wrong_results_are_seen(job: tuple[Workload, Path]) -> None:
    workload, _ = job
    assert workload.exact.keys() == {"output", "grad input", "grad 0.weight", "grad 1.weight", "grad 1.bias"}
    assert set(workload.errors(workload.exact).values()) == {0.0}
    off = {name: tensor * 1.001 for name, tensor in workload.exact.items()}
    for quantity, error in workload.errors(off).items():
        assert error > workload.limit(quantity) > workload.eager_errors[quantity]


def test_a_process_that_is_late_or_gone_is_an_error_with_its_reason(job: tuple[Workload, Path]) -> None:
    with Worker("no such provider") as worker:
        with pytest.raises(ProviderError, match="it was not ready after 0 s"):
            worker.prepare(job[1], patience=0.0)
        with pytest.raises(ProviderError, match="its process ended with code -9"):
            worker.warm_up(0.0)
    with Worker("no such provider") as worker, pytest.raises(ProviderError, match="no such provider"):
        worker.prepare(job[1])


def test_what_a_case_costs_is_what_explain_says() -> None:
    (case,) = (case for case in make_cases("op", [], 4, 32) if case.name == "add_relu stage 1")
    device = dataclasses.replace(DEVICES["h200"], type="cpu")
    cost = ceilings.cost_of(case, Setting("inference", torch.float32, CPU, 1, level="op"), device)
    assert cost.flops == 0
    assert cost.bytes == 3 * 4 * 256 * 7 * 7 * 4
    assert cost.seconds == pytest.approx(cost.bytes / device.bandwidth)
    step = ceilings.cost_of(case, Setting("train", torch.float32, CPU, 1, level="op"), device)
    assert step.bytes >= 2 * cost.bytes, "the gradients of both inputs, too"
