"""Timing of repeated calls, with the operating system's share of the work."""

from __future__ import annotations

import contextlib
import itertools
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

WINDOW = 3
"""Calls whose median is compared with that of the calls before, to see whether a step has become stable."""
STABLE = 1.05


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


def call_samples(call: Callable[[], object], calls: int, device: torch.device) -> list[Sample]:
    """Time every one of `calls` calls; on a GPU by events, with all calls queued before the one synchronisation."""
    return _cuda_samples(call, calls) if device.type == "cuda" else [_cpu_sample(call) for _ in range(calls)]


def block_seconds(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds per call of the calling thread, from one loop over many; on a GPU the time to queue them."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    elapsed = time.perf_counter() - started
    synchronize(device)
    return elapsed / calls


def warm_up(call: Callable[[], object], device: torch.device, limit: float) -> float:
    """Call until the median of a few calls no longer falls, for at most `limit` seconds; the last median."""
    deadline = time.perf_counter() + limit
    before = float("inf")
    for turn in itertools.count():
        median = statistics.median(sample.seconds for sample in call_samples(call, WINDOW, device))
        if (turn and median * STABLE > before) or time.perf_counter() > deadline:
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


def peak_memory(device: torch.device) -> int:
    """Bytes: the GPU memory allocated by PyTorch, or the resident set of the process, at the most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
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


def _cuda_samples(call: Callable[[], object], calls: int) -> list[Sample]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    torch.cuda.synchronize()
    before = resource.getrusage(resource.RUSAGE_SELF)
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    after = resource.getrusage(resource.RUSAGE_SELF)
    faults = (after.ru_minflt - before.ru_minflt) / calls
    system = (after.ru_stime - before.ru_stime) / calls
    return [Sample(start.elapsed_time(end) / 1e3, faults, system) for start, end in itertools.pairwise(events)]
