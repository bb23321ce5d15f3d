"""A machine to reason about: what it moves and multiplies at most, and what a launch costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch


@dataclasses.dataclass(frozen=True)
class Device:
    """The ceilings of a machine, measured or from its datasheet (`source` says which)."""

    name: str
    """As its driver reports it: "NVIDIA H200"."""
    type: str
    """ "cuda" or "cpu"."""
    bandwidth: float
    """B/s of a large copy, bytes read plus bytes written."""
    rates: Mapping[torch.dtype, float]
    """FLOP/s of a large matrix product (a multiply-add is two), by the dtype of its operands."""
    memory: int
    """B of the memory that tensors are in."""
    launch: float
    """s that one more kernel launch costs in a stream that is never empty; 0 on a CPU."""
    source: str
    """ "measured on ..., <date>" or "datasheet ...", with what was derived."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability."""
    num_sms: int = 0
    """Multiprocessors of a GPU."""
    shared_memory: int = 0
    """B of shared memory that one block can have."""
    l2: int = 0
    """B of the last-level cache."""

    def rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of a large matrix product in `dtype`; a dtype without an entry has float32's.

        Raises:
            ValueError: the device has a rate neither of `dtype` nor of float32.
        """
        found = self.rates.get(dtype, self.rates.get(torch.float32))
        if found is None:
            raise ValueError(f"{self.name} has no rate of {dtype}, nor of torch.float32, only of {list(self.rates)}")
        return found
