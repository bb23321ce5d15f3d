"""The networks by name: torchvision's, and the CIFAR networks of the ResNet paper of torchvision's blocks."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.cases.modules import ConvSpec
from resfuse.nn import ZeroPadShortcut

CIFAR = re.compile(r"cifar_resnet(\d+)")
SIZE, CIFAR_SIZE = 224, 32
"""Height and width of the images that the networks are made for."""


class Place(NamedTuple):
    """A module in a network, and the shape of its input without the batch."""

    path: str
    module: nn.Module
    shape: tuple[int, ...]


def build(name: str) -> nn.Module:
    """A network with random weights, not fused.

    Args:
        name: a model of torchvision, or "cifar_resnet20" and so on (6n + 2 layers).

    Raises:
        ValueError: there is no such network.
    """
    from torchvision import models

    if name.startswith("cifar"):
        found = CIFAR.fullmatch(name)
        blocks, rest = divmod(int(found[1]) - 2 if found else 0, 6)
        if blocks < 1 or rest:
            raise ValueError(f"model: expected cifar_resnet followed by 6n + 2, as in cifar_resnet20, got {name!r}")
        return _cifar(blocks)
    return models.get_model(name, weights=None)


def build_unweighted(name: str) -> nn.Module:
    """The same on the meta device: parameters have no values."""
    with torch.device("meta"):
        return build(name)


def native_size(name: str) -> int:
    """Height and width of the images that a network is made for."""
    return CIFAR_SIZE if name.startswith("cifar") else SIZE


def layer_specs(name: str, size: int) -> dict[ConvSpec, list[str]]:
    """The distinct convolutions with a batch norm behind them, and where in the network each occurs."""
    places = list(_walk(name, size))
    norms = {place.path for place in places if isinstance(place.module, nn.BatchNorm2d)}
    blocks = {place.path: place.module for place in places if is_block(place.module)}
    found: dict[ConvSpec, list[str]] = {}
    for path, module, shape in places:
        if isinstance(module, nn.Conv2d):
            norm = path[:-1] + "1" if path.endswith(".0") else path.replace("conv", "bn")  # downsample.0; conv2
            assert norm in norms and module.bias is None and module.dilation == (1, 1), path
            parent, _, child = path.rpartition(".")
            last = parent in blocks and not hasattr(blocks[parent], f"conv{int(child.removeprefix('conv')) + 1}")
            spec = ConvSpec(
                module.in_channels, module.out_channels, module.kernel_size[0], module.stride[0],
                int(module.padding[0]), module.groups, (shape[1], shape[2]), last, "downsample" not in path,
            )  # fmt: skip
            found.setdefault(spec, []).append(path)
    return found


def block_paths(name: str, size: int) -> dict[str, tuple[tuple[int, ...], int]]:
    """The first place of every distinct residual block -> the shape of its input without the batch, and how often."""
    found: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for path, module, shape in _walk(name, size):
        if is_block(module):
            kind = f"{module} {shape}"  # the text names every convolution with its sizes
            first, _, count = found.get(kind, (path, shape, 0))
            found[kind] = (first, shape, count + 1)
    return {path: (shape, count) for path, shape, count in found.values()}


def build_block(name: str, path: str) -> nn.Module:
    """A block of a network by its place."""
    return build(name).get_submodule(path)


def is_block(module: nn.Module) -> bool:
    """Whether it is one of torchvision's residual blocks."""
    from torchvision.models.resnet import BasicBlock, Bottleneck

    return isinstance(module, (BasicBlock, Bottleneck))


def _walk(name: str, size: int) -> Iterator[Place]:
    """All modules in the order in which they are called; nothing is computed."""
    places: list[Place] = []

    def note(path: str) -> object:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            places.append(Place(path, module, tuple(args[0].shape[1:])))

        return hook

    model = build_unweighted(name).eval()
    with torch.no_grad():
        for path, module in model.named_modules():
            module.register_forward_pre_hook(note(path))  # type: ignore[arg-type]
        model(torch.empty(1, 3, size, size, device="meta"))
    return iter(places)


def _cifar(blocks: int) -> nn.Module:
    """What `resfuse.models.cifar_resnet` computes, with its state_dict keys, as the user of torchvision has it."""
    from torchvision.models.resnet import BasicBlock

    children: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(3, 16, 3, 1, 1, bias=False)), ("bn1", nn.BatchNorm2d(16)), ("relu", nn.ReLU(inplace=True)),
    ]  # fmt: skip
    inplanes = 16
    for stage, planes in enumerate((16, 32, 64), start=1):
        stride = 1 if planes == inplanes else 2
        shortcut = None if planes == inplanes else ZeroPadShortcut(inplanes, planes, stride)
        first = BasicBlock(inplanes, planes, stride, shortcut)
        rest = [BasicBlock(planes, planes) for _ in range(blocks - 1)]
        children.append((f"layer{stage}", nn.Sequential(first, *rest)))
        inplanes = planes
    children += [("avgpool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("fc", nn.Linear(64, 10))]
    return nn.Sequential(OrderedDict(children))
