"""Two processes, started by torchrun, that talk over gloo: DDP, synchronised batch norm, FSDP2.

The scenarios, and what each of them checks, are in `distributed/`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
QUICK = tuple(name for name in worker.SCENARIOS if name not in SLOW and not name.endswith("on_gpus"))
ON_GPUS = tuple(name for name in worker.SCENARIOS if name.endswith("on_gpus"))  # torch.nn.SyncBatchNorm runs there only

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


@pytest.mark.parametrize(
    "scenarios",
    [
        QUICK,
        pytest.param(SLOW, marks=pytest.mark.slow),
        pytest.param(ON_GPUS, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
    ],
    ids=["quick", "slow", "on_gpus"],
)
def test_two_processes(scenarios: tuple[str, ...], tmp_path: Path) -> None:
    """All scenarios are run by one torchrun, and each process reports on each of them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    command += ["--max-restarts=2"]  # gloo's first connection can time out on a busy machine
    command += ["-m", worker.__name__, str(tmp_path), *scenarios]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": needs.python_path()}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # or a restart may find the addresses of the dead
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    for rank in range(PROCESSES):
        report = tmp_path / f"{rank}.json"
        assert report.exists(), run.stderr[-5000:]
        failed = {name: error for name, error in json.loads(report.read_text()).items() if error is not None}
        assert not failed, f"on process {rank}:\n" + "\n".join(failed.values())
        assert tuple(json.loads(report.read_text())) == scenarios


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
