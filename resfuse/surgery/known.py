"""Classes of other libraries that `fuse_` supports, and the fused calls that replace their methods.

A class is identified by its qualified name (so that nothing is imported) and by the names that its methods use: if
they differ in another release of the library, the class is left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from resfuse.nn.fused_call import activation_of
from resfuse.surgery import mixins_timm, mixins_torchvision
from resfuse.surgery.fused import Fused
from resfuse.surgery.mixins import is_plain_sequential

Left = tuple[str, str]
"""The name of a child that is called as it is, and why."""


class Step(NamedTuple):
    """One fused call: names of children, and whether a residual is added."""

    conv: str | None
    bn: str | None
    act: str | None
    residual: bool = False

    def __str__(self) -> str:
        names = (self.conv, self.bn, "add" if self.residual else None, self.act)
        return " + ".join(name for name in names if name is not None)

    @property
    def children(self) -> list[str]:
        """The names in it."""
        return [name for name in (self.conv, self.bn, self.act) if name is not None]


class Known(NamedTuple):
    """A supported class and its replacement."""

    kind: str
    mixin: type[Fused]
    methods: dict[str, str]
    """The methods that a subclass must not override -> the names that each uses."""
    steps: Callable[[nn.Module], list[Step]] | None
    """None: its children are called one after the other."""
    left: Callable[[Any], list[Left]] = lambda module: []
    """Children that are called as they are, between the fused calls."""
    reasons: Callable[[Any], list[str]] = lambda module: []
    """Reasons against fusing the module at all."""
    takes_over: tuple[str, ...] = ()
    """Children that are no longer called; their own children are called instead."""


def find_known(cls: type) -> tuple[Known, type] | None:
    """The entry of a class or of the first of its bases that has one, and that base."""
    for base in cls.__mro__:
        known = _KNOWN.get((base.__module__, base.__qualname__))
        if known is not None:
            return known, base
    return None


def register(cls: type, known: Known) -> None:
    """Add a class to those that `fuse_` supports.

    Raises:
        ValueError: it is known already.
    """
    name = (cls.__module__, cls.__qualname__)
    if name in _KNOWN:
        raise ValueError(f"cls: {'.'.join(name)} is known already")
    _KNOWN[name] = known


def method_reasons(cls: type, base: type, methods: dict[str, str]) -> list[str]:
    """Reasons to treat the methods of a class as different from the supported ones of its base."""
    for name, uses in methods.items():
        method = getattr(base, name)
        if getattr(cls, name) is not method:
            return [f"{cls.__name__} overrides {base.__name__}.{name}"]
        if uses and set(uses.split()) != set(method.__code__.co_names):
            return [f"{base.__module__}.{base.__name__}.{name} differs from the supported releases"]
    return []


def _basic_steps(act1: str, act2: str) -> Callable[[nn.Module], list[Step]]:
    return lambda block: [Step("conv1", "bn1", act1), Step("conv2", "bn2", act2, residual=True)]


def _bottleneck_steps(act1: str, act2: str, act3: str) -> Callable[[nn.Module], list[Step]]:
    return lambda block: [
        Step("conv1", "bn1", act1),
        Step("conv2", "bn2", act2),
        Step("conv3", "bn3", act3, residual=True),
    ]


def _timm_basic_steps(block: nn.Module) -> list[Step]:
    if not mixins_timm.timm_block_extras(block):
        return _basic_steps("act1", "act2")(block)
    return [*_timm_step(block, 1), *_timm_last_steps(block, 2)]


def _timm_bottleneck_steps(block: nn.Module) -> list[Step]:
    if not mixins_timm.timm_block_extras(block):
        return _bottleneck_steps("act1", "act2", "act3")(block)
    return [Step("conv1", "bn1", "act1"), *_timm_step(block, 2), *_timm_last_steps(block, 3)]


def _timm_step(block: nn.Module, index: int) -> list[Step]:
    """The convolution that a block's drop-block and anti-aliasing belong to."""
    whole = activation_of(block._modules.get("drop_block")) == "identity"
    return [Step(f"conv{index}", f"bn{index}", f"act{index}" if whole else None)]


def _timm_last_steps(block: nn.Module, index: int) -> list[Step]:
    """The last convolution of a block with modules between its batch norm and the addition."""
    add = [Step(None, None, f"act{index}", residual=True)]
    relu = activation_of(block._modules.get(f"act{index}")) == "relu"
    return [Step(f"conv{index}", f"bn{index}", None), *(add if relu else [])]


def _timm_left(block: nn.Module) -> list[Left]:
    where = {
        "se": "after the last batch norm",
        "drop_path": "before the addition",
        "drop_block": "between batch norm and activation",
        "aa": "after the activation",
    }
    return [
        (name, f"{type(getattr(block, name)).__name__}, {where[name]}, is called as it is")
        for name in mixins_timm.timm_block_extras(block)
    ]


def _timm_stem_steps(model: nn.Module) -> list[Step]:
    stem: Any = model.conv1
    if is_plain_sequential(stem):
        return [Step(f"conv1.{len(stem) - 1}", "bn1", "act1")]
    return [Step("conv1", "bn1", "act1")]


def _timm_norm_step(model: Any) -> list[Step]:
    return [] if type(model.norm) is nn.Identity else [Step(None, "norm", None)]


def _timm_conv_steps(module: Any) -> list[Step]:
    return [] if type(module.bn) is nn.Sequential else [Step("conv", "bn", None)]


def _timm_conv_left(module: Any) -> list[Left]:
    aa = getattr(module, "aa", None)
    return [] if aa is None else [("aa", f"{type(aa).__name__}, after the activation, is called as it is")]


def _regnet_steps(block: Any) -> list[Step]:
    last = next(reversed(block.f._modules))
    conv, bn = block.f._modules[last]._modules
    return [Step(f"f.{last}.{conv}", f"f.{last}.{bn}", "activation", residual=True)]


def _regnet_reasons(block: Any) -> list[str]:
    return [] if mixins_torchvision.regnet_tail(block.f) else ["f has hooks on it, or is not what torchvision builds"]


_BASIC = "conv1 bn1 conv2 bn2 downsample"
_BOTTLENECK = "conv1 bn1 conv2 bn2 conv3 bn3 downsample"
_TIMM_EXTRAS = "drop_block aa se drop_path"
_STAGES = "maxpool layer1 layer2 layer3 layer4"

_KNOWN = {
    ("torchvision.models.resnet", "BasicBlock"): Known(
        "torchvision BasicBlock",
        mixins_torchvision.FusedTorchvisionBasicBlock,
        {"forward": f"{_BASIC} relu"},
        _basic_steps("relu", "relu"),
    ),
    ("torchvision.models.resnet", "Bottleneck"): Known(
        "torchvision Bottleneck",
        mixins_torchvision.FusedTorchvisionBottleneck,
        {"forward": f"{_BOTTLENECK} relu"},
        _bottleneck_steps("relu", "relu", "relu"),
    ),
    ("torchvision.models.resnet", "ResNet"): Known(
        "torchvision ResNet stem",
        mixins_torchvision.FusedTorchvisionResNet,
        {"forward": "_forward_impl", "_forward_impl": f"conv1 bn1 relu {_STAGES} avgpool torch flatten fc"},
        lambda model: [Step("conv1", "bn1", "relu")],
    ),
    ("torchvision.models.regnet", "ResBottleneckBlock"): Known(
        "torchvision ResBottleneckBlock",
        mixins_torchvision.FusedTorchvisionResBottleneckBlock,
        {"forward": "proj f activation"},
        _regnet_steps,
        reasons=_regnet_reasons,
        takes_over=("f.c",),
    ),
    ("torchvision.models._utils", "IntermediateLayerGetter"): Known(
        "torchvision IntermediateLayerGetter",
        mixins_torchvision.FusedIntermediateLayerGetter,
        {"forward": "OrderedDict items return_layers"},
        None,
    ),
    ("torchvision.models.segmentation.deeplabv3", "ASPPPooling"): Known(
        "torchvision ASPPPooling",
        mixins_torchvision.FusedASPPPooling,
        {"forward": "shape F interpolate"},
        None,
    ),
    ("timm.models.resnet", "BasicBlock"): Known(
        "timm BasicBlock",
        mixins_timm.FusedTimmBasicBlock,
        {"forward": f"{_BASIC} act1 act2 {_TIMM_EXTRAS}"},
        _timm_basic_steps,
        _timm_left,
    ),
    ("timm.models.resnet", "Bottleneck"): Known(
        "timm Bottleneck",
        mixins_timm.FusedTimmBottleneck,
        {"forward": f"{_BOTTLENECK} act1 act2 act3 {_TIMM_EXTRAS}"},
        _timm_bottleneck_steps,
        _timm_left,
    ),
    ("timm.models.resnet", "ResNet"): Known(
        "timm ResNet stem",
        mixins_timm.FusedTimmResNet,
        {
            "forward": "forward_features forward_head",
            "forward_features": f"conv1 bn1 act1 {_STAGES} grad_checkpointing torch jit is_scripting checkpoint_seq",
        },
        _timm_stem_steps,
    ),
    ("timm.models.resnetv2", "PreActBasic"): Known(
        "timm PreActBasic",
        mixins_timm.FusedTimmPreActBasic,
        {"forward": "norm1 downsample conv1 conv2 norm2 drop_path"},
        lambda block: [Step(None, "norm1", None), Step("conv1", "norm2", None)],
    ),
    ("timm.models.resnetv2", "PreActBottleneck"): Known(
        "timm PreActBottleneck",
        mixins_timm.FusedTimmPreActBottleneck,
        {"forward": "norm1 downsample conv1 conv2 norm2 conv3 norm3 drop_path"},
        lambda block: [Step(None, "norm1", None), Step("conv1", "norm2", None), Step("conv2", "norm3", None)],
    ),
    ("timm.models.resnetv2", "ResNetV2"): Known(
        "timm ResNetV2 norm",
        mixins_timm.FusedTimmResNetV2,
        {"forward": "forward_features forward_head", "forward_features": "stem stages norm"},
        _timm_norm_step,
    ),
    ("timm.layers.conv_bn_act", "ConvNormAct"): Known(
        "timm ConvNormAct",
        mixins_timm.FusedTimmConvNormAct,
        {"forward": "conv bn getattr aa"},
        _timm_conv_steps,
        _timm_conv_left,
    ),
}
