"""Memory formats of convolution weights: changed by `fuse_`, restored by `unfuse_`, always on the same parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from resfuse.layout import is_channels_last

Strides = tuple[int, ...]


def to_channels_last(conv: nn.Module) -> Strides | None:
    """Put a convolution's weight into channels_last memory; return its former strides, or None if unchanged."""
    weight = conv._parameters.get("weight")
    if type(weight) is not Parameter or weight.dim() != 4 or is_channels_last(weight) or not _owns_memory(weight):
        return None
    former = weight.stride()
    # Not `contiguous`, which leaves a 1x1 kernel as it is: its elements lie in the right order under both strides.
    _set_memory(weight, lambda tensor: tensor.to(memory_format=torch.channels_last))
    return former


def restore_strides(weight: Tensor | None, strides: Strides) -> None:
    """Restore a weight's strides, if it still has the same rank."""
    if type(weight) is Parameter and weight.dim() == len(strides) and weight.stride() != strides:
        _set_memory(weight, lambda tensor: torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype,
                                                               device=tensor.device).copy_(tensor))  # fmt: skip


def _owns_memory(weight: Parameter) -> bool:
    """True if nothing but the parameter refers to its memory (no flat buffer, no other process)."""
    return not weight.is_shared() and weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()


def _set_memory(weight: Parameter, convert: Callable[[Tensor], Tensor]) -> None:
    """New memory for the same parameter and its gradient, as by `Module.to(memory_format=...)`."""
    # A tensor made in inference mode cannot be trained, and one that was has no version counter: keep the kind.
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        weight.data = convert(weight.data)
        grad = weight.grad
        if grad is not None and type(grad) is Tensor and grad.layout == torch.strided and grad.shape == weight.shape:
            grad.data = convert(grad.data)
