"""Bytes that a forward pass keeps for its backward: storages, each once, that are neither parameters nor buffers."""

from __future__ import annotations

import torch

import resfuse
from benchmarks.memory.counting import saved_bytes
from benchmarks.static.subjects import BLOCKS, EAGER, FUSED, OPS, Call, models
from benchmarks.static.table import Row

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def rows(group: str, toolchain: str) -> list[Row]:
    """Of operators, blocks and models in training, in float32 and under autocast, whose casts of weights are kept."""
    with resfuse.use_backend(None):
        return [
            _row(group, toolchain, call, name)
            for subject in (*OPS, *BLOCKS, *models(2, 32))
            for provider in (EAGER, FUSED)
            for name, dtype in DTYPES.items()
            for call in subject.calls(provider, dtype=dtype, modes=("train",))
        ]


def saved(call: Call) -> int:
    """Of one call."""
    return saved_bytes(call.phases()["forward"], call.parameters())


def _row(group: str, toolchain: str, call: Call, dtype: str) -> Row:
    subject = call.subject
    name = f"{subject.name} {dtype}"
    return Row(group, subject.level, name, call.mode, "forward", call.provider, saved(call), "", toolchain)
