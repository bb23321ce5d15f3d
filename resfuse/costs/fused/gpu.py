"""The GPU that plans are made for."""

from __future__ import annotations

from resfuse.costs.device import Device
from resfuse.costs.known import DEVICES


def gpu(device: Device) -> Device:
    """The device itself, or an H100 for a CPU: kernels for GPUs only run there in an emulator or an interpreter.

    Raises:
        ValueError: the description of a GPU lacks what plans depend on.
    """
    if device.type != "cuda":
        return DEVICES["h100"]
    missing = [name for name in ("capability", "num_sms", "shared_memory") if not getattr(device, name)]
    if missing:
        raise ValueError(f"device: {device.name} has no {', '.join(missing)}, which plans for a GPU depend on")
    return device
