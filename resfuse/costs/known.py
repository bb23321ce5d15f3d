"""Devices that can be named without being there."""

from __future__ import annotations

import torch

from resfuse.costs.device import Device

_MIB = 1 << 20


def _gpu(
    name: str,
    capability: tuple[int, int],
    *,
    bandwidth: float,
    half: float,
    memory: float,
    num_sms: int,
    shared_memory: int,
    l2: int,
    source: str,
) -> Device:
    """float32 multiplies as TF32, PyTorch's default for convolutions: half the rate of bfloat16."""
    rates = {torch.bfloat16: half, torch.float16: half, torch.float32: half / 2}
    launch = 2e-6  # an estimate: what one more small kernel adds to a full stream; `measure_device` measures it
    return Device(
        name, "cuda", bandwidth, rates, int(memory), launch, source, capability, num_sms, shared_memory, l2 * _MIB
    )  # fmt: skip


DEVICES: dict[str, Device] = {
    "h200": _gpu(
        "NVIDIA H200", (9, 0), bandwidth=4.3e12, half=790e12, memory=141e9, num_sms=132, shared_memory=232448, l2=50,
        source="bandwidth and bfloat16 rate measured on an NVIDIA H200, 2026-11 (datasheet: 4.8 TB/s, 989 TFLOP/s); "
        "TF32 taken as half of it, launch time estimated, the rest is of its datasheet",
    ),
    "h100": _gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), bandwidth=3.35e12, half=989e12, memory=80e9, num_sms=132,
        shared_memory=232448, l2=50, source="datasheet of the H100 SXM, dense; launch time estimated",
    ),
    "a100": _gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), bandwidth=2.039e12, half=312e12, memory=80e9, num_sms=108,
        shared_memory=166912, l2=40, source="datasheet of the A100 SXM 80 GB, dense; launch time estimated",
    ),
    "b200": _gpu(
        "NVIDIA B200", (10, 0), bandwidth=8e12, half=2250e12, memory=180e9, num_sms=148, shared_memory=232448, l2=126,
        source="datasheet of the B200 SXM, dense; launch time estimated",
    ),
}  # fmt: skip
"""By short name: "h200", "h100", "a100", "b200"."""


def describe(name: str) -> Device:
    """The device of this short name, in any case.

    Raises:
        ValueError: there is none of this name; the message lists those that there are.
    """
    found = DEVICES.get(name.lower())
    if found is None:
        raise ValueError(f"device: expected one of {', '.join(DEVICES)}, got {name!r}")
    return found
