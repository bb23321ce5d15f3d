"""The machine that an explanation is for: its ceilings, and where a backend's choice is asked for."""

from __future__ import annotations

import functools

import torch
from torch import nn

from resfuse.types import AbsentDevice
from resfuse.costs import DEVICES, Device, describe, measure_device
from resfuse.explain.choice import Place
from resfuse.processor import processor_name


def find(device: str | Device | torch.device | None, model: nn.Module) -> tuple[Device, Place]:
    """The machine's description, and the device of torch, or what stands for one that is not in this machine.

    Args:
        device: see `resfuse.explain`.
        model: whose device counts if `device` is None.

    Raises:
        TypeError: `device` is none of the three.
        ValueError: there is no such device, or it is not in this machine and has no description.
    """
    if device is None:
        device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        device = torch.device("cpu") if device.type == "meta" else device
    if isinstance(device, str):
        device = describe(device) if device.lower() in DEVICES else _torch_device(device)
    if isinstance(device, Device):
        return device, _place(device)
    if not isinstance(device, torch.device):
        raise TypeError(
            f"device: expected a name, a resfuse.costs.Device or a torch.device, got {type(device).__name__}"
        )
    present = _present(device)
    return _measured(present), present


def _torch_device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        known = ", ".join(DEVICES)
        raise ValueError(
            f"device: expected one of {known}, or one of torch such as cpu or cuda, got {name!r}"
        ) from None


def _present(device: torch.device) -> torch.device:
    """The device with its index, if it is in this machine."""
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ValueError(f"device: expected cpu or cuda, got {device}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index if device.index is not None else torch.cuda.current_device() if count else 0
    if index >= count:
        raise ValueError(
            f"device: {device} is not in this machine ({count} GPUs); {', '.join(DEVICES)} need not be in it"
        )
    return torch.device("cuda", index)


def _place(device: Device) -> Place:
    """The device of this machine that is described or, where there is none, what stands for it."""
    if device.type == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if torch.cuda.get_device_name(index) == device.name:
                return torch.device("cuda", index)
    if device.capability is None:
        raise ValueError(f"device: {device.name} has no compute capability, which decides what can run on it")
    return AbsentDevice(device.capability)


def is_here(device: Device, place: Place) -> bool:
    """Whether a time measured at this place is one of the described device."""
    return isinstance(place, torch.device) and (place.type == "cuda" or device.name == processor_name())


@functools.cache
def _measured(device: torch.device) -> Device:
    return measure_device(device)
