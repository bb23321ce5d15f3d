"""Fair timing of alternatives: in turns, so that a disturbance hits all of them, and by the median."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds that the rounds of one alternative took."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quantile(self, part: float) -> float:
        """The time that `part` of the rounds kept to, by the nearest rank."""
        ordered = sorted(self.seconds)
        return ordered[min(int(part * len(ordered)), len(ordered) - 1)]


def interleave(
    alternatives: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    *,
    warmup: int = 1,
    budget: float = math.inf,
    after_call: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time each alternative up to `rounds` times, one after the other in every round.

    Args:
        alternatives: what to call, by name.
        rounds: calls that count, for each, at most.
        device: waited for after each call.
        warmup: rounds before those, which do not count.
        budget: seconds after which no further round begins (but three are always made), for a slow or busy machine.
        after_call: called after every call, not timed (to advance a progress bar).
    """
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    begun = time.perf_counter()
    for turn in range(warmup + rounds):
        if turn >= warmup + 3 and time.perf_counter() - begun > budget:
            break
        for name, call in alternatives.items():
            started = time.perf_counter()
            call()
            synchronize(device)
            elapsed = time.perf_counter() - started
            if turn >= warmup:
                seconds[name].append(elapsed)
            after_call()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use this many threads on the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_thread_counts(step: Callable[[], object], tries: int = 5) -> dict[int, Timing]:
    """A step on as many threads as torch uses, and on one; the fastest first.

    Threads wait for each other at the end of every operation, so where layers are small, or other processes keep a core
    busy, one thread can be many times as fast as two.
    """
    found = {}
    for count in sorted({1, torch.get_num_threads()}, reverse=True):
        with threads(count):
            found[count] = interleave({"step": step}, tries, torch.device("cpu"), warmup=2)["step"]
    return dict(sorted(found.items(), key=lambda item: item[1].median))


def synchronize(device: torch.device) -> None:
    """Wait for a device that works on its own; a CPU's operations are done when they return."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
