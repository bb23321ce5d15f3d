"""How the batch norm kernels cut a tensor into tiles, and the tiles into parts for the programs of a reduction."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resfuse.backends.integers import cdiv, power_of_two_above
from resfuse.backends.triton.launch import interpreted, properties

INTERPRETED_PROGRAMS = 3  # of a reduction: enough to merge something, and few because each takes long
INTERPRETED_THREADS = 4  # times as many: what a tile costs there hardly depends on its size


class Work(NamedTuple):
    """Threads of a program, and elements of a tile that each of them has."""

    threads: int
    elements: int
    scattered: int
    """Elements where they have to be addressed one by one."""


REDUCTION, ELEMENTWISE = Work(512, 16, 8), Work(128, 32, 8)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a tensor is cut into tiles, and the tiles into parts."""

    images: int
    positions: int
    channels: int
    channels_last: bool
    block_m: int
    block_n: int
    num_warps: int
    parts: int
    tiles_per_part: int
    block_parts: int
    """Parts that are merged at a time."""

    @property
    def channel_blocks(self) -> int:
        return cdiv(self.channels, self.block_n)

    @property
    def tiles(self) -> int:
        return cdiv(self.positions, self.block_m) * self.images

    @property
    def programs(self) -> int:
        """Of a reduction."""
        return self.parts * self.channel_blocks

    @property
    def constants(self) -> dict[str, Any]:
        return {"CHANNELS_LAST": self.channels_last, "BLOCK_M": self.block_m, "BLOCK_N": self.block_n}


@functools.lru_cache(maxsize=4096)
def plan(shape: torch.Size, channels_last: bool, itemsize: int, work: Work, most_programs: int) -> Plan:
    """Tiles of 256 bytes or more side by side, where the tensor has them, in parts for `most_programs` at a time."""
    n, channels, h, w = shape
    images, positions = (1, n * h * w) if channels_last else (n, h * w)
    elements = work.scattered if (channels if channels_last else positions) % 16 else work.elements
    if channels_last:
        block_n = min(power_of_two_above(channels), 256 // itemsize)
        block_m = min(power_of_two_above(positions), work.threads * elements // block_n)
    else:
        block_m = min(power_of_two_above(positions), 512 // itemsize)
        block_n = min(power_of_two_above(channels), work.threads * elements // block_m)
    while block_m > 1 and channels_last and block_m * channels >= 2**31:  # offsets within a tile have 32 bits
        block_m //= 2
    while block_n > 1 and not channels_last and block_n * positions >= 2**31:
        block_n //= 2
    tiles = cdiv(positions, block_m) * images
    tiles_per_part = cdiv(tiles, max(1, most_programs // cdiv(channels, block_n)))
    parts = cdiv(tiles, tiles_per_part)
    return Plan(
        images, positions, channels, channels_last, block_m, block_n,
        num_warps=max(1, block_m * block_n // (32 * elements)),
        parts=parts,
        tiles_per_part=tiles_per_part,
        block_parts=min(power_of_two_above(parts), work.threads * work.elements // block_n),
    )  # fmt: skip


def reduction(x: Tensor) -> Plan:
    """For a dense tensor: every part is a program, and all of them may be resident."""
    if interpreted():
        work = REDUCTION._replace(threads=REDUCTION.threads * INTERPRETED_THREADS)
        return _plan_of(x, work, INTERPRETED_PROGRAMS)
    return _plan_of(x, REDUCTION, properties(x.device).num_sms)


def elementwise(x: Tensor) -> Plan:
    """For a dense tensor: every tile is a program."""
    work = ELEMENTWISE._replace(threads=ELEMENTWISE.threads * INTERPRETED_THREADS) if interpreted() else ELEMENTWISE
    return _plan_of(x, work, 1)


def _plan_of(x: Tensor, work: Work, most_programs: int) -> Plan:
    return plan(x.shape, x.is_contiguous(memory_format=torch.channels_last), x.element_size(), work, most_programs)
