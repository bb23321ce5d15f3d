"""Providers of the benchmarks in the process of the tests, instead of one of their own: what they do is the same."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.providers.base import UnsuitableError
from benchmarks.runner import Runner
from benchmarks.worker import NothingToOfferError, ProviderError


class LocalWorker:
    """Has the methods of `benchmarks.worker.Worker`."""

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
