"""Devices that can be named without being there."""

from __future__ import annotations

import torch

from resfuse.costs.device import Device

GIB = 1 << 30


def _gpu(
    name: str,
    capability: tuple[int, int],
    *,
    bandwidth: float,
    half: float,
    tf32: float,
    memory: int,
    num_sms: int,
    shared_memory: int,
    l2: int,
    source: str,
) -> Device:
    rates = {torch.bfloat16: half, torch.float16: half, torch.float32: tf32}
    return Device(
        name, "cuda", bandwidth, rates, memory, 2e-6, source, capability, num_sms, shared_memory, l2
    )  # fmt: skip


DEVICES: dict[str, Device] = {
    "h200": _gpu(
        "NVIDIA H200", (9, 0), bandwidth=4.3e12, half=790e12, tf32=395e12, memory=141 * 10**9, num_sms=132,
        shared_memory=232448, l2=50 << 20,
        source="bandwidth and bf16 measured on an NVIDIA H200, 2026-11; the rest is its datasheet's",
    ),
}  # fmt: skip
"""By short name: "h200", "h100", "a100", "b200"."""


def describe(name: str) -> Device:
    """The device of this short name.

    Raises:
        ValueError: there is none of this name; the message lists those that there are.
    """
    found = DEVICES.get(name.lower())
    if found is None:
        raise ValueError(f"device: expected one of {', '.join(DEVICES)}, got {name!r}")
    return found
