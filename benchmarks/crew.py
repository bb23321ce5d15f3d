"""The processes of all providers, and how long a run may take."""

from __future__ import annotations

import dataclasses
import math
import time

from benchmarks.providers import Setting
from benchmarks.worker import ProviderError, Worker

OVERHEAD = 1.5
"""How much longer than asked for measuring takes: calls that are longer than a turn, and what is found out once."""


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
    patience: float = math.inf
    """Seconds that a provider has to be prepared."""
    deadline: float = math.inf
    """When the run has to be over, by time.monotonic()."""

    def check_time(self) -> None:
        """Go on only before the deadline.

        Raises:
            OutOfTimeError: it has passed.
        """
        if time.monotonic() > self.deadline:
            raise OutOfTimeError

    def time_to_prepare(self, prepared: int) -> float:
        """Seconds for one more provider, where so many are waiting to be measured and something is to come of it."""
        measuring = (prepared + 1) * (self.warmup + self.rounds * self.turn) * OVERHEAD
        return min(self.patience, self.deadline - time.monotonic() - measuring)


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
        if not self._keep:
            self._close_all()
        for key, worker in list(self._workers.items()):
            try:
                worker.release()
            except ProviderError:
                self.dismiss(*key)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is not None:  # they may be at work on something long
            for key in list(self._workers):
                self.dismiss(*key)
        self._close_all()

    def _close_all(self) -> None:
        for worker in self._workers.values():
            worker.end()  # all at once: each may need a while for its threads and compilers
        while self._workers:
            self._workers.popitem()[1].close()
