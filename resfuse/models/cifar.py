"""The CIFAR family: residual networks of 6n + 2 layers for small images, and their plain counterparts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from resfuse.models.initialization import check_sizes, initialize
from resfuse.models.shortcuts import check_shortcut, make_shortcut
from resfuse.models.stage import Stage
from resfuse.nn import BasicBlock, PlainBlock
from resfuse.nn.fused_call import conv_bn_act


class CifarResNet(nn.Module):
    """A residual network for images of about 32x32, of fused blocks in three stages.

    Shapes: input (N, in_channels, H, W), of any H and W; output (N, num_classes).

    Equivalent to::

        x = relu(bn1(conv1(x)))                              # 3x3 convolution
        x = layer3(layer2(layer1(x)))                        # `blocks` blocks each, the first of the last two halves
        return fc(avgpool(x).flatten(1))

    Args:
        block: `BasicBlock` or `PlainBlock` of `resfuse.nn`, or one with their interface.
        blocks: number of blocks of each stage.
        num_classes: length of the output.
        in_channels: of the images, 3 for RGB.
        width: channels of the first stage; the second has twice as many, the third four times.
        shortcut: "A", "B" or "C" as in the paper, see `resfuse.models.shortcuts`; blocks without shortcuts ignore it.
            The paper's CIFAR networks have A.
        zero_init_residual: start with every block as the identity, see `resfuse.models.initialization`.
        norm_layer: called with a number of channels; `torch.nn.BatchNorm2d` by default.
        checkpoint: checkpoint every that many blocks and recompute activations in backward (0: off); see `Stage`.

    Raises:
        ValueError: `shortcut` is none of the three, or a size is not positive.

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), section 4.2.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[PlainBlock],
        blocks: int,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 16,
        shortcut: str = "A",
        zero_init_residual: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
        checkpoint: int = 0,
    ) -> None:
        super().__init__()
        check_shortcut(shortcut)
        check_sizes(blocks=blocks, num_classes=num_classes, in_channels=in_channels, width=width)
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = norm_layer(width)
        self.relu = nn.ReLU(inplace=True)
        inplanes, stages = width, []
        for i in range(3):
            modules = []
            planes = width * 2**i
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                downsample = None
                if block is not PlainBlock:
                    downsample = make_shortcut(shortcut, inplanes, planes, stride, norm_layer)
                modules.append(block(inplanes, planes, stride, downsample, norm_layer=norm_layer))
                inplanes = planes
            stages.append(Stage(modules, checkpoint))
        self.layer1, self.layer2, self.layer3 = stages
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inplanes, num_classes)
        initialize(self, zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        x = conv_bn_act(self.conv1, self.bn1, x, None, self.relu)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.avgpool(x)
        return self.fc(torch.flatten(x, 1))


def cifar_resnet(depth: int, **options: Any) -> CifarResNet:
    """The residual network of `depth` = 6n + 2 layers for small images; `options` are those of `CifarResNet`.

    Parameters: 20: 0.27 M, 32: 0.46 M, 44: 0.66 M, 56: 0.85 M, 110: 1.7 M, 1202: 19.4 M.

    Raises:
        ValueError: `depth` is not 6n + 2 with a positive n.

    Source: He et al. 2016 (arXiv:1512.03385), section 4.2 and table 6.

    Example:
        >>> model = cifar_resnet(20, in_channels=1)
        >>> model(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    return CifarResNet(BasicBlock, blocks_per_stage(depth, 6), **options)


def cifar_plain(depth: int, **options: Any) -> CifarResNet:
    """`cifar_resnet` without its shortcuts.

    Raises:
        ValueError: `depth` is not 6n + 2 with a positive n.

    Source: He et al. 2016 (arXiv:1512.03385), section 4.2 and figure 6.
    """
    return CifarResNet(PlainBlock, blocks_per_stage(depth, 6), **options)


def blocks_per_stage(depth: int, layers_per_n: int) -> int:
    """n, for a network of `layers_per_n * n + 2` layers."""
    n, rest = divmod(depth - 2, layers_per_n)
    if rest or n < 1:
        examples = ", ".join(str(layers_per_n * n + 2) for n in (3, 9, 18))
        raise ValueError(f"depth: expected {layers_per_n}n + 2 with n of at least 1 ({examples}, ...), got {depth}")
    return n
