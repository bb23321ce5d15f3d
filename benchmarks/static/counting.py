"""Counting the kernels that a call launches."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

LOOKED_AT = {"resfuse_cpu::rows_live", "resfuse_cpu::copy_finite", "resfuse_cpu::snapshot_matches"}
"""Values are looked at, none are computed."""
ALLOCATIONS = ("aten::empty", "aten::new_empty", "aten::as_strided_", "aten::_reshape_alias")


class Operators(TorchDispatchMode):
    """Counts the operators that read or write memory; views and allocations do not."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().partition(".")[0]
        if not (func.is_view or name in LOOKED_AT or name.startswith(ALLOCATIONS) or _synchronisation(name, kwargs)):
            self.counts[name] += 1
        return func(*args, **kwargs)


def described(counts: Counter[str]) -> str:
    """Sorted and without numbers where they are one: "2 aten::add, aten::mm"."""
    return ", ".join(f"{count} {name}" if count > 1 else name for name, count in sorted(counts.items()))


def _synchronisation(name: str, kwargs: dict[str, Any]) -> bool:
    """The zeros that blocks meet at: on a GPU they are made once per stream, not once per call."""
    return name == "aten::zeros" and kwargs.get("dtype") == torch.int32
