"""Timing of repeated calls, with the operating system's share of the work."""

from __future__ import annotations

import contextlib
import itertools
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

WINDOW = 3
"""Calls whose median is compared with that of the calls before, to see whether a step has become stable."""
STABLE = 1.05
CLOCKS = 0.5
"""Seconds of work after which a GPU's clocks are taken to be steady."""


class Sample(NamedTuple):
    """What one call cost."""

    seconds: float
    minor_faults: float
    """Pages that the kernel had to map: memory that the allocator gave back and asked for again."""
    system_seconds: float
    """CPU time spent in the kernel, all threads together."""


class Quantiles(NamedTuple):
    """What 20, 50 and 80 percent of the values do not exceed."""

    p20: float
    p50: float
    p80: float


def quantiles(values: Sequence[float]) -> Quantiles:
    """Of at least one value, interpolated between neighbours."""
    if len(values) == 1:
        return Quantiles(values[0], values[0], values[0])
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Quantiles(fifths[0], statistics.median(values), fifths[3])


def call_samples(call: Callable[[], object], calls: int, device: torch.device, short: bool = False) -> list[Sample]:
    """Time every one of `calls` calls.

    On a GPU all are queued before the one synchronisation, and timed by events: between each two, or, where calls are
    so short that an event between them would count, once for all (`short`), which makes one sample.
    """
    if device.type == "cuda":
        return _event_samples(call, calls, short, CudaClock())
    return [_cpu_sample(call) for _ in range(calls)]


def block_seconds(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds per call of the calling thread, from one loop over many; on a GPU the time to queue them."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    elapsed = time.perf_counter() - started
    synchronize(device)
    return elapsed / calls


def host_seconds(call: Callable[[], object], calls: int, device: torch.device) -> list[float]:
    """Seconds of the calling thread for each of `calls` calls, every one on an idle device.

    A queue that is full would make the host wait: on a GPU it holds about a thousand launches, a few models' worth.
    """
    seconds = []
    for _ in range(calls):
        synchronize(device)
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    synchronize(device)
    return seconds


def warm_up(call: Callable[[], object], device: torch.device, limit: float) -> float:
    """Call until the median of a few calls no longer falls, for at most `limit` seconds; the last median.

    A GPU's clocks need a moment under load before they stay where they are, however short the calls.
    """
    started = time.perf_counter()
    deadline, least = started + limit, started + (min(CLOCKS, limit) if device.type == "cuda" else 0.0)
    before = float("inf")
    for turn in itertools.count():
        median = statistics.median(sample.seconds for sample in call_samples(call, WINDOW, device))
        stable = turn > 0 and median * STABLE > before and time.perf_counter() > least
        if stable or time.perf_counter() > deadline:
            return median
        before = median
    raise AssertionError("unreachable")


def cycle(items: Sequence[tuple[object, ...]], step: Callable[..., object]) -> Callable[[], object]:
    """A call of `step` that takes the next arguments each time, so that no cache holds them."""
    turns: Iterator[tuple[object, ...]] = itertools.cycle(items)
    return lambda: step(*next(turns))


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new measurement of `peak_memory`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # else it counts from the start of the process
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the largest resident set so far


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes at the most since `reset_peak_memory`, with one more call.

    On a GPU what PyTorch allocates during that call, above what is allocated before it: weights, inputs and the
    optimiser's state are not in it.  On a CPU the resident set of the whole process.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        reset_peak_memory(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    call()
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def synchronize(device: torch.device) -> None:
    """Wait for a device that works on its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_sample(call: Callable[[], object]) -> Sample:
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.perf_counter()
    call()
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    return Sample(seconds, after.ru_minflt - before.ru_minflt, after.ru_stime - before.ru_stime)


class CudaClock:
    """CUDA events; tests put another clock in its place."""

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize()


def _event_samples(call: Callable[[], object], calls: int, short: bool, clock: Any) -> list[Sample]:
    between = 1 if short else calls
    events = [clock.event() for _ in range(between + 1)]
    clock.synchronize()
    before = resource.getrusage(resource.RUSAGE_SELF)
    events[0].record()
    for event in events[1:]:
        for _ in range(calls // between):
            call()
        event.record()
    clock.synchronize()
    after = resource.getrusage(resource.RUSAGE_SELF)
    faults = (after.ru_minflt - before.ru_minflt) / calls
    system = (after.ru_stime - before.ru_stime) / calls
    scale = between / calls / 1e3  # events count milliseconds
    return [Sample(start.elapsed_time(end) * scale, faults, system) for start, end in itertools.pairwise(events)]
