"""`fuse_` and `unfuse_`: plan first, then change, and undo everything if a change fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from resfuse.models import CifarPreActResNet, CifarResNet, ResNet, Stage
from resfuse.nn import (
    BasicBlock,
    Bottleneck,
    ConvBNAct2d,
    PlainBlock,
    PreActBasicBlock,
    PreActBottleneck,
    Projection,
)
from resfuse.surgery.fused import FORMER_STRIDES, fused_class, is_fused, is_fused_class
from resfuse.surgery.optimizers import follow_strides
from resfuse.surgery.patterns import Candidate, find_candidate, is_norm, opaque_reason
from resfuse.surgery.report import FusedModule, FuseReport, LeftModule
from resfuse.surgery.weights import restore_strides, to_channels_last

Filter = Callable[[nn.Module, str], bool]

_OWN = (
    *(BasicBlock, Bottleneck, ConvBNAct2d, PlainBlock, PreActBasicBlock, PreActBottleneck, Projection),
    *(CifarPreActResNet, CifarResNet, ResNet, Stage),
)


def fuse_(
    model: nn.Module,
    *,
    filter_fn: Filter | None = None,
    memory_format: torch.memory_format = torch.channels_last,
) -> FuseReport:
    """Make a model run its convolutions, batch norms, additions and ReLUs fused, in place.

    Supported at any depth of the model: torchvision's `BasicBlock`, `Bottleneck` (ResNet, ResNeXt, Wide-ResNet) and the
    stem of its `ResNet`, also as the backbone of a detection or segmentation model, and the blocks of its RegNet; the
    same three of timm, where attention, anti-aliasing, drop-block and drop-path are called unchanged between fused
    calls; timm's pre-activation blocks (ResNetV2); and in any `nn.Sequential`, such as torchvision's
    `Conv2dNormActivation`, runs of Conv2d-BatchNorm2d(-ReLU) and BatchNorm2d-ReLU.  Batch norms may be frozen.  In
    inference, each block of a Sequential of blocks after the first writes its output over its input.

    No module is replaced: a fused module changes its class, to a subclass of its own with another forward.  Parameters,
    buffers, children, names, state_dict keys, hooks on the fused modules, training mode, device and optimizers remain,
    and copying, pickling, `train()`, DDP and `torch.compile` work as before.  Later changes are honoured: a hook or
    parametrization on a part of a fused module makes it call that part, a SyncBatchNorm makes it exchange statistics
    with the other processes.

    Equivalent to the model before, within rounding, in `train()` and `eval()`.

    Args:
        model: any module that is, or contains, one of the above.
        filter_fn: called with each module that could be fused and its name; False leaves it alone.
        memory_format: `torch.channels_last` puts the weights of fused convolutions into that format, as
            `model.to(memory_format=torch.channels_last)` does: the parameters stay the same objects, with other
            strides.  The kernels compute in this format, and activations then follow it through the network, outputs
            included (use `reshape` rather than `view` on them).  `torch.preserve_format` leaves the weights alone, as
            FSDP2 requires, which takes contiguous parameters only.

    Returns:
        The modules that were fused, and those left alone with the reasons.

    Raises:
        ValueError: `memory_format` is neither of the two.
        Exception: whatever `filter_fn` raises.  After an exception the model is exactly what it was.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> fuse_(model).fused
        [FusedModule(name='', kind='Sequential', ops=('0 + 1 + 2',))]
    """
    if memory_format not in (torch.channels_last, torch.preserve_format):
        raise ValueError(f"memory_format: expected torch.channels_last or torch.preserve_format, got {memory_format}")
    plan, report = _plan(model, filter_fn)
    changed: list[nn.Module] = []
    try:
        for module, candidate in plan:
            changed.append(module)
            if memory_format == torch.channels_last:
                _change_strides(module, candidate)
            module.__class__ = fused_class(candidate.mixin, type(module))
    except BaseException:
        for module in reversed(changed):
            _restore(module)
        raise
    return report


def unfuse_(model: nn.Module) -> nn.Module:
    """Undo `fuse_`, in place: restore every module's class and every weight's strides.

    Args:
        model: the model given to `fuse_`, a part of it, or a copy.

    Returns:
        The model itself.

    Raises:
        TypeError: another library has since given a fused module a class derived from its own (FSDP2 and
            parametrizations do).  The model is unchanged.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> report = fuse_(model)
        >>> type(model).__name__, type(unfuse_(model)).__name__
        ('FusedSequential', 'Sequential')
    """
    modules = [module for module in model.modules() if is_fused(module)]
    for module in modules:
        if not is_fused_class(type(module)):
            raise TypeError(f"{type(module).__name__}: the module's class was changed after fuse_; undo that first")
    for module in modules:
        _restore(module)
    return model


def _plan(model: nn.Module, filter_fn: Filter | None) -> tuple[list[tuple[nn.Module, Candidate]], FuseReport]:
    """Decide what to fuse, without changing the model."""
    plan: list[tuple[nn.Module, Candidate]] = []
    report = FuseReport()
    taken_over: set[nn.Module] = set()
    for name, module in _walk(model, "", set()):
        if module in taken_over:
            continue
        opaque = opaque_reason(module)
        if opaque is not None:
            report.left.append(LeftModule(name, opaque))
            continue
        candidate = None if isinstance(module, _OWN) else find_candidate(module)
        if candidate is None:
            reason = _unknown_reason(module)
            if reason is not None:
                report.left.append(LeftModule(name, reason))
        elif candidate.reasons:
            report.left.append(LeftModule(name, "; ".join(candidate.reasons)))
        elif filter_fn is not None and not filter_fn(module, name):
            report.left.append(LeftModule(name, "filter_fn"))
        else:
            plan.append((module, candidate))
            report.fused.append(FusedModule(name, candidate.kind, tuple(str(step) for step in candidate.steps)))
            taken_over.update(module.get_submodule(child) for child in candidate.takes_over)
            report.left += [LeftModule(f"{name}.{part}".lstrip("."), reason) for part, reason in candidate.left]
    return plan, report


def _walk(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules`, without the descendants of opaque modules."""
    if module in seen:
        return
    seen.add(module)
    yield name, module
    if opaque_reason(module) is None:
        for key, child in module.named_children():
            yield from _walk(child, f"{name}.{key}" if name else key, seen)


def _unknown_reason(module: nn.Module) -> str | None:
    """The reason to report for a module that matches no pattern; None if it has no batch norms of its own."""
    if isinstance(module, _OWN):
        return "already fused"
    if isinstance(module, nn.Sequential) or is_norm(module) or not any(is_norm(child) for child in module.children()):
        return None
    return f"unsupported module type {type(module).__name__}, which has batch norms"


def _change_strides(module: nn.Module, candidate: Candidate) -> None:
    former: dict[str, tuple[int, ...]] = {}
    module.__dict__[FORMER_STRIDES] = former
    for step in candidate.steps:
        if step.conv is not None:
            strides = to_channels_last(module.get_submodule(step.conv))
            if strides is not None:
                former[step.conv] = strides
    if former:
        follow_strides()
    else:
        del module.__dict__[FORMER_STRIDES]


def _restore(module: nn.Module) -> None:
    """Restore a module's class and its weights' strides, as far as they were changed."""
    if is_fused(module):
        module.__class__ = type(module)._resfuse_original  # type: ignore[attr-defined]
    for conv, strides in module.__dict__.pop(FORMER_STRIDES, {}).items():
        try:
            weight = module.get_submodule(conv)._parameters.get("weight")
        except AttributeError:  # the convolution was removed since
            continue
        restore_strides(weight, strides)
