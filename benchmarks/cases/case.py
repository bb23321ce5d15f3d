"""One thing to run: a module as a user would write it, and the shapes of its inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import nn

from benchmarks.providers.base import Level


@dataclasses.dataclass(frozen=True)
class Case:
    """A module of plain PyTorch with random weights, made anew by `build`, and what it is called with."""

    level: Level
    name: str
    """With the network and the first place where it occurs: "resnet50 layer1.0.conv2 x3"."""
    inputs: tuple[tuple[int, ...], ...]
    """Shapes: the input (N, C, H, W), then the residual."""
    build: Callable[[], nn.Module]
    """A function of a module, or a partial of one, so that it can be handed to another process."""
    image: bool = False
    """The input is an image, which needs no gradient; otherwise it is what another layer has put out."""
