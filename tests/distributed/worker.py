"""The processes of test_distributed.py: `torchrun ... -m tests.distributed.worker DIRECTORY SCENARIO...`.

Starting processes takes much longer than what they check, so one start serves all scenarios.  Each process writes
DIRECTORY/<rank>.json: the name of each scenario it has run and None, or the traceback of what failed.
"""

from __future__ import annotations

import datetime
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed import sync_models, sync_operator, training  # noqa: F401  (which register their scenarios)
from tests.distributed.scenario import SCENARIOS, rank


def main(directory: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    outcomes: dict[str, str | None] = {}
    for name in names:
        torch.manual_seed(0)
        try:
            SCENARIOS[name]()
            outcomes[name] = None
        except Exception:
            outcomes[name] = traceback.format_exc()
        Path(directory, f"{rank()}.json").write_text(json.dumps(outcomes))
        failed: list[Any] = [None, None]
        dist.all_gather_object(failed, outcomes[name])
        if any(failed):  # the processes may have stopped in different places
            break
    dist.barrier()  # gloo (torch 2.11) hangs if it is destroyed while it lets go of a collective's tensors
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
