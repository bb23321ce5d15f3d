"""What stands for processes and for CUDA graphs in the tests of the benchmarks: all else is the same."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from benchmarks.graphs import Record, Replay
from benchmarks.providers.base import UnsuitableError
from benchmarks.runner import Runner
from benchmarks.worker import NothingToOfferError, ProviderError


def recorder(log: list[str]) -> Record:
    """Records as CUDA graphs do: a replay does it again and writes to the same memory."""

    def record(function: Callable[[], Any]) -> tuple[Replay, Any]:
        outputs = tree_map(torch.clone, function())
        name = f"graph {len(log)}"
        log.append(name)

        def replay() -> None:
            log.append(f"replay {name}")
            tree_map(Tensor.copy_, outputs, function())

        return replay, outputs

    return record


class LocalWorker:
    """A provider in the process of the tests; has the methods of `benchmarks.worker.Worker`."""

    started: list[str]
    """Names of the providers whose process would have been started; set by the test."""

    def __init__(self, provider: str) -> None:
        self.started.append(provider)
        self._runner = Runner(provider)

    def prepare(self, workload: Path, patience: float | None = None) -> dict[str, float]:
        return self._ask(self._runner.prepare, workload)

    def warm_up(self, limit: float) -> float:
        return self._ask(self._runner.warm_up, limit)

    def run(self, calls: int, lead_in: bool) -> Any:
        return self._ask(self._runner.run, calls, lead_in)

    def finish(self) -> Any:
        return self._ask(self._runner.finish)

    def release(self) -> None:
        self._runner.release()

    def end(self) -> None:
        pass

    def close(self) -> None:
        self._runner.release()

    def kill(self) -> None:
        self._runner.release()

    def _ask(self, method: Callable[..., Any], *args: object) -> Any:
        try:
            return method(*args)
        except UnsuitableError as reason:
            raise NothingToOfferError(str(reason)) from reason
        except Exception as error:
            raise ProviderError(traceback.format_exc()) from error
