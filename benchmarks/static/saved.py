"""Bytes that a forward pass keeps for its backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import resfuse
from benchmarks.static.subjects import BLOCKS, EAGER, FUSED, OPS, Call, models
from benchmarks.static.table import Row

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def rows(group: str, toolchain: str) -> list[Row]:
    """Of operators, blocks and models in training, in float32 and under autocast."""
    with resfuse.use_backend(None):
        return [
            row
            for subject in (*OPS, *BLOCKS, *models(2, 32))
            for provider in (EAGER, FUSED)
            for name, dtype in DTYPES.items()
            for call in subject.calls(provider, dtype=dtype, modes=("train",))
            for row in _rows(group, toolchain, call, name)
        ]


def saved(call: Call) -> list[Tensor]:
    """What a forward keeps, one tensor per storage; its parameters and buffers, and casts of them, are left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in call.parameters()}
    weights = {sorted_shape(tensor) for tensor in call.parameters() if tensor.dim() > 1}
    found: dict[int, Tensor] = {}  # kept alive: no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own and sorted_shape(tensor) not in weights:
            found[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call.phases()["forward"]()
    return list(found.values())


def sorted_shape(tensor: Tensor) -> tuple[int, ...]:
    """The same for a matrix and its transpose."""
    return tuple(sorted(tensor.shape))


def _rows(group: str, toolchain: str, call: Call, dtype: str) -> Iterator[Row]:
    subject, kept = call.subject, saved(call)
    value = sum(tensor.untyped_storage().nbytes() for tensor in kept)
    yield Row(
        group, subject.level, f"{subject.name} {dtype}", call.mode, "forward", call.provider,
        value, f"{len(kept)} tensors", toolchain,
    )  # fmt: skip
