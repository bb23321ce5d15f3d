"""Peak memory of a step that is run, and the largest batch that fits: by CUDA's allocator, or counted on a CPU."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from benchmarks.memory import counting
from benchmarks.memory.account import COMPILED, arguments, prepare
from benchmarks.memory.networks import Network
from benchmarks.providers.base import Setting

WARM_UP = 3
"""Steps before the one that counts: they compile, make the momentum, and let cuDNN try its algorithms."""


def peak_bytes(network: Network, provider: str, batch: int, setting: Setting) -> int:
    """The most memory that tensors and workspace have at once in a training step.

    On a CPU the tensors are counted that are alive after each operator: what allocators and libraries need is not seen.

    Raises:
        torch.OutOfMemoryError: it is more than there is.
        ValueError: a compiled step on a CPU, where its tensors can not be seen.
    """
    if provider == COMPILED and setting.device.type == "cpu":
        raise ValueError("provider: the tensors of a compiled step can be followed on a GPU only")
    with _clean(setting.device):
        module = network.make().to(setting.device)
        given = arguments(network, batch, setting)
        step = functools.partial(prepare(module, provider, given, setting), *given)
        if setting.device.type == "cuda":
            return _allocated(step, setting.device)
        timeline = counting.live_bytes(step, [*module.parameters(), *module.buffers(), *given])
        return max(alive for _, alive in timeline)


def fits(network: Network, provider: str, limit: int, setting: Setting, batch: int) -> bool:
    """Whether a training step runs in so many bytes.

    On a GPU those are all that PyTorch's allocator may take from the device, what it wastes included; the CUDA context
    comes on top.
    """
    try:
        with _limited(limit, setting.device):
            return peak_bytes(network, provider, batch, setting) <= limit
    except torch.OutOfMemoryError:
        return False


def _allocated(step: Callable[[], object], device: torch.device) -> int:
    """By CUDA's caching allocator, with everything that was there before the step."""
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


class Bracket(NamedTuple):
    """The largest batch found that fits (0: none), and the smallest that does not (None: none was found)."""

    fits: int
    fails: int | None

    @property
    def exact(self) -> bool:
        """Whether nothing is between them."""
        return self.fails == self.fits + 1


def search(predicted: int, fits: Callable[[int], bool], tries: int = 16) -> Bracket:
    """Find the largest batch that fits, from a prediction; a right one takes two tries.

    Args:
        predicted: where to begin, at least 0.
        fits: whether a batch fits; assumed to be true up to some batch and false beyond.
        tries: calls of `fits` at most; if they do not suffice the bracket is not `exact`.
    """
    low, high, step = 0, None, 1
    candidate = max(1, predicted)
    while tries > 0 and (high is None or high > low + 1):
        tries -= 1
        if fits(candidate):
            low = candidate
        else:
            high = candidate
        if high is None:
            candidate, step = low + step, 2 * step
        elif low == 0 and high > 1:
            candidate, step = max(1, high - step), 2 * step
        else:
            candidate = (low + high) // 2
    return Bracket(low, high)


@contextlib.contextmanager
def _clean(device: torch.device) -> Iterator[None]:
    """Nothing of the step before is in memory, and nothing of this one stays."""
    try:
        _release(device)
        yield
    finally:
        _release(device)


def _release(device: torch.device) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _limited(limit: int, device: torch.device) -> Iterator[None]:
    """PyTorch's allocator takes no more than so many bytes from a GPU."""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
