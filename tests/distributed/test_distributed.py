"""Two processes, started by torchrun, that talk over gloo: DDP, synchronised batch norm, FSDP2.

The scenarios, and what each of them checks, are in `distributed/`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist

from resfuse.functional import sync_bn_act
from resfuse.ops.sync_bn_act import merge
from tests import needs
from tests.distributed import worker
from tests.needs import ROOT

PROCESSES = 2
SLOW = ("ddp_equals_eager_ddp", "ddp_with_compile", "compiled", "hooks_on_one_process_only")
SCENARIOS = [
    pytest.param(
        name,
        marks=[
            pytest.mark.skipif(
                name.endswith("on_gpus") and not torch.cuda.is_available(),
                reason="torch.nn.SyncBatchNorm runs on GPUs only",
            ),
            *([pytest.mark.slow] if name in SLOW else []),
        ],
    )
    for name in worker.SCENARIOS
]

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Each process's report of the scenarios that were selected, all run by one torchrun."""
    names = []
    for item in request.session.items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        skipped = any(mark.args and mark.args[0] is True for mark in item.iter_markers("skipif"))
        if "scenario" in parameters and item.path == request.path and not skipped:
            names.append(parameters["scenario"])
    directory = tmp_path_factory.mktemp("outcomes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    command += ["--max-restarts=2"]  # gloo's first connection can time out on a busy machine
    command += ["-m", worker.__name__, str(directory), *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": needs.python_path()}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # or a restart may find the addresses of the dead
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    files = [directory / f"{rank}.json" for rank in range(PROCESSES)]
    assert all(file.exists() for file in files), run.stderr[-5000:]
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes(scenario: str, outcomes: list[dict[str, Any]]) -> None:
    for rank, results in enumerate(outcomes):
        assert scenario in results, "did not run: an earlier scenario failed"
        assert results[scenario] is None, f"on process {rank}:\n{results[scenario]}"


def test_merged_statistics_are_those_of_the_whole() -> None:
    """Means of 300 standard deviations lose nothing, and neither the order nor sets without values matter."""
    torch.manual_seed(0)
    values = torch.randn(40, 6) + 300
    parts = [part.double() for part in values.split((7, 1, 30, 2))]
    rows = [torch.cat((p.mean(0), (p - p.mean(0)).square().sum(0), torch.tensor([len(p)]).double())) for p in parts]
    expected = (values.double().mean(0), values.double().var(0, correction=0) * 40)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        for empty in ([], [torch.zeros(13)]):
            stacked = torch.stack([*empty, *(rows[index].float() for index in order)])
            mean, m2, count = merge(stacked)
            torch.testing.assert_close(mean.double(), expected[0], rtol=1.2e-7, atol=0)
            # From the rounding of the means that enter: 40 values times (300 / 2^24)^2, and the cross terms.
            torch.testing.assert_close(m2.double(), expected[1], rtol=2e-5, atol=1e-6)
            assert count == 40


def test_outside_of_distributed_training_there_is_a_clear_error() -> None:
    with pytest.raises(RuntimeError, match=r"process_group: expected torch\.distributed to be initialised"):
        sync_bn_act(torch.zeros(2, 3, 4, 4), None, None)
