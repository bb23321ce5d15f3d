"""Copies of models and inputs whose tensors have shapes but no memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import Parameter

Input = Tensor | Sequence[int]

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


class Copy(NamedTuple):
    """A model's copy on the meta device."""

    model: nn.Module
    devices: dict[int, torch.device]
    """Where the tensor was that this one, by its id, is a copy of."""


def copy_without_data(model: nn.Module) -> Copy:
    """A copy with tensors on the meta device, of the same strides.

    Hooks on its modules do nothing: they still keep a module from being fused, but no code of theirs sees the copy.

    Raises:
        ValueError: the model can not be copied; the message has the reason.
    """
    model = _unwrapped(model)
    memo: dict[int, Any] = {}
    devices: dict[int, torch.device] = {}
    for hooks in _hooks_of(model):
        memo.update((id(hook), _do_nothing) for hook in hooks.values())
    try:
        for tensor in _tensors_of(model):
            memo[id(tensor)] = meta = _on_meta(tensor)
            devices[id(meta)] = _place(tensor)
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(f"model: {type(model).__name__} can not be copied: {error}") from error
    for hooks in _hooks_of(copied):
        hooks.update(dict.fromkeys(hooks, _do_nothing))
    for module in copied.modules():
        if isinstance(module, _BatchNorm) and module.momentum is None:
            module.momentum = 0.1  # the average would need a counter's value, and costs the same
    return Copy(copied, devices)


def make_fake_(copied: Copy, mode: FakeTensorMode) -> None:
    """Give the copy fake tensors, on the devices of the original, in place of those on the meta device."""
    fakes: dict[int, Tensor] = {}
    for module in copied.model.modules():
        owners: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
        for tensors in owners:
            for name, tensor in tensors.items():
                if isinstance(tensor, Tensor):
                    if id(tensor) not in fakes:
                        fakes[id(tensor)] = _fake(tensor, copied.devices.get(id(tensor), _place(tensor)), mode)
                    tensors[name] = fakes[id(tensor)]


def fake_inputs(inputs: Sequence[Input], model: nn.Module, mode: FakeTensorMode) -> tuple[Tensor, ...]:
    """Fake tensors for tensors, and for shapes; the latter have the device and dtype of the model's parameters.

    Raises:
        TypeError: an input is neither.
        ValueError: a shape has a size below one, or there is no input.
    """
    if not inputs:
        raise ValueError("inputs: expected at least one tensor or shape, got none")
    first = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), torch.empty(0))
    fakes = []
    for number, input in enumerate(inputs):
        if isinstance(input, Tensor):
            fakes.append(_fake(input, _place(input), mode))
            continue
        shape = _checked_shape(number, input)
        with mode:
            fakes.append(torch.empty(shape, dtype=first.dtype, device=_place(first)))
    return tuple(fakes)


def _checked_shape(number: int, shape: Any) -> tuple[int, ...]:
    if isinstance(shape, str) or not isinstance(shape, Sequence) or not all(type(size) is int for size in shape):
        raise TypeError(f"inputs[{number}]: expected a tensor or a shape of integers, got {shape!r}")
    if any(size < 1 for size in shape):
        raise ValueError(f"inputs[{number}]: expected sizes of at least 1, got {tuple(shape)}")
    return tuple(shape)


def _unwrapped(model: nn.Module) -> nn.Module:
    """What DistributedDataParallel, DataParallel or torch.compile has been put around."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := model.__dict__.get("_orig_mod", model._modules.get("_orig_mod")), nn.Module):
            model = inner
        else:
            return model


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and their gradients, and tensors that are plain attributes."""
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor):
                yield tensor
                if tensor.is_leaf and isinstance(tensor.grad, Tensor):
                    yield tensor.grad


def _hooks_of(model: nn.Module) -> Iterator[dict[int, Any]]:
    for module in model.modules():
        yield from (getattr(module, name) for name in _HOOKS)


def _fake(tensor: Tensor, device: torch.device, mode: FakeTensorMode) -> Tensor:
    with mode:
        empty = _like(tensor, device)
        if isinstance(tensor, Parameter):
            return Parameter(empty, tensor.requires_grad)
        return empty.requires_grad_(tensor.requires_grad)


def _on_meta(tensor: Tensor) -> Tensor:
    empty = _like(tensor, torch.device("meta"))
    return Parameter(empty, tensor.requires_grad) if isinstance(tensor, Parameter) else empty


def _like(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _place(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if tensor.is_meta else tensor.device


def _do_nothing(*_: Any, **__: Any) -> None:
    """In place of a hook."""
