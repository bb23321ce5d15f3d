"""`fuse_` and `unfuse_`: whatever fails, the model is as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from resfuse.fuse.follow import NotFollowedError, Op, follow, undisturbed
from resfuse.fuse.fused_class import fused_class, is_fused, is_fused_class
from resfuse.fuse.report import FusedModule, FuseReport, LeftModule
from resfuse.fuse.rewrite import NotRewrittenError
from resfuse.nn.batch_norm import batch_norm_kind, is_norm
from resfuse.nn.lazy import FORWARDS

_ALREADY = "already fused"
Filter = Callable[[nn.Module, str], bool]


def fuse_(
    model: nn.Module,
    *,
    filter_fn: Filter | None = None,
    memory_format: torch.memory_format = torch.channels_last,
    recompute: bool = False,
) -> FuseReport:
    """Make a model run its convolutions, batch norms, additions and ReLUs fused, in place.

    Works on any model whose forwards are written in Python: convolution, batch norm, residual and ReLU in this order,
    the last two or the first one optional, wherever they are called from: in one forward, in a Sequential or
    ModuleList, or in a submodule whose caller adds and activates.  ReLUs may be modules or functions, batch norms
    frozen or synchronised.  In inference a block that is the last reader of its input writes its output over it.

    No module is replaced: a fused module changes its class, to a subclass of its own whose forward is the same
    statements with fused calls.  Parameters, buffers, children, names, state_dict keys, hooks, training mode, device
    and optimizers remain, and copying, pickling, `train()`, DDP and `torch.compile` work as before.  Nothing is frozen
    either: hooks, parametrizations, replaced modules and changed attributes count at the next call.

    Equivalent to the model before, within rounding, in `train()` and `eval()`.

    Args:
        model: any module.
        filter_fn: called with each module that could be fused and its name; False leaves it alone.
        memory_format: with `torch.channels_last`, in which the kernels compute, fused convolutions convert inputs that
            are not in this format, and activations then follow it through the network, outputs included (use `reshape`
            rather than `view` on them).  With `torch.preserve_format` they follow PyTorch's rule: channels_last if the
            input or the weight is.  Parameters keep their strides either way; with those of
            `model.to(memory_format=torch.channels_last)` the kernels are faster.
        recompute: train in about half the memory.  The output of a fused call with batch statistics is not kept for
            backward where its readers are fused calls too: backward computes it again, element by element and bit for
            bit, from the convolution's output.  Gradients are the same.  It counts for everything that is called
            within the forward of a fused module; `torch.compile` decides itself what to keep, and ignores it.  See
            docs/memory.md.

    Returns:
        The modules that were fused, and the batch norms that were not with the reasons.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `memory_format` is neither of the two.
        Exception: whatever `filter_fn` raises.  After an exception the model is exactly what it was.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> fuse_(model).fused
        [FusedModule(name='', kind='Sequential', ops=('0 + 1 + 2',))]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if memory_format not in (torch.channels_last, torch.preserve_format):
        raise ValueError(f"memory_format: expected torch.channels_last or torch.preserve_format, got {memory_format}")
    fusion = _Fusion(model, memory_format == torch.channels_last, bool(recompute))
    try:
        with undisturbed(model) as restore:
            fusion.change_classes()
            fusion.follow(restore)
            while filter_fn is not None and fusion.reject(filter_fn):
                fusion.follow(restore)
        fusion.keep_only_needed()
    except BaseException:
        for module in fusion.changed:
            _restore(module)
        raise
    return fusion.report()


def unfuse_(model: nn.Module) -> nn.Module:
    """Undo `fuse_`, in place: restore every module's class.

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


def _restore(module: nn.Module) -> None:
    if is_fused(module):
        module.__class__ = type(module)._resfuse_original  # type: ignore[attr-defined]


class _Fusion:
    """The state of one `fuse_`."""

    def __init__(self, model: nn.Module, channels_last: bool, recompute: bool) -> None:
        self.model, self.options = model, (channels_last, recompute)
        self.names = {module: name for name, module in _walk(model, "", set())}
        self.changed: list[nn.Module] = []
        self.reasons: dict[nn.Module, str] = {}
        """Why modules are left alone."""
        self.allowed: set[nn.Module] = set()
        self.ops: list[Op] = []
        self.owners = {id(tensor): module for module in self.names for tensor in _tensors(module)}

    def change_classes(self) -> None:
        """Give every module that might be fused its fused class."""
        for module in self.names:
            reason = _opaque_reason(module)
            if reason is not None:
                self.reasons[module] = reason
            elif is_fused(module) or type(module).forward in FORWARDS:
                self.reasons[module] = _ALREADY
            elif "forward" in module.__dict__:
                self.reasons[module] = "its forward was replaced on the instance"
            elif _may_have_a_part(module):
                try:
                    cls = fused_class(type(module), *self.options)
                except NotRewrittenError as reason:
                    self.reasons[module] = str(reason)
                else:
                    self.changed.append(module)
                    module.__class__ = cls

    def follow(self, restore: Callable[[], None]) -> None:
        """Learn what will be fused; the class of a module that cannot be followed is restored."""
        self.ops.clear()
        followed: set[nn.Module] = set()
        failed: list[nn.Module] = []
        for module in self.names:
            if module in followed or not is_fused(module) or module in self.reasons:
                continue
            if not any(map(is_norm, module.modules())):
                continue  # it matters only to who normalises its output
            entered = self._follow(module)
            if entered is None:
                failed.append(module)
            followed |= entered or set()
            restore()
        for module in reversed(failed):  # once more, the innermost first: it may have been what is inside
            del self.reasons[module]
            module.__class__ = fused_class(type(module), *self.options)
            self._follow(module, again=True)
            restore()

    def _follow(self, module: nn.Module, again: bool = False) -> set[nn.Module] | None:
        """The modules that were followed; None, and the reason is noted, if it cannot be."""
        try:
            ops, entered = follow(module)
        except NotFollowedError as reason:
            self.reasons[module] = str(reason)
            _restore(module)
            return None
        ops = [op for op in ops if not self._is_fused_already(op)]
        # Who contains a module knows more of what follows it.
        first, second = (ops, self.ops) if again else (self.ops, ops)
        known = {op.key for op in first}
        self.ops = first + [op for op in second if op.key not in known]
        return entered.union(*(self._above(self._module(op.conv)) for op in ops))

    def reject(self, filter_fn: Filter) -> bool:
        """Ask the filter about what it was not asked about; True if it turned something down."""
        asked = [module for module in self.names if module in self._needed() and module not in self.allowed]
        for module in asked:
            _restore(module)
            if filter_fn(module, self.names[module]):
                self.allowed.add(module)
                module.__class__ = fused_class(type(module), *self.options)
            else:
                self.reasons[module] = "filter_fn"
        return any(module in self.reasons for module in asked)

    def keep_only_needed(self) -> None:
        """Restore the classes of modules whose forward has no part in a fused call."""
        for module in set(self.changed) - self._needed():
            _restore(module)

    def _is_fused_already(self, op: Op) -> bool:
        modules = [*self._above(self._module(op.conv)), *self._above(self._module(op.bn)), op.callers[0]]
        return any(self.reasons.get(module) == _ALREADY for module in modules)

    def _needed(self) -> set[nn.Module]:
        found: set[nn.Module] = set()
        for op in self.ops:
            if op.reason is None:
                above = set(self._above(op.callers[0]))
                for part in (op.conv, op.bn):
                    around = [module for module in self._above(self._module(part)) if module in self.changed]
                    # Who calls it, and through whom the pending result comes to who evaluates it.
                    found |= {module for module in around if module not in above} | set(around[:1])
                # The caller of a block passes on what the block may write over.
                found.update(op.callers[:2])
        return {module for module in found if is_fused(module) and module in self.changed}

    def _module(self, part: Any) -> nn.Module | None:
        return part if isinstance(part, nn.Module) else self.owners.get(id(part))

    def _above(self, module: nn.Module | None) -> Iterator[nn.Module]:
        """The module and those that contain it, the innermost first."""
        name = self.names.get(module)  # type: ignore[arg-type]
        while name is not None:
            yield self.model.get_submodule(name)
            name = name.rpartition(".")[0] if name else None

    def report(self) -> FuseReport:
        """Say what was fused, and why each batch norm that was not is left."""
        report = FuseReport()
        calls: dict[nn.Module, list[str]] = {}
        left: dict[nn.Module, str] = {}
        seen: set[nn.Module] = set()
        for op in self.ops:
            conv, bn = self._module(op.conv), self._module(op.bn)
            if op.reason is None:
                owner = self._owner(op, conv, bn)
                calls.setdefault(owner, []).append(self._describe(op, owner, conv, bn))
                seen |= {bn} if bn is not None else set()
                report.convolutions += op.conv is not None
                report.additions += op.add
            elif bn is not None:
                left[bn] = op.reason
            elif op.act is not None:
                left[op.act] = op.reason
            report.all_additions += op.add and (op.reason is None or bn is not None)
        for module, name in self.names.items():
            if module in calls:
                report.fused.append(FusedModule(name, _kind(module), tuple(calls[module])))
            if module in left and module not in seen:
                report.left.append(LeftModule(name, left[module]))
            elif _opaque_reason(module) is not None or (is_norm(module) and module not in seen):
                report.left.append(LeftModule(name, self._why_left(module)))
            report.norms += is_norm(module)
            report.left_norms += is_norm(module) and module not in seen
        return report

    def _why_left(self, norm: nn.Module) -> str:
        """The reason of the innermost module around a norm that has one."""
        for module in self._above(norm):
            if module in self.reasons:
                return (
                    f"{type(module).__name__}: {self.reasons[module]}" if module is not norm else self.reasons[module]
                )
        return "nobody calls it, or a nested function, a comprehension or a helper does"

    def _owner(self, op: Op, conv: nn.Module | None, bn: nn.Module | None) -> nn.Module:
        """The innermost fused module that contains the convolution and the norm, else the one that calls them."""
        for module in [*self._above(bn if bn is not None else conv)][1:]:
            inside = conv is None or module in set(self._above(conv))
            if is_fused(module) and module in self.changed and inside:
                return module
        return op.callers[0]

    def _describe(self, op: Op, owner: nn.Module, conv: nn.Module | None, bn: nn.Module | None) -> str:
        prefix = self.names[owner] + "." if self.names.get(owner) else ""
        parts = [
            None if module is None else self.names.get(module, "").removeprefix(prefix) or type(module).__name__
            for module in (conv, bn)
        ]
        return " + ".join(filter(None, (*parts, "add" if op.add else None, self._activation(op, prefix))))

    def _activation(self, op: Op, prefix: str) -> str | None:
        name = "" if op.act is None else self.names.get(op.act, "")
        if not op.activated:
            return None
        return name.removeprefix(prefix) if name.startswith(prefix) and name else "relu"


def _walk(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules`, without the descendants of opaque modules."""
    if module in seen:
        return
    seen.add(module)
    yield name, module
    if _opaque_reason(module) is None:
        for key, child in module.named_children():
            yield from _walk(child, f"{name}.{key}" if name else key, seen)


def _opaque_reason(module: nn.Module) -> str | None:
    """The reason why neither a module nor its descendants can be fused, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "a ScriptModule has its own compiled code (fuse the model before torch.jit)"
    if isinstance(module, torch.fx.GraphModule):
        return "a torch.fx.GraphModule calls the parts one by one (fuse the model before tracing it)"
    return None


def _may_have_a_part(module: nn.Module) -> bool:
    """True for what calls convolutions or norms; a convolution of a class of its own only if it calls a norm too."""
    own = isinstance(module, nn.Conv2d) or batch_norm_kind(module) is not None
    return any(is_norm(inner) or (isinstance(inner, nn.Conv2d) and not own) for inner in module.modules()) and not (
        batch_norm_kind(module) is not None or type(module) is nn.Conv2d
    )


def _tensors(module: nn.Module) -> Iterator[Any]:
    for tensors in (module._parameters, module._buffers):
        yield from (tensor for tensor in tensors.values() if tensor is not None)


def _kind(module: nn.Module) -> str:
    return type(module).__name__ if not is_fused(module) else type(module)._resfuse_original.__name__  # type: ignore[attr-defined]
