"""Which modules `fuse_` knows, and whether it may fuse one of them.

A class of another library is known by its qualified name (so that nothing is imported) and by the names that its
forward uses: a release of the library that computes something else there is left alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from resfuse.nn import batch_norm, fused_call, sequential
from resfuse.nn.blocks import CHAINS, class_forward
from resfuse.surgery import mixins
from resfuse.surgery.fused import Fused, is_fused, pickles_by_default


class Step(NamedTuple):
    """One fused call: names of children, and whether a residual is added."""

    conv: str | None
    bn: str
    act: str | None
    residual: bool = False

    def __str__(self) -> str:
        names = (self.conv, self.bn, "add" if self.residual else None, self.act)
        return " + ".join(name for name in names if name is not None)


@dataclass
class Candidate:
    """A module of a known pattern."""

    kind: str
    mixin: type[Fused]
    steps: list[Step] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    """Against fusing the module; none means that it can be."""
    left_steps: list[tuple[Step, str]] = field(default_factory=list)
    """Parts of a module that can be fused otherwise, each with the reasons against it."""


class _Known(NamedTuple):
    kind: str
    mixin: type[Fused]
    methods: dict[str, str]
    """The methods that a subclass must not override -> the names that each uses."""
    steps: Callable[[nn.Module], list[Step]]
    extras: Callable[[Any], list[str]] = lambda module: []
    """Children that the fused method has no place for."""


_BASIC = "conv1 bn1 conv2 bn2 downsample"
_BOTTLENECK = "conv1 bn1 conv2 bn2 conv3 bn3 downsample"
_STAGES = "maxpool layer1 layer2 layer3 layer4"


def _basic_steps(act1: str, act2: str) -> Callable[[nn.Module], list[Step]]:
    return lambda block: [Step("conv1", "bn1", act1), Step("conv2", "bn2", act2, residual=True)]


def _bottleneck_steps(act1: str, act2: str, act3: str) -> Callable[[nn.Module], list[Step]]:
    return lambda block: [
        Step("conv1", "bn1", act1),
        Step("conv2", "bn2", act2),
        Step("conv3", "bn3", act3, residual=True),
    ]


def _timm_stem_steps(model: nn.Module) -> list[Step]:
    stem = model.conv1
    if mixins.is_plain_sequential(stem):  # type: ignore[arg-type]
        return [Step(f"conv1.{len(stem) - 1}", "bn1", "act1")]  # type: ignore[arg-type]
    return [Step("conv1", "bn1", "act1")]


_KNOWN = {
    ("torchvision.models.resnet", "BasicBlock"): _Known(
        "torchvision BasicBlock",
        mixins.FusedTorchvisionBasicBlock,
        {"forward": f"{_BASIC} relu"},
        _basic_steps("relu", "relu"),
    ),
    ("torchvision.models.resnet", "Bottleneck"): _Known(
        "torchvision Bottleneck",
        mixins.FusedTorchvisionBottleneck,
        {"forward": f"{_BOTTLENECK} relu"},
        _bottleneck_steps("relu", "relu", "relu"),
    ),
    ("torchvision.models.resnet", "ResNet"): _Known(
        "torchvision ResNet stem",
        mixins.FusedTorchvisionResNet,
        {"forward": "_forward_impl", "_forward_impl": f"conv1 bn1 relu {_STAGES} avgpool torch flatten fc"},
        lambda model: [Step("conv1", "bn1", "relu")],
    ),
    ("torchvision.models._utils", "IntermediateLayerGetter"): _Known(
        "torchvision IntermediateLayerGetter",
        mixins.FusedIntermediateLayerGetter,
        {"forward": "OrderedDict items return_layers"},
        lambda getter: [step for names in mixins.getter_segments(getter) for step in _scan(getter, names)[0]],
    ),
    ("timm.models.resnet", "BasicBlock"): _Known(
        "timm BasicBlock",
        mixins.FusedTimmBasicBlock,
        {"forward": f"{_BASIC} act1 act2 drop_block aa se drop_path"},
        _basic_steps("act1", "act2"),
        mixins.timm_block_extras,
    ),
    ("timm.models.resnet", "Bottleneck"): _Known(
        "timm Bottleneck",
        mixins.FusedTimmBottleneck,
        {"forward": f"{_BOTTLENECK} act1 act2 act3 drop_block aa se drop_path"},
        _bottleneck_steps("act1", "act2", "act3"),
        mixins.timm_block_extras,
    ),
    ("timm.models.resnet", "ResNet"): _Known(
        "timm ResNet stem",
        mixins.FusedTimmResNet,
        {
            "forward": "forward_features forward_head",
            "forward_features": f"conv1 bn1 act1 {_STAGES} grad_checkpointing torch jit is_scripting checkpoint_seq",
        },
        _timm_stem_steps,
    ),
}


def opaque_reason(module: nn.Module) -> str | None:
    """Why neither a module nor anything in it can be fused, if so."""
    if isinstance(module, torch.jit.ScriptModule):
        return "a ScriptModule has its own compiled code (fuse the model before torch.jit)"
    if isinstance(module, torch.fx.GraphModule):
        return "a torch.fx.GraphModule calls the parts one by one (fuse the model before tracing it)"
    return None


def find_candidate(module: nn.Module) -> Candidate | None:
    """The pattern that a module follows, with reasons against fusing it, or None if it follows none."""
    if is_fused(module):
        return Candidate("", Fused, reasons=["already fused"])
    candidate = _sequential(module) if isinstance(module, nn.Sequential) else _known_module(module)
    if candidate is not None and "forward" in module.__dict__:
        candidate.reasons.append("its forward was replaced on the instance")
    if candidate is not None and not pickles_by_default(type(module)):
        candidate.reasons.append(f"{type(module).__name__} has its own way of being pickled")
    return candidate


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a 2-D batch norm, of whatever class: what a fused call could take in."""
    norms = (nn.BatchNorm2d, nn.SyncBatchNorm)
    return isinstance(module, norms) or batch_norm.batch_norm_kind(module) is not None


def _known_module(module: nn.Module) -> Candidate | None:
    """A block or model of another library, or of a class derived from one."""
    cls = type(module)
    for base in cls.__mro__:
        known = _KNOWN.get((base.__module__, base.__qualname__))
        if known is not None:
            reasons = _method_reasons(cls, base, known.methods)
            reasons += [] if reasons else [f"it has {name}" for name in known.extras(module)]
            steps = [] if reasons else known.steps(module)
            reasons += [f"{step}: {reason}" for step in steps for reason in _step_reasons(module, step)]
            return Candidate(known.kind, known.mixin, steps, reasons) if steps or reasons else None
    return None


def _method_reasons(cls: type, base: type, methods: dict[str, str]) -> list[str]:
    for name, uses in methods.items():
        method = getattr(base, name)
        if getattr(cls, name) is not method:
            return [f"{cls.__name__} overrides {base.__name__}.{name}"]
        if uses and set(uses.split()) != set(method.__code__.co_names):
            return [f"{base.__module__}.{base.__name__}.{name} is not the one that resfuse knows"]
    return []


def _step_reasons(module: nn.Module, step: Step) -> list[str]:
    names = [name for name in (step.conv, step.bn, step.act) if name is not None]
    children = {name: _child(module, name) for name in names}
    missing = [name for name, child in children.items() if child is None]
    if missing:
        return [f"there is no module {name}" for name in missing]
    conv = None if step.conv is None else children[step.conv]
    return fused_call.reasons_against(conv, children[step.bn], step.residual)  # type: ignore[arg-type]


def _child(module: nn.Module, name: str) -> nn.Module | None:
    """A descendant by its dotted name, None where there is none."""
    found: nn.Module | None = module
    for part in name.split("."):
        found = None if found is None else found._modules.get(part)
    return found


def _sequential(module: nn.Sequential) -> Candidate | None:
    """A Sequential with a convolution followed by a norm, a norm followed by ReLU, or consecutive blocks in it."""
    modules = list(module)
    steps, left_steps = _scan(module, list(module._modules))
    chain = any(_is_block(one) and _is_block(other) for one, other in itertools.pairwise(modules))
    if not chain and not steps and not left_steps:
        return None
    reasons = _method_reasons(type(module), nn.Sequential, {"forward": ""})
    if not chain and not steps:
        reasons += [f"{step}: {reason}" for step, reason in left_steps]
    kind = "Sequential of blocks" if chain and not steps else "Sequential"
    return Candidate(kind, mixins.FusedSequential, steps, reasons, left_steps)


def _scan(parent: nn.Module, names: list[str]) -> tuple[list[Step], list[tuple[Step, str]]]:
    """The fused calls that stand for children called one after the other, and those that can not, with the reasons."""
    steps: list[Step] = []
    left: list[tuple[Step, str]] = []
    modules: list[Any] = [parent._modules[name] for name in names]
    index = 0
    while index < len(modules):
        run = sequential.run_at(modules, index)
        stop = _lookalike(modules, index) if run is None else run.stop
        if stop > index:
            step = _run_step(names, modules, index, stop)
            reasons = _step_reasons(parent, step)
            if reasons:
                left.append((step, "; ".join(reasons)))
            else:
                steps.append(step)
        index = max(stop, index + 1)
    return steps, left


def _is_block(module: nn.Module) -> bool:
    """Whether the module is, or can become, a block that gains from knowing that it follows another one."""
    if class_forward(module) in CHAINS:
        return True
    candidate = _known_module(module)
    return candidate is not None and not candidate.reasons and getattr(candidate.mixin, "forward", None) in CHAINS


def _lookalike(modules: list[nn.Module], index: int) -> int:
    """Where a run would stop if its convolution and norm were of the classes that can be fused; `index` for no run."""
    pair = modules[index : index + 2]
    return index + 2 if len(pair) == 2 and isinstance(pair[0], nn.Conv2d) and is_norm(pair[1]) else index


def _run_step(names: list[str], modules: list[nn.Module], index: int, stop: int) -> Step:
    conv = names[index] if isinstance(modules[index], nn.Conv2d) else None
    bn = index if conv is None else index + 1
    return Step(conv, names[bn], names[bn + 1] if bn + 1 < stop else None)
