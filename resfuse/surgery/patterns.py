"""Matches modules against the supported patterns, and collects the reasons against fusing them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from resfuse.nn import batch_norm, fused_call, sequential
from resfuse.nn.blocks import CHAINS, class_forward
from resfuse.surgery import mixins, mixins_torchvision
from resfuse.surgery.fused import Fused, is_fused, pickles_by_default
from resfuse.surgery.known import Known, Left, Step, find_known, method_reasons


class Scan(NamedTuple):
    """The result of scanning children that are called in order."""

    steps: list[Step]
    failed: list[tuple[Step, str]]
    """Steps that cannot be fused, with the reasons."""

    @property
    def left(self) -> list[Left]:
        """The failed steps, by the name of the first child of each."""
        return [(step.children[0], reason) for step, reason in self.failed]

    @property
    def reasons(self) -> list[str]:
        """Reasons against fusing the module, if none of its steps can be fused."""
        return [] if self.steps else [f"{step}: {reason}" for step, reason in self.failed]


@dataclass
class Candidate:
    """A module that matches a pattern."""

    kind: str
    mixin: type[Fused]
    steps: list[Step] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    """Reasons against fusing the module; it can be fused if there are none."""
    left: list[Left] = field(default_factory=list)
    """Parts that stay unfused in a module that is otherwise fused, each with the reasons."""
    takes_over: tuple[str, ...] = ()
    """Children that are no longer called; their own children are called instead."""


def opaque_reason(module: nn.Module) -> str | None:
    """The reason why neither a module nor its descendants can be fused, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "a ScriptModule has its own compiled code (fuse the model before torch.jit)"
    if isinstance(module, torch.fx.GraphModule):
        return "a torch.fx.GraphModule calls the parts one by one (fuse the model before tracing it)"
    return None


def find_candidate(module: nn.Module) -> Candidate | None:
    """The pattern that a module matches, with the reasons against fusing it; None if it matches none."""
    if is_fused(module):
        return Candidate("", Fused, reasons=["already fused"])
    known = find_known(type(module))
    if known is not None:
        candidate = _known_module(module, *known)
    else:
        candidate = _sequential(module) if isinstance(module, nn.Sequential) else None
    if candidate is not None and "forward" in module.__dict__:
        candidate.reasons.append("its forward was replaced on the instance")
    if candidate is not None and not pickles_by_default(type(module)):
        candidate.reasons.append(f"{type(module).__name__} has its own way of being pickled")
    return candidate


def is_norm(module: nn.Module) -> bool:
    """True if the module is a 2-D batch norm of any class, supported or not."""
    norms = (nn.BatchNorm2d, nn.SyncBatchNorm)
    return isinstance(module, norms) or batch_norm.batch_norm_kind(module) is not None


def _known_module(module: nn.Module, known: Known, base: type) -> Candidate | None:
    """A block or model of another library, or of a class derived from one."""
    reasons = method_reasons(type(module), base, known.methods) or known.reasons(module)
    if reasons:
        return Candidate(known.kind, known.mixin, reasons=reasons)
    if known.steps is None:
        scan = _scan_children(module)
        steps, left, reasons = scan.steps, scan.left, scan.reasons
    else:
        steps, left = known.steps(module), known.left(module)
        reasons = [f"{step}: {reason}" for step in steps for reason in _step_reasons(module, step)]
    return Candidate(known.kind, known.mixin, steps, reasons, left, known.takes_over) if steps or reasons else None


def _step_reasons(module: nn.Module, step: Step) -> list[str]:
    children = {name: _child(module, name) for name in step.children}
    missing = [name for name, child in children.items() if child is None]
    if missing:
        return [f"there is no module {name}" for name in missing]
    if step.bn is None:
        return []
    conv = None if step.conv is None else children[step.conv]
    return fused_call.reasons_against(conv, children[step.bn], step.residual)  # type: ignore[arg-type]


def _child(module: nn.Module, name: str) -> nn.Module | None:
    """A descendant by its dotted name, None where there is none."""
    found: nn.Module | None = module
    for part in name.split("."):
        found = None if found is None else found._modules.get(part)
    return found


def _sequential(module: nn.Sequential) -> Candidate | None:
    """A Sequential that contains a convolution and norm, a norm and ReLU, or consecutive blocks."""
    modules = list(module)
    scan = _scan(module, list(module._modules))
    chain = any(_is_block(one) and _is_block(other) for one, other in itertools.pairwise(modules))
    if not chain and not scan.steps and not scan.failed:
        return None
    reasons = method_reasons(type(module), nn.Sequential, {"forward": ""}) + ([] if chain else scan.reasons)
    kind = "Sequential of blocks" if chain and not scan.steps else "Sequential"
    return Candidate(kind, mixins.FusedSequential, scan.steps, reasons, scan.left)


def _scan_children(module: nn.Module) -> Scan:
    """Scan the children of a module; those of an IntermediateLayerGetter up to each requested output."""
    if not isinstance(module, nn.ModuleDict):
        return _scan(module, list(module._modules))
    scans = [_scan(module, names) for names in mixins_torchvision.getter_segments(module)]
    return Scan(*(list(itertools.chain.from_iterable(parts)) for parts in zip(*scans, strict=True)))


def _scan(parent: nn.Module, names: list[str]) -> Scan:
    """Find the fused calls for children called in order, and those that cannot be fused, with the reasons."""
    scan = Scan([], [])
    modules: list[Any] = [parent._modules[name] for name in names]
    index = 0
    while index < len(modules):
        run = sequential.run_at(modules, index)
        stop = _lookalike(modules, index) if run is None else run.stop
        if stop > index:
            step = _run_step(names, modules, index, stop)
            reasons = _step_reasons(parent, step)
            if reasons:
                scan.failed.append((step, "; ".join(reasons)))
            else:
                scan.steps.append(step)
        index = max(stop, index + 1)
    return scan


def _is_block(module: nn.Module) -> bool:
    """True if the module is, or can become, a block that can be chained to the one before."""
    if class_forward(module) in CHAINS:
        return True
    known = find_known(type(module))
    candidate = None if known is None else _known_module(module, *known)
    if candidate is None or candidate.reasons:
        return False
    chain = CHAINS.get(getattr(candidate.mixin, "forward", None))  # type: ignore[arg-type]
    return chain is not None and chain.applies(module)


def _lookalike(modules: list[nn.Module], index: int) -> int:
    """The end of a run whose convolution or norm is of an unsupported class; `index` if there is no such run."""
    pair = modules[index : index + 2]
    return index + 2 if len(pair) == 2 and isinstance(pair[0], nn.Conv2d) and is_norm(pair[1]) else index


def _run_step(names: list[str], modules: list[nn.Module], index: int, stop: int) -> Step:
    conv = names[index] if isinstance(modules[index], nn.Conv2d) else None
    bn = index if conv is None else index + 1
    return Step(conv, names[bn], names[bn + 1] if bn + 1 < stop else None)
