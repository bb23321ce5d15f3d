"""Modules recognised as batch norm, and the state that a fused call reads from them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn

from resfuse.types import BatchNorm


class BatchNormKind(NamedTuple):
    """Behaviour of a class of batch norm modules."""

    frozen: bool = False
    """Its affine parameters and statistics are buffers that never change (torchvision's FrozenBatchNorm2d)."""
    activated: bool = False
    """It applies an activation of its own, the child `act` (after the child `drop`, where there is one)."""
    synchronised: bool = False
    """Its batch statistics are taken over a process group (see `synchronising_group`)."""


_KINDS: dict[type[nn.Module], BatchNormKind] = {
    nn.BatchNorm2d: BatchNormKind(),
    nn.SyncBatchNorm: BatchNormKind(synchronised=True),
}

# Classes of libraries that are not imported here, by module and qualified name.
_FOREIGN = {
    ("torchvision.ops.misc", "FrozenBatchNorm2d"): BatchNormKind(frozen=True),
    ("timm.layers.norm_act", "BatchNormAct2d"): BatchNormKind(activated=True),
    ("timm.layers.norm_act", "FrozenBatchNormAct2d"): BatchNormKind(frozen=True, activated=True),
    ("timm.layers.norm_act", "SyncBatchNormAct"): BatchNormKind(activated=True, synchronised=True),
}


def register_kind(cls: type[nn.Module], kind: BatchNormKind) -> None:
    """Declare that instances of exactly this class are batch norms of that kind."""
    _KINDS[cls] = kind


def batch_norm_kind(module: nn.Module) -> BatchNormKind | None:
    """The kind of a batch norm; None for every other module, including subclasses."""
    cls = type(module)
    kind = _KINDS.get(cls)
    return _FOREIGN.get((cls.__module__, cls.__qualname__)) if kind is None else kind


def read_state(bn: nn.Module, frozen: bool) -> BatchNorm:
    """The arguments that `torch.nn.BatchNorm2d.forward` would pass to `F.batch_norm` now.

    The batch that is about to run is not yet counted in `num_batches_tracked` (see `count_batch`).

    Raises:
        KeyError: a parameter or buffer was replaced by something that only the module itself can use.
    """
    buffers = bn._buffers
    mean, var = buffers["running_mean"], buffers["running_var"]
    if frozen:
        return BatchNorm(mean, var, buffers["weight"], buffers["bias"], False, 0.0, bn.eps)  # type: ignore[arg-type]
    weight, bias = bn._parameters["weight"], bn._parameters["bias"]
    momentum = bn.momentum
    if not bn.training:
        batch_statistics = mean is None and var is None
        return BatchNorm(mean, var, weight, bias, batch_statistics, momentum or 0.0, bn.eps)  # type: ignore[arg-type]
    if not bn.track_running_stats:
        return BatchNorm(None, None, weight, bias, True, momentum or 0.0, bn.eps)  # type: ignore[arg-type]
    if momentum is None:  # the cumulative average
        count = buffers["num_batches_tracked"]
        momentum = 0.0 if count is None else 1.0 / (float(count) + 1.0)
    return BatchNorm(mean, var, weight, bias, True, momentum, bn.eps)  # type: ignore[arg-type]


def count_batch(bn: nn.Module, batches: int = 1) -> None:
    """Add to `num_batches_tracked` of a batch norm that is not frozen, as `BatchNorm2d.forward` does."""
    if bn.training and bn.track_running_stats:
        count = bn._buffers["num_batches_tracked"]
        if count is not None:
            count.add_(batches)


def synchronising_group(bn: nn.Module, kind: BatchNormKind) -> Any:
    """The process group that a batch norm synchronises over now; None for local or running statistics."""
    if not kind.synchronised or not bn.training or not (dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None  # type: ignore[arg-type]
