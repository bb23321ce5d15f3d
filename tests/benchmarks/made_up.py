"""Rows, providers and workers for the tests of the benchmarks."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from typing import Any

import pandas as pd
from torch import Tensor, nn

from benchmarks import results
from benchmarks.case import Setting
from benchmarks.providers import PROVIDERS
from benchmarks.providers.native import Eager
from benchmarks.steps import Step
from benchmarks.worker import ProviderError, Runner, UnsuitableError

RUN = {
    "device": "AMD EPYC", "threads": 2, "versions": "torch 2.11.0, resfuse 0.1.0 (cpu, reference)",
    "commit": "abc1234", "date": "2026-11-21T20:00:00+00:00",
}  # fmt: skip


def rows(milliseconds: dict[str, float], metric: str = "time", **changes: Any) -> pd.DataFrame:
    """Times of ResNet-50 by provider; p20 and p80 are 10 % away from the median."""
    case = {"op": "models", "name": "resnet50", "mode": "inference", "dtype": "float32", "shape": "16x3x224x224"}
    made = []
    for provider, value in milliseconds.items():
        row = {**case, "provider": provider, "metric": metric, "unit": "s", "samples": 20, **RUN, **changes}
        row |= {"x": int(row["shape"].partition("x")[0]), "p20": value * 0.9e-3, "p50": value * 1e-3}
        made.append({**row, "p80": value * 1.1e-3})
    return pd.DataFrame(made).reindex(columns=results.COLUMNS)


class Planted(Eager):
    """Eager PyTorch with a mistake."""

    def __init__(self, name: str) -> None:
        super().__init__(name)

    def prepare(self, module: nn.Module, examples: tuple[Tensor, ...], setting: Setting) -> Step:
        step = super().prepare(module, examples, setting)
        mistakes = {"wrong": self._scaled, "wrong_gradient": self._last_scaled, "hangs": self._hang}
        if self.name == "unsuitable":
            raise UnsuitableError("no use for this module")
        if self.name == "raises":
            raise ValueError("a bug")
        return lambda *batch: mistakes[self.name](step(*batch))

    @staticmethod
    def _scaled(result: Tensor) -> Tensor:
        return result * 1.001

    @staticmethod
    def _last_scaled(result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return *result[:-1], result[-1] * 1.001

    @staticmethod
    def _hang(result: Tensor) -> Tensor:
        import time

        time.sleep(1000)
        return result


def plant() -> None:
    """Make the planted providers known by their names."""
    for name in ("wrong", "wrong_gradient", "hangs", "raises", "unsuitable"):
        PROVIDERS[name] = Planted(name)


class LocalWorker:
    """A worker in the process of the test; `log` gets what it is asked."""

    def __init__(self, provider: str, log: list[str]) -> None:
        self._runner, self._provider, self._log = Runner(provider), provider, log

    def ask(self, method: str, *arguments: object, timeout: float) -> Any:
        self._log.append(f"{method} {self._provider}")
        try:
            return getattr(self._runner, method)(*arguments)
        except UnsuitableError:
            raise
        except Exception as error:
            raise ProviderError(traceback.format_exc()) from error


class LocalWorkers:
    """Stands for `harness.Workers`."""

    def __init__(self, broken: Iterable[str] = ()) -> None:
        """`broken` name providers whose process ends at their second turn."""
        self.log: list[str] = []
        self._workers: dict[str, LocalWorker] = {}
        self._broken = set(broken)

    def of(self, name: str) -> LocalWorker:
        if name in self._broken and self.log.count(f"turn {name}") == 1:
            raise ProviderError("its process ended with code -11")
        return self._workers.setdefault(name, LocalWorker(name, self.log))

    def end(self, name: str) -> None:
        self.log.append(f"end {name}")

    def rest(self) -> None:
        pass

    def close(self) -> None:
        pass
