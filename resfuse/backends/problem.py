"""What a backend is asked: whether it can run a verb on tensors like these."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class AbsentDevice(NamedTuple):
    """A GPU that need not be in this machine, in place of a `torch.device`: what would run on it can be asked, too.

    The backends for GPUs then count as available.
    """

    capability: tuple[int, int]
    """CUDA compute capability."""
    type: str = "cuda"

    def __str__(self) -> str:
        return f"{self.type} of compute capability {'.'.join(map(str, self.capability))}"


class Problem(NamedTuple):
    """What a backend needs to know to say whether it can run a verb.  Hashable: choices are cached by it."""

    verb: str
    device: torch.device | AbsentDevice
    dtype: torch.dtype
    shape: torch.Size
    conv: tuple[torch.Size, tuple[int, int], tuple[int, int], tuple[int, int], int] | None = None
    """(weight shape, stride, padding, dilation, groups) of a convolution, None for the other verbs."""


def capability(device: torch.device | AbsentDevice) -> tuple[int, int]:
    """The CUDA compute capability of a GPU, in this machine or not; the only place where a choice asks for it."""
    return device.capability if isinstance(device, AbsentDevice) else _present_capability(device)


@functools.cache
def _present_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
