"""The pool of output buffers: memory is used again, and never by two tensors at a time."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from resfuse.backends import buffer_pool
from tests.needs import imported_again

pytestmark = pytest.mark.skipif(buffer_pool._limit == 0, reason="the pool is off")

MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def fresh_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool of its own: other tests may have left blocks in use."""
    monkeypatch.setattr(buffer_pool, "_blocks", [])
    monkeypatch.setattr(buffer_pool, "_total", 0)


def allocate(megabytes: float = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    numel = int(megabytes * MEGABYTE) // dtype.itemsize
    return buffer_pool.empty((numel,), (1,), dtype)


def test_memory_is_used_again() -> None:
    first = allocate(3)
    address = first.data_ptr()
    second = allocate(3)
    assert second.data_ptr() != address
    del first
    assert allocate(3).data_ptr() == address


def test_a_view_keeps_the_memory() -> None:
    tensor = allocate(3)
    address, view = tensor.data_ptr(), tensor[5:7]
    del tensor
    assert allocate(3).data_ptr() != address
    del view
    assert allocate(3).data_ptr() == address


def test_autograd_keeps_the_memory() -> None:
    tensor = allocate(2).fill_(3)
    leaf = torch.ones(tensor.shape, requires_grad=True)
    output = (leaf * tensor).sum()
    address = tensor.data_ptr()
    del tensor
    assert allocate(2).fill_(0).data_ptr() != address
    output.backward()
    assert (leaf.grad == 3).all()


def test_shape_strides_and_dtype() -> None:
    like = torch.empty(2, 16, 256, 256, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    tensor = buffer_pool.empty_like(like)
    assert (tensor.shape, tensor.stride(), tensor.dtype) == (like.shape, like.stride(), like.dtype)
    assert buffer_pool.allocated() > 0
    assert not tensor._is_view()


def test_small_tensors_do_not_come_from_the_pool() -> None:
    allocate(0.5)
    assert buffer_pool.allocated() == 0


def test_a_much_larger_block_is_not_spent() -> None:
    large = allocate(64)
    address = large.data_ptr()
    del large
    assert allocate(3).data_ptr() != address


def test_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer_pool, "_limit", 8 * MEGABYTE)
    kept = [allocate(4) for _ in range(4)]
    assert buffer_pool.allocated() <= 8 * MEGABYTE
    assert len({tensor.data_ptr() for tensor in kept}) == 4
    del kept
    allocate(7)  # unused blocks make room
    assert buffer_pool.allocated() <= 8 * MEGABYTE


def test_clear_returns_what_is_not_in_use() -> None:
    kept, dropped = allocate(2), allocate(6)
    del dropped
    buffer_pool.clear()
    assert buffer_pool.allocated() == 2 * MEGABYTE
    kept.fill_(1)


def test_copies_and_pickles_have_their_own_memory() -> None:
    tensor = allocate(2).fill_(1)
    copied = copy.deepcopy(tensor)
    file = io.BytesIO()
    torch.save(tensor, file)
    tensor.fill_(2)
    file.seek(0)
    assert (copied == 1).all()
    assert (torch.load(file) == 1).all()


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_no_two_tensors_share_memory(requests: list[tuple[int, int]]) -> None:
    """Allocate, release in any order: every live tensor keeps the number that was written to it."""
    live: list[tuple[int, Tensor]] = []
    for number, (megabytes, release) in enumerate(requests):
        live.append((number, allocate(megabytes).fill_(number)))
        if release < len(live):
            live.pop(release)
        assert all((tensor == value).all() for value, tensor in live)


def test_threads() -> None:
    wrong: list[int] = []

    def hammer(number: int) -> None:
        for _ in range(50):
            tensor = allocate(1 + number % 3).fill_(number)
            if not (tensor == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=hammer, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_switched_off_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESFUSE_CPU_POOL_MB", "0")
    pool = imported_again(buffer_pool)
    pool.empty((1 << 20,), (1,), torch.float32)
    assert pool.allocated() == 0
