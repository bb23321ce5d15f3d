"""The process of one side: imports its tree's `resfuse`, and runs what it is told."""

from __future__ import annotations

import io
import statistics
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.compare import tasks
from benchmarks.compare.side import Failure

BLOCK = 50
"""Calls whose host time is taken together: few enough for a GPU's queue."""


def serve(tree: str, descriptor: int) -> None:
    """Answer requests (method, *arguments) until one is None or nobody asks any more."""
    torch.backends.cudnn.benchmark = True  # cuDNN tries its algorithms, on all sides alike
    connection = Connection(descriptor)
    runner = Runner(Path(tree))
    try:
        while (request := connection.recv()) is not None:
            method, *arguments = request
            try:
                reply = getattr(runner, method)(*arguments)
            except Exception:
                reply = Failure(traceback.format_exc())
            connection.send(reply)
    except (EOFError, OSError):
        pass  # the caller is gone


class Runner:
    """What `SideProcess` asks for."""

    def __init__(self, tree: Path) -> None:
        self._tree = tree

    def describe(self) -> dict[str, str]:
        import resfuse

        found = Path(str(resfuse.__file__)).resolve()
        if not found.is_relative_to(self._tree.resolve()):
            raise ImportError(f"resfuse: expected that of {self._tree}, got {found}")
        return {
            "resfuse": resfuse.__version__,
            "backends": ", ".join(resfuse.available_backends()),
            "torch": torch.__version__,
            "python": sys.version.split()[0],
        }

    def prepare(self, job: str) -> bytes:
        """The results as `torch.save` has them: tensors themselves only go to children of multiprocessing."""
        read = torch.load(job, weights_only=False)
        self._task: tasks.Task = read["task"]
        torch.set_num_threads(read["threads"])
        self._device = torch.device(self._task.device)
        self._call: Any = None  # the one before has given back its memory when this one takes its own
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        step, batches, quantities = tasks.prepare(self._task, read["tensors"], read["batches"])
        results = io.BytesIO()
        torch.save(tasks.snapshot(quantities(step(*batches[0]))), results)
        self._call = measure.cycle(batches, step)
        return results.getvalue()

    def warm_up(self, limit: float) -> float:
        if self._task.kind == tasks.HOST:
            return min(measure.block_seconds(self._call, BLOCK, self._device) for _ in range(3))
        return measure.warm_up(self._call, self._device, limit)

    def run(self, calls: int) -> float:
        if self._task.kind == tasks.HOST:
            blocks = [measure.block_seconds(self._call, BLOCK, self._device) for _ in range(max(1, calls // BLOCK))]
            return statistics.median(blocks)
        if calls > 1:
            self._call()  # others have used the caches since
        return statistics.median(sample.seconds for sample in measure.call_samples(self._call, calls, self._device))
