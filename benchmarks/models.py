"""Whole networks, in inference and training; and the layers they consist of, found by walking them."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.case import Case

NAMES = ("resnet18", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "cifar_resnet20", "cifar_resnet110")


def cases(models: Sequence[str], batch: int, size: int | None = None) -> list[Case]:
    """One case per network.

    Args:
        models: torchvision's names, or cifar_resnet20 and so on.
        batch: images of an input.
        size: height and width of the images; by default those that a network is made for.
    """
    found = []
    for name in models:
        build_meta(name)  # an unknown name is an error now, not in the middle of a run
        extent = size or native_size(name)
        found.append(Case("models", name, (name,), ((batch, 3, extent, extent),), image=True))
    return found


def build(name: str) -> nn.Module:
    """A network with random weights, not fused.

    Raises:
        ValueError: there is no such network.
    """
    if name.startswith("cifar"):
        found = re.fullmatch(r"cifar_resnet(\d+)", name)
        blocks, rest = divmod(int(found[1]) - 2 if found else 0, 6)
        if blocks < 1 or rest:
            raise ValueError(f"model: expected cifar_resnet followed by 6n + 2, as in cifar_resnet20, got {name!r}")
        return _cifar(blocks)
    from torchvision import models

    return models.get_model(name, weights=None)


def build_meta(name: str) -> nn.Module:
    """The same on the meta device: parameters have no values."""
    with torch.device("meta"):
        return build(name)


def native_size(name: str) -> int:
    """Height and width of the images that a network is made for."""
    return 32 if name.startswith("cifar") else 224


class Layer(NamedTuple):
    """A convolution without bias and its batch norm, on inputs of one size: what distinguishes layers."""

    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    padding: int
    groups: int
    extent: tuple[int, int]
    """H and W of the input."""
    residual: bool
    relu: bool

    @property
    def output_extent(self) -> tuple[int, int]:
        """H and W of the output."""
        height, width = ((size + 2 * self.padding - self.kernel) // self.stride + 1 for size in self.extent)
        return height, width


def layers(name: str, size: int | None = None) -> dict[Layer, list[str]]:
    """Distinct conv + bn layers of a network in the order of its forward, with the places where each occurs."""
    from torchvision.models.resnet import BasicBlock, Bottleneck

    model = build_meta(name).eval()
    shapes: dict[str, tuple[int, ...]] = {}

    def note(path: str, args: tuple[torch.Tensor, ...]) -> None:
        shapes[path] = tuple(args[0].shape)

    for path, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, args, path=path: note(path, args))
    extent = size or native_size(name)
    with torch.no_grad():
        model(torch.empty(1, 3, extent, extent, device="meta"))
    found: dict[Layer, list[str]] = {}
    for path in shapes:
        conv = model.get_submodule(path)
        if not isinstance(conv, nn.Conv2d):
            continue
        parent, _, child = path.rpartition(".")
        last = {BasicBlock: "conv2", Bottleneck: "conv3"}.get(type(model.get_submodule(parent))) == child
        layer = Layer(
            conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], int(conv.padding[0]), conv.groups,
            shapes[path][2:4], residual=last, relu="downsample" not in path,
        )  # fmt: skip
        found.setdefault(layer, []).append(path)
    return found


def _cifar(blocks: int) -> nn.Module:
    """The eager form of `resfuse.models.cifar_resnet`, with its state_dict keys."""
    from torchvision.models.resnet import BasicBlock

    from resfuse.nn import ZeroPadShortcut

    children: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(3, 16, 3, 1, 1, bias=False)), ("bn1", nn.BatchNorm2d(16)), ("relu", nn.ReLU(inplace=True)),
    ]  # fmt: skip
    inplanes = 16
    for stage, planes in enumerate((16, 32, 64), start=1):
        stride = 1 if planes == inplanes else 2
        shortcut = None if stride == 1 else ZeroPadShortcut(inplanes, planes, stride)
        first = BasicBlock(inplanes, planes, stride, shortcut)
        rest = [BasicBlock(planes, planes) for _ in range(blocks - 1)]
        children.append((f"layer{stage}", nn.Sequential(first, *rest)))
        inplanes = planes
    children += [("avgpool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("fc", nn.Linear(64, 10))]
    return nn.Sequential(OrderedDict(children))


if __name__ == "__main__":
    from benchmarks import harness

    raise SystemExit(harness.main("models"))
