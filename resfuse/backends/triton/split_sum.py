"""Sums in a fixed order: of the parts that split-K leaves, and of a gradient over its pixels.

The parts are added by a launch of their own.  The program that arrives last could do it, but it would be alone with as
many as 256 parts of its tile, while a launch spreads them over the whole device; and it needs no counters.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse.backends.integers import cdiv, power_of_two_above
from resfuse.backends.triton.launch import launch, properties

_ELEMENTS = 4096  # of a program's tile
_NUM_WARPS = 4
_BLOCK_C = 64


@triton.jit
def sum_splits_kernel(parts_ptr, out_ptr, size, splits, BLOCK_SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = sum over j of parts[j, i]: BLOCK sums per program, BLOCK_SPLITS parts at a time.

    Reads 4 splits size bytes, writes itemsize size.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    acc = tl.zeros((BLOCK_SPLITS, BLOCK), dtype=tl.float32)
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        mask = (split < splits)[:, None] & inside[None, :]
        acc += tl.load(parts_ptr + split.to(tl.int64)[:, None] * size + offsets[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + offsets, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def column_sum_kernel(
    x_ptr, parts_ptr, rows, rows_per_split, C: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """parts[j, c] = sum of x[i, c] over the rows i of part j = program_id(1); reads x once."""
    part = tl.program_id(1)
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = part.to(tl.int64) * rows_per_split
    end = tl.minimum(first + rows_per_split, rows)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_C), dtype=tl.float32)
    for row in range(first, end, BLOCK_ROWS):
        i = row + tl.arange(0, BLOCK_ROWS)
        mask = (i < end)[:, None] & (channels < C)[None, :]
        acc += tl.load(x_ptr + i[:, None] * C + channels[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(parts_ptr + part * C + channels, tl.sum(acc, axis=0), mask=channels < C)


def sum_splits(parts: Tensor, out: Tensor) -> None:
    """out = parts.sum(0), for dense float32 parts with the element order of `out`."""
    splits, size = parts.shape[0], out.numel()
    block_splits = min(64, power_of_two_above(splits))
    block = _ELEMENTS // block_splits
    grid = (cdiv(size, block),)
    launch(
        sum_splits_kernel, grid, parts, out, size, splits, BLOCK_SPLITS=block_splits, BLOCK=block, num_warps=_NUM_WARPS
    )


def column_sum(x: Tensor, out: Tensor) -> None:
    """out[c] = the sum over the pixels of x, a dense channels_last tensor: the gradient of a bias.  Two launches."""
    channels = x.shape[1]
    rows = x.numel() // channels
    block_rows = _ELEMENTS // _BLOCK_C
    tiles = cdiv(channels, _BLOCK_C)
    splits = max(1, min(cdiv(rows, 4 * block_rows), 4 * properties(x.device).num_sms // tiles))
    rows_per_split = cdiv(cdiv(rows, splits), block_rows) * block_rows
    splits = cdiv(rows, rows_per_split)
    parts = torch.empty((splits, channels), dtype=torch.float32, device=x.device)
    launch(
        column_sum_kernel, (tiles, splits), x, parts, rows, rows_per_split,
        C=channels, BLOCK_ROWS=block_rows, BLOCK_C=_BLOCK_C, num_warps=_NUM_WARPS,
    )  # fmt: skip
    sum_splits(parts, out)
