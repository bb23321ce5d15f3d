"""What kernels have to know about a GPU."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class DeviceProperties:
    """What the choice of a configuration depends on."""

    name: str
    capability: tuple[int, int]
    num_sms: int
    shared_memory: int
    """Bytes that one program can have."""

    registers: int = 65536  # per multiprocessor, as the next one; the same from sm_80 to sm_100
    warps: int = 64


H100 = DeviceProperties("NVIDIA H100 80GB HBM3", (9, 0), 132, 232448)
A100 = DeviceProperties("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166912)


@functools.cache
def cuda_properties(device: torch.device) -> DeviceProperties:
    """Those of a GPU of this machine."""
    found: Any = torch.cuda.get_device_properties(device)
    return DeviceProperties(
        found.name, (found.major, found.minor), found.multi_processor_count, found.shared_memory_per_block_optin
    )


def resident_programs(
    device: DeviceProperties, num_warps: int, registers: int | None = None, shared_memory: int = 0
) -> int:
    """How many programs are certain to be on the device at the same time: the most that a grid barrier may wait for.

    Args:
        device: where.
        num_warps: of a program.
        registers: that a thread has at most; None: whatever lets one program run.
        shared_memory: that a program has at most, in bytes.
    """
    per_sm = 1
    if registers is not None:
        per_sm = min(device.registers // (32 * num_warps * -(-registers // 8) * 8), device.warps // num_warps)
        if shared_memory:
            per_sm = min(per_sm, device.shared_memory // (shared_memory + 1024))
    return max(1, per_sm) * device.num_sms
