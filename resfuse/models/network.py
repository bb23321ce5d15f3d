"""The common part of the networks: stem, stages of residual blocks with their shortcuts, classifier, initialisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resfuse.models.stage import Stage
from resfuse.nn import PlainBlock, Projection, ZeroPadShortcut
from resfuse.nn.lazy import call, evaluated, force
from resfuse.ops.recompute import recomputed


class Network(nn.Module):
    """A network of residual blocks; the subclasses say which.

    Children: `conv1`, `bn1` and `relu` of the stem, `maxpool` where there is one, a `Stage` `layer1`, `layer2`, ... for
    each stage, of which all but the first halve the size and double the channels, `bn2` of a pre-activation network,
    `avgpool` and `fc`.  Weights are initialised as by `initialize`.

    Args:
        block: a class of blocks.
        counts: number of blocks of each stage.
        num_classes: length of the output.
        width: channels of the stem; a block of stage i has `planes = width * 2**i`.
        shortcut: "A", "B" or "C" as in the paper, see `make_shortcut`; blocks without shortcuts ignore it.
        in_channels: of the images, 3 for RGB.
        zero_init_residual: start with every block as the identity, see `initialize`.
        norm_layer: called with a number of channels; `torch.nn.BatchNorm2d` by default.
        checkpoint: checkpoint every that many blocks and recompute activations in backward (0: off); see `Stage`.
        recompute: compute in backward what batch norm, residual and ReLU make of a convolution's output, in place of
            keeping it; see `fuse_`.
        stem: kernel size, stride and padding of the first convolution.
        pool: 3x3 max pooling of stride 2 follows the stem.
        preactivated: for pre-activation blocks, of which the first one lacks its own BN and ReLU.
        block_options: for the constructor of every block.

    Raises:
        ValueError: `shortcut` is none of "A", "B" and "C", or a size is not positive.
    """

    def __init__(
        self,
        block: Any,
        counts: Sequence[int],
        *,
        num_classes: int,
        width: int,
        shortcut: str,
        in_channels: int = 3,
        zero_init_residual: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
        checkpoint: int = 0,
        recompute: bool = False,
        stem: tuple[int, int, int] = (3, 1, 1),
        pool: bool = False,
        preactivated: bool = False,
        block_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if shortcut not in ("A", "B", "C"):
            raise ValueError(f'shortcut: expected "A", "B" or "C", got {shortcut!r}')
        sizes = {"blocks": min(counts), "num_classes": num_classes, "in_channels": in_channels, "width": width}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        norm_layer = norm_layer or nn.BatchNorm2d
        options = {"norm_layer": norm_layer, **(block_options or {})}
        self.conv1 = nn.Conv2d(in_channels, width, *stem, bias=False)
        self.bn1 = norm_layer(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if pool else None
        self.inplanes = width
        for i, count in enumerate(counts):
            blocks = []
            planes = width * 2**i
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                outplanes = planes * block.expansion
                downsample = None
                if block is not PlainBlock:
                    projection_norm = None if preactivated else norm_layer
                    downsample = make_shortcut(shortcut, self.inplanes, outplanes, stride, projection_norm)
                if preactivated:
                    options["preactivated"] = i == j == 0
                blocks.append(block(self.inplanes, planes, stride, downsample, **options))
                self.inplanes = outplanes
            self.add_module(f"layer{i + 1}", Stage(blocks, checkpoint, recompute))
        self.stages = [f"layer{i + 1}" for i in range(len(counts))]
        self.recompute = recompute
        self.bn2 = norm_layer(self.inplanes) if preactivated else None
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, num_classes)
        initialize(self, zero_init_residual)

    @evaluated
    def forward(self, x: Tensor) -> Any:
        return recomputed(self._forward)(x) if self.recompute else self._forward(x)

    def _forward(self, x: Any) -> Tensor:
        x = call(self.relu, call(self.bn1, call(self.conv1, x)))
        if self.maxpool is not None:
            x = call(self.maxpool, x)
        for stage in self.stages:
            x = call(getattr(self, stage), x, last=True)
        if self.bn2 is not None:
            x = call(self.relu, call(self.bn2, x))
        return self.fc(torch.flatten(self.avgpool(force(x)), 1))


def make_shortcut(
    option: str, in_channels: int, out_channels: int, stride: int, norm_layer: Callable[..., nn.Module] | None
) -> nn.Module | None:
    """The `downsample` of a block; None is the identity.

    Args:
        option: "A": where the shape changes, the identity with zeros for the additional channels, without parameters.
            "B": there a 1x1 convolution and batch norm.  "C": these in every block.
        in_channels, out_channels, stride: of the block.
        norm_layer: for the batch norm of a projection; None if it has none.

    Source: He et al. 2016 (arXiv:1512.03385), section 3.3, and "Identity vs. projection shortcuts" in section 4.1.
    """
    changes = stride != 1 or in_channels != out_channels
    if option != "C" and not changes:
        return None
    if option == "A":
        return ZeroPadShortcut(in_channels, out_channels, stride)
    if norm_layer is None:
        return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return Projection(in_channels, out_channels, stride, norm_layer)


def initialize(model: nn.Module, zero_init_residual: bool = False) -> None:
    """Draw every convolution's weight from N(0, 2 / (out_channels * kernel area)); batch norms start as 1 and 0.

    Args:
        model: the network.
        zero_init_residual: call `zero_init_last` of every block that has one, so that each starts as the identity
            (Goyal et al. 2017, arXiv:1706.02677, section 5.1).

    Source: He et al. 2015 (arXiv:1502.01852), equation 14 (by the backward pass); as torchvision does.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)) and module.weight is not None:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    if zero_init_residual:
        for module in model.modules():
            zero_init_last = getattr(module, "zero_init_last", None)
            if zero_init_last is not None:
                zero_init_last()
