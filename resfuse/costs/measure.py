"""The ceilings of this machine: what a large copy moves, and how fast matrices are multiplied."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resfuse.costs.device import Device
from resfuse.processor import processor_name

Run = Callable[[], object]
Clock = Callable[[Run], float]
"""Seconds of one run."""

_FEWEST_REPEATS = 3
_CACHES = 4  # times the last-level cache, for source and target each
_CPU_COPY, _CUDA_COPY = 64 << 20, 1 << 30  # B, at least
_CPU_SIDE, _CUDA_SIDE = 1024, 8192  # of the matrices
_LAUNCHES = 200
_ASSUMED_CACHE = 32 << 20


def measure_device(device: torch.device, *, seconds: float = 0.5) -> Device:
    """The ceilings of this machine, measured now, on random data and with all of torch's threads.

    The copy reads and writes a tensor several times the last-level cache; a matrix product is of 1024 x 1024 (CPU) or
    8192 x 8192 (GPU), in float32 (on a GPU as PyTorch's switch for convolutions says: TF32, unless it is off) and
    bfloat16, on a GPU float16 too.  On a CPU one library multiplies matrices and another convolves: a convolution is
    timed as well, and the better of the two counts.  A launch is what one more tiny kernel adds to a CUDA graph.

    Args:
        device: a CPU or a CUDA device of this machine.
        seconds: to spend on each of the figures, all of which are medians; three repeats are made whatever they take.

    Raises:
        ValueError: a device of another type, or `seconds` is not positive.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected a CPU or a CUDA device, got {device}")
    if not seconds > 0:
        raise ValueError(f"seconds: expected a positive number, got {seconds}")
    today = datetime.date.today().isoformat()
    if device.type == "cuda":
        return _measure_gpu(device, seconds, today)
    cache = last_level_cache()
    bandwidth = _bandwidth(device, max(_CPU_COPY, _CACHES * cache), seconds, _cpu_clock)
    dtypes = (torch.float32, torch.bfloat16)
    rates = {
        dtype: max(_rate(device, dtype, _CPU_SIDE, seconds, _cpu_clock), _convolution_rate(dtype, seconds))
        for dtype in dtypes
    }
    name = processor_name()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(
        name, "cpu", bandwidth, rates, memory, 0.0,
        f"measured on {name}, {torch.get_num_threads()} threads, {today}", l2=cache,
    )  # fmt: skip


def _measure_gpu(device: torch.device, seconds: float, today: str) -> Device:
    found: Any = torch.cuda.get_device_properties(device)
    with torch.cuda.device(device):
        size = min(max(_CUDA_COPY, _CACHES * found.L2_cache_size), found.total_memory // 8)
        bandwidth = _bandwidth(device, size, seconds, _cuda_clock)
        with _multiplying_as_convolutions():
            rates = {
                dtype: _rate(device, dtype, _CUDA_SIDE, seconds, _cuda_clock)
                for dtype in (torch.float32, torch.bfloat16, torch.float16)
            }
        launch = _launch_time(device, seconds)
    return Device(
        found.name, "cuda", bandwidth, rates, found.total_memory, launch, f"measured on {found.name}, {today}",
        (found.major, found.minor), found.multi_processor_count, found.shared_memory_per_block_optin,
        found.L2_cache_size,
    )  # fmt: skip


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core, as Linux reports it; 32 MiB where it does not."""
    sizes = [
        int(match[1]) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[match[2]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (match := re.fullmatch(r"(\d+)([KMG])", path.read_text().strip()))
    ]
    return max(sizes, default=_ASSUMED_CACHE)


def _bandwidth(device: torch.device, size: int, seconds: float, clock: Clock) -> float:
    """Bytes read plus bytes written per second, of a copy of `size` bytes."""
    source = _random(size // 4, device)
    target = _random(size // 4, device)  # written once before: its pages exist
    return 2 * source.nbytes / _median(lambda: target.copy_(source), seconds, clock)


def _rate(device: torch.device, dtype: torch.dtype, side: int, seconds: float, clock: Clock) -> float:
    first, second = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(first)
    return 2 * side**3 / _median(lambda: torch.mm(first, second, out=product), seconds, clock)


def _convolution_rate(dtype: torch.dtype, seconds: float) -> float:
    """Of a 3x3 convolution of ResNets on the CPU, in channels_last and with as many products as the matrix product."""
    images, channels, extent = 4, 256, 21
    input, weight = (
        torch.randn(shape).to(dtype, memory_format=torch.channels_last)
        for shape in ((images, channels, extent, extent), (channels, channels, 3, 3))
    )
    flops = 2 * images * extent**2 * channels**2 * 9
    with torch.inference_mode():
        return flops / _median(lambda: F.conv2d(input, weight, padding=1), seconds, _cpu_clock)


def _random(numel: int, device: torch.device) -> Tensor:
    """Random numbers, repeated: making so many anew would take longer than all measurements."""
    block = torch.randn(min(numel, 1 << 20), device=device)
    return block.repeat(-(-numel // block.numel()))[:numel]


def _median(run: Run, seconds: float, clock: Clock) -> float:
    run()  # allocates, chooses an algorithm, wakes the clocks
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < _FEWEST_REPEATS or time.perf_counter() < end:
        times.append(clock(run))
    return statistics.median(times)


def _cpu_clock(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _cuda_clock(run: Run) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _launch_time(device: torch.device, seconds: float) -> float:
    tiny = torch.ones(1, device=device)
    tiny.add_(1)  # loads the kernel, which a capture can not
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_LAUNCHES):
            tiny.add_(1)
    return _median(graph.replay, seconds, _cuda_clock) / _LAUNCHES


@contextlib.contextmanager
def _multiplying_as_convolutions() -> Iterator[None]:
    """Matrix products of float32 in TF32 where convolutions use it."""
    products: Any = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]
    try:
        yield
    finally:
        products.fp32_precision = before
