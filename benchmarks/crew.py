"""The processes of all providers, and how long a run may take."""

from __future__ import annotations

import dataclasses
import time

from benchmarks.providers import Setting
from benchmarks.worker import ProviderError, Worker


class OutOfTimeError(RuntimeError):
    """The run has to end now."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long and how often things are done."""

    rounds: int
    warmup: float
    """Seconds, at the most, for each provider."""
    turn: float
    """Seconds that a provider's turn lasts, at least; short calls are repeated."""
    patience: float | None = None
    """Seconds that a provider has to be prepared; None for as many as it wants."""
    deadline: float | None = None
    """When the run has to be over, by time.monotonic()."""

    def time_for(self, patience: float | None) -> float | None:
        """Seconds to wait: `patience`, or what is left until the deadline.

        Raises:
            OutOfTimeError: nothing is left.
        """
        if self.deadline is None:
            return patience
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise OutOfTimeError
        return left if patience is None else min(left, patience)


class Crew:
    """The providers' processes.  One is kept for the next case where cases are small; a model has new ones."""

    def __init__(self, keep: bool) -> None:
        self._keep = keep
        self._workers: dict[tuple[str, Setting], Worker] = {}

    def worker(self, provider: str, setting: Setting) -> Worker:
        """The process of a provider in a setting."""
        key = (provider, setting)
        if key not in self._workers:
            self._workers[key] = Worker(provider)
        return self._workers[key]

    def dismiss(self, provider: str, setting: Setting) -> None:
        """End a process that failed; the next case gets a new one."""
        self._workers.pop((provider, setting)).kill()

    def rest(self) -> None:
        """The case is over."""
        for key, worker in list(self._workers.items()):
            if self._keep:
                try:
                    worker.release()
                except ProviderError:
                    self.dismiss(*key)
            else:
                self._workers.pop(key).close()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        for key in list(self._workers):
            if kind is None:
                self._workers.pop(key).close()
            else:  # they may be at work on something long
                self.dismiss(*key)
