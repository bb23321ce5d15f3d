"""Output buffers that survive from one call to the next.

A large tensor from the C allocator is fresh memory each time: the kernel hands out pages one fault at a time, zeroed,
at a few GB/s, which for the early layers of a ResNet costs more than the arithmetic (ResNet-50, batch 16, float32: 460
of 680 ms in eager PyTorch were spent in the kernel).  PyTorch's CUDA allocator keeps freed blocks for the same reason.
Here a tensor of a megabyte or more lives in a block of huge pages that is used again once no tensor refers to it.

The pool keeps at most RESFUSE_CPU_POOL_MB megabytes (default 1024) of blocks, in use or not; what is over that comes
from the ordinary allocator.  0 turns it off; `clear` returns the unused blocks to the system.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import threading
from bisect import insort

import torch
from torch import Tensor

SMALLEST = 1 << 20
_HUGE_PAGE = 2 << 20

# Reference counts say whether a block is in use: that needs the interpreter's lock.
_usable = hasattr(mmap, "MADV_HUGEPAGE") and getattr(sys, "_is_gil_enabled", lambda: True)()
_limit = int(os.environ.get("RESFUSE_CPU_POOL_MB", "1024")) << 20 if _usable else 0
_lock = threading.Lock()


class _Block:
    """A block of memory and the storage that exposes it to PyTorch."""

    __slots__ = ("memory", "size", "storage")

    def __init__(self, size: int) -> None:
        self.size = size
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_HUGEPAGE)

    def __lt__(self, other: _Block) -> bool:
        return self.size < other.size

    def free(self) -> bool:
        """Whether no tensor uses the block: a storage made of it holds a reference to `memory`."""
        return sys.getrefcount(self.memory) <= _UNUSED


_blocks: list[_Block] = []  # by size
_total = 0


def empty(shape: torch.Size | tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised dense CPU tensor, from the pool where it is large."""
    numel = math.prod(shape)
    size = numel * dtype.itemsize
    if SMALLEST <= size <= _limit:
        with _lock:
            block = _take(size)
            if block is not None:
                flat = torch.frombuffer(block.memory, dtype=dtype, count=numel)
                # set_ and not as_strided: the result must not be a view, which autograd treats differently.
                return torch.empty(0, dtype=dtype, device="cpu").set_(flat.untyped_storage(), 0, shape, stride)
    return torch.empty_strided(shape, stride, dtype=dtype, device="cpu")


def empty_like(tensor: Tensor) -> Tensor:
    """An uninitialised tensor of the shape, strides and dtype of a dense CPU tensor."""
    if tensor.nbytes < SMALLEST:
        return torch.empty_like(tensor)
    return empty(tensor.shape, tensor.stride(), tensor.dtype)


def clear() -> None:
    """Give the blocks that no tensor uses back to the system."""
    global _total
    with _lock:
        _blocks[:] = [block for block in _blocks if not block.free()]
        _total = sum(block.size for block in _blocks)


def allocated() -> int:
    """Bytes held by the pool."""
    return _total


def _take(size: int) -> _Block | None:
    """The smallest free block that fits without wasting half of it, or a new one within the limit."""
    global _total
    rounded = -(-size // _HUGE_PAGE) * _HUGE_PAGE
    for block in _blocks:
        if block.size >= size and block.size <= 2 * rounded and block.free():
            return block
    if _total + rounded > _limit:
        _drop_unused(_total + rounded - _limit)
        if _total + rounded > _limit:
            return None
    block = _Block(rounded)
    insort(_blocks, block)
    _total += rounded
    return block


def _drop_unused(size: int) -> None:
    """Free unused blocks, smallest first, until `size` bytes are gone or none is left."""
    global _total
    for block in [block for block in _blocks if block.free()]:
        if size <= 0:
            return
        _blocks.remove(block)
        _total -= block.size
        size -= block.size


def _unused_references() -> int:
    block = _Block(mmap.PAGESIZE)
    return sys.getrefcount(block.memory)


_UNUSED = _unused_references()
