"""How many kernels a call launches, counted by PyTorch's profiler on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

COPIES = ("Memcpy", "Memset")
"""What the profiler lists beside kernels; a copy or fill by the driver's own means is no kernel."""


def count_launches(call: Callable[[], object], device: torch.device) -> int | None:
    """Kernels of one call; None where they can not be counted: not a GPU, or a profiler without access to it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        call()
        torch.cuda.synchronize(device)
    return count_kernels(profile.events() or ()) or None


def count_kernels(events: Iterable[Any]) -> int:
    """Kernels among the profiler's events (`torch.autograd.profiler_util.FunctionEvent`)."""
    on_device = (event for event in events if event.device_type == torch.autograd.DeviceType.CUDA)
    return sum(1 for event in on_device if not event.is_user_annotation and not event.name.startswith(COPIES))
