"""What an operation costs whatever machine runs it, and the least time in which a machine can."""

from __future__ import annotations

from typing import NamedTuple

import torch

from resfuse.costs.device import Device


class Cost(NamedTuple):
    """Work of one or more kernels.  `+` adds them up: one after the other."""

    flops: int
    """Floating-point operations of matrix products: a multiply-add is two.  Element-wise arithmetic is not counted: it
    hides behind the bytes."""
    bytes: int
    """Bytes read plus bytes written of device memory, each operand of each launch once."""
    launches: int
    """Kernel launches on a GPU, calls of primitives on a CPU."""

    def __add__(self, other: object) -> Cost:  # not the concatenation of tuples
        if not isinstance(other, Cost):
            return NotImplemented
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.launches + other.launches)


Kernels = tuple[Cost, ...]
"""In the order in which they run."""

FREE = Cost(0, 0, 0)


def kernel(*touched: int, flops: int = 0) -> Cost:
    """One launch that reads or writes operands of so many bytes, each once."""
    return Cost(flops, sum(touched), 1)


def total(kernels: Kernels) -> Cost:
    """The sum; of no kernels nothing."""
    return sum(kernels, FREE)


def roofline(cost: Cost, dtype: torch.dtype, device: Device) -> float:
    """Seconds that `cost` takes at least: the longer of its arithmetic and its traffic, launches not counted.

    Args:
        cost: of one kernel.  Of several the sum of the single times is the better bound: one is limited by memory while
            the next is limited by arithmetic.
        dtype: of the operands of the matrix products.
        device: the ceilings.

    Source: Williams, Waterman & Patterson 2009, Roofline (doi:10.1145/1498765.1498785).
    """
    return max(cost.flops / device.rate(dtype), cost.bytes / device.bandwidth)
