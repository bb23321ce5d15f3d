"""The networks and blocks whose memory is counted: unfused, as PyTorch's users write them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

from torch import nn

from benchmarks.cases import networks

NAMES = (
    *("resnet18", "resnet50", "resnet101", "resnet152", "resnext50_32x4d"),
    *("cifar_resnet20", "cifar_resnet110"),
)


@dataclasses.dataclass(frozen=True)
class Network:
    """Something with one input (N, channels, extent, extent) that is trained."""

    name: str
    level: Literal["model", "block"]
    channels: int
    extent: int
    make: Callable[[], nn.Module]
    classes: int = 0
    """Of the model's output; a block has none."""

    def shape(self, batch: int) -> tuple[int, int, int, int]:
        """Of the input."""
        return batch, self.channels, self.extent, self.extent


def model(name: str, extent: int | None = None) -> Network:
    """A network of `benchmarks.cases` on images of the extent that it is made for, or of another.

    Raises:
        ValueError: there is no such network.
    """
    classes = [module for module in networks.build_unweighted(name).modules() if isinstance(module, nn.Linear)]
    make = functools.partial(networks.build, name)
    return Network(name, "model", 3, extent or networks.native_size(name), make, classes[-1].out_features)


def residual_block(kind: str, inplanes: int, planes: int, extent: int, stride: int = 1) -> Network:
    """A block of torchvision's ResNets, "BasicBlock" or "Bottleneck", on `extent` x `extent` pixels."""
    channels = planes * (4 if kind == "Bottleneck" else 1)
    projected = stride != 1 or inplanes != channels

    def make() -> nn.Module:
        from torchvision.models import resnet

        downsample = None
        if projected:
            conv = nn.Conv2d(inplanes, channels, 1, stride, bias=False)
            downsample = nn.Sequential(conv, nn.BatchNorm2d(channels))
        return getattr(resnet, kind)(inplanes, planes, stride, downsample)

    name = f"{kind} {inplanes}-{channels}{' + projection' if projected else ''}"
    return Network(name, "block", inplanes, extent, make)


BLOCKS = (
    residual_block("BasicBlock", 64, 64, 56),
    residual_block("BasicBlock", 64, 128, 56, stride=2),
    residual_block("Bottleneck", 64, 64, 56),
    residual_block("Bottleneck", 256, 64, 56),
    residual_block("Bottleneck", 256, 128, 56, stride=2),
    residual_block("Bottleneck", 2048, 512, 7),
)
"""Residual blocks of torchvision's ResNets, on the extents that images of 224x224 have there."""
