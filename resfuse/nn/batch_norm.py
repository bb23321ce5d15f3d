"""Modules recognised as batch norm, and the state that a fused call reads from them."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse.types import BatchNorm


class BatchNormKind(NamedTuple):
    """Behaviour of a class of batch norm modules."""

    frozen: bool = False
    """Its affine parameters and statistics are buffers that never change."""
    synchronised: bool = False
    """Its batch statistics are taken over a process group (see `synchronising_group`)."""
    eps: float | None = None
    """The constant of a class that has no attribute `eps`."""


_KINDS: dict[type[nn.Module], BatchNormKind] = {
    nn.BatchNorm2d: BatchNormKind(),
    nn.SyncBatchNorm: BatchNormKind(synchronised=True),
}


# Other classes that have been looked at.
_OTHERS: set[type] = set()


def batch_norm_kind(module: Any) -> BatchNormKind | None:
    """The kind of a batch norm; None for everything else, subclasses included."""
    cls = type(module)
    kind = _KINDS.get(cls)
    if kind is None and cls not in _OTHERS and not torch.compiler.is_compiling():
        known = isinstance(module, nn.Module) and not isinstance(module, torch.jit.ScriptModule)
        kind = _frozen_kind(module) if known else None
        if kind is None:
            _OTHERS.add(cls)
        else:
            _KINDS[cls] = kind
    return kind


def _frozen_kind(module: nn.Module) -> BatchNormKind | None:
    """The kind of a module that computes a frozen batch norm, found out by trying; None for every other one.

    Such classes (torchvision's `FrozenBatchNorm2d`, detectron2's, DETR's) have the buffers `weight`, `bias`,
    `running_mean` and `running_var`, no parameters and no children, and differ in where their eps comes from.
    """
    names = ("running_mean", "running_var", "weight", "bias")
    vectors = [module._buffers.get(name) for name in names]
    if module._parameters or module._modules or any(vector is None or vector.dim() != 1 for vector in vectors):
        return None
    others = set(module._buffers) - {*names, "num_batches_tracked"}
    if others or isinstance(module, nn.modules.batchnorm._BatchNorm):
        return None
    channels = len(vectors[0])  # type: ignore[arg-type]
    values = [torch.arange(1, channels + 1, dtype=torch.float64, device="cpu") / channels + i for i in range(4)]
    mean, var, weight, bias = values
    var *= 1e-4  # so small that eps shows
    trial = copy.copy(module)
    trial._buffers = {**module._buffers, **dict(zip(names, values, strict=True))}
    input = torch.stack([values[0] - 1, values[0] * 2], 1).reshape(1, channels, 2, 1)
    try:
        with torch.no_grad():
            output = trial(input)
    except Exception:
        return None
    own = getattr(module, "eps", None)
    for eps in (own, 1e-5, 1e-3):
        if isinstance(eps, float) and isinstance(output, Tensor):
            expected = F.batch_norm(input, mean, var, weight, bias, eps=eps)
            if torch.allclose(output, expected, rtol=1e-9, atol=1e-9):
                return BatchNormKind(frozen=True, eps=None if eps == own else eps)
    return None


def is_norm(module: nn.Module) -> bool:
    """True if the module is a 2-D batch norm, of any class."""
    return isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) or batch_norm_kind(module) is not None


def read_state(bn: nn.Module, kind: BatchNormKind) -> BatchNorm:
    """The arguments that `torch.nn.BatchNorm2d.forward` would pass to `F.batch_norm` now.

    The batch that is about to run is not yet counted in `num_batches_tracked` (see `count_batch`).

    Raises:
        KeyError: a parameter or buffer was replaced by something that only the module itself can use, or eps by what
            it cannot use.
    """
    attributes = bn.__dict__
    if "weight" in attributes or "bias" in attributes or "running_mean" in attributes or "running_var" in attributes:
        raise KeyError("an attribute hides a parameter or buffer")
    buffers = attributes["_buffers"]
    mean, var = buffers["running_mean"], buffers["running_var"]
    if kind.frozen:
        if mean is None or var is None or buffers["weight"] is None or buffers["bias"] is None:
            raise KeyError("a buffer was removed")
        eps = bn.eps if kind.eps is None else kind.eps
        return BatchNorm(mean, var, buffers["weight"], buffers["bias"], False, 0.0, eps)  # type: ignore[arg-type]
    eps, parameters = attributes["eps"], attributes["_parameters"]
    if not eps > 0:
        raise KeyError("F.batch_norm raises, too")
    weight, bias, momentum = parameters["weight"], parameters["bias"], attributes["momentum"]
    if not attributes["training"]:
        return BatchNorm(mean, var, weight, bias, mean is None and var is None, momentum or 0.0, eps)
    if not bn.track_running_stats:
        return BatchNorm(None, None, weight, bias, True, momentum or 0.0, eps)
    if momentum is None:  # the cumulative average
        count = buffers["num_batches_tracked"]
        momentum = 0.0 if count is None else 1.0 / (float(count) + 1.0)
    return BatchNorm(mean, var, weight, bias, True, momentum, eps)


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
