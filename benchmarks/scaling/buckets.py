"""DDP's buckets of gradients, and how much of their communication backward hides."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

FIRST, CAP = 1 << 20, 25 << 20
"""Bytes at which DistributedDataParallel closes its first bucket, and the others (`bucket_cap_mb=25`)."""


class Gradients(NamedTuple):
    """Those of one layer: how long its backward takes, and the bytes of each gradient, in the order they get ready."""

    seconds: float
    sizes: tuple[int, ...]


class Bucket(NamedTuple):
    """Gradients that are all-reduced together."""

    size: int
    ready: float
    """s after the beginning of backward, when its last gradient is computed."""


class Overlap(NamedTuple):
    """What becomes of the communication."""

    communication: float
    """s that the all-reduces take, all together."""
    exposed: float
    """s of it after the end of backward: the last bucket at least, which is ready only then."""


def fill(layers: Sequence[Gradients], first: int = FIRST, cap: int = CAP) -> list[Bucket]:
    """The buckets: gradients in the order in which they get ready, each bucket closed as soon as it has its size.

    DDP orders them so after its first step ("rebuilt buckets"); a gradient is never split.

    Args:
        layers: in the order of backward, the last of the network first.
        first, cap: bytes; see `FIRST` and `CAP`.

    Source: Li et al. 2020, "PyTorch Distributed" (arXiv:2006.15704), section 3.2.3; torch.nn.parallel, design note.
    """
    found, size, now = [], 0, 0.0
    limits = itertools.chain((first,), itertools.repeat(cap))
    limit = next(limits)
    for seconds, sizes in layers:
        now += seconds
        for gradient in sizes:
            size += gradient
            if size >= limit:
                found.append(Bucket(size, now))
                size, limit = 0, next(limits)
    return [*found, Bucket(size, now)] if size else found


def overlap(buckets: Sequence[Bucket], backward: float, all_reduce: Callable[[int], float]) -> Overlap:
    """Let the buckets be reduced one after the other, each once it is ready, beside a backward of so many seconds.

    Backward is not slowed down by it here; on a GPU the two share multiprocessors and memory.
    """
    communication, end = 0.0, 0.0
    for bucket in buckets:
        seconds = all_reduce(bucket.size)
        communication += seconds
        end = max(end, bucket.ready) + seconds
    return Overlap(communication, max(0.0, end - backward) if communication else 0.0)
