"""The ImageNet family: ResNet-18 to -152 and the plain networks, with torchvision's names and state_dict keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resfuse.models.initialization import check_sizes, initialize
from resfuse.models.shortcuts import check_shortcut, make_shortcut
from resfuse.models.stage import Stage
from resfuse.nn import BasicBlock, Bottleneck, BottleneckV1, PlainBlock
from resfuse.nn.fused_call import conv_bn_act

_BOTTLENECKS: dict[str, type[Bottleneck]] = {"v1": BottleneckV1, "v1.5": Bottleneck}


class ResNet(nn.Module):
    """A residual network for images of about 224x224, of fused blocks.

    With `shortcut="B"` its children and state_dict keys are those of `torchvision.models.ResNet`, and checkpoints load
    in both directions.  Constructed from the same seed it also starts with the same weights.

    Shapes: input (N, in_channels, H, W), of any H and W; output (N, num_classes).

    Equivalent to::

        x = maxpool(relu(bn1(conv1(x))))                     # 7x7 convolution, stride 2; 3x3 pooling, stride 2
        x = layer4(layer3(layer2(layer1(x))))                # `layers` blocks each, the first of the last three halves
        return fc(avgpool(x).flatten(1))

    Args:
        block: `BasicBlock`, `Bottleneck`, `BottleneckV1` or `PlainBlock` of `resfuse.nn`, or one with their interface.
        layers: number of blocks of the four stages.
        num_classes: length of the output.
        in_channels: of the images, 3 for RGB.
        width: channels of the stem; a block of stage i has `planes = width * 2**i`.
        groups, width_per_group: of a bottleneck's 3x3 convolution; 32 and 4 make ResNeXt 32x4d, 1 and 128 Wide-ResNet.
        shortcut: "A", "B" or "C" as in the paper, see `resfuse.models.shortcuts`; blocks without shortcuts ignore it.
        zero_init_residual: start with every block as the identity, see `resfuse.models.initialization`.
        norm_layer: called with a number of channels; `torch.nn.BatchNorm2d` by default.
        checkpoint: checkpoint every that many blocks and recompute activations in backward (0: off); see `Stage`.

    Raises:
        ValueError: `shortcut` is none of the three, `layers` are not four positive numbers, or a size is not positive.

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), table 1; structure and
    names are torchvision's.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck] | type[PlainBlock],
        layers: Sequence[int],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: int = 64,
        groups: int = 1,
        width_per_group: int = 64,
        shortcut: str = "B",
        zero_init_residual: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
        checkpoint: int = 0,
    ) -> None:
        super().__init__()
        check_shortcut(shortcut)
        check_sizes(num_classes=num_classes, in_channels=in_channels, width=width)
        if len(layers) != 4 or min(layers) < 1:
            raise ValueError(f"layers: expected four positive numbers of blocks, got {tuple(layers)}")
        norm_layer = norm_layer or nn.BatchNorm2d
        options: dict[str, Any] = {"groups": groups, "base_width": width_per_group, "norm_layer": norm_layer}
        self.conv1 = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False)
        self.bn1 = norm_layer(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.inplanes = width
        stages = []
        for i, count in enumerate(layers):
            blocks = []
            planes = width * 2**i
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                outplanes = planes * block.expansion
                downsample = None
                if block is not PlainBlock:
                    downsample = make_shortcut(shortcut, self.inplanes, outplanes, stride, norm_layer)
                blocks.append(block(self.inplanes, planes, stride, downsample, **options))
                self.inplanes = outplanes
            stages.append(Stage(blocks, checkpoint))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, num_classes)
        initialize(self, zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        x = conv_bn_act(self.conv1, self.bn1, x, None, self.relu)
        x = self.maxpool(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        x = self.avgpool(x)
        return self.fc(torch.flatten(x, 1))


def resnet18(**options: Any) -> ResNet:
    """ResNet-18, of basic blocks; `options` are the keyword arguments of `ResNet`.

    1.8 G multiply-adds at 224x224, 11.7 M parameters.  Loads torchvision's `resnet18`.

    Example:
        >>> model = resnet18(num_classes=10, width=8)
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    return ResNet(BasicBlock, (2, 2, 2, 2), **options)


def resnet34(**options: Any) -> ResNet:
    """ResNet-34, of basic blocks; `options` are the keyword arguments of `ResNet`.

    3.6 G multiply-adds at 224x224, 21.8 M parameters.  Loads torchvision's `resnet34`.
    """
    return ResNet(BasicBlock, (3, 4, 6, 3), **options)


def resnet50(*, version: str = "v1.5", **options: Any) -> ResNet:
    """ResNet-50, of bottlenecks; `options` are the keyword arguments of `ResNet`.

    3.8 G multiply-adds at 224x224 as v1 and 4.1 G as v1.5, 25.6 M parameters.  Loads torchvision's `resnet50` (v1.5).

    Args:
        version: "v1.5", with a block's stride on the 3x3 convolution, as in torchvision; or "v1", on the first 1x1, as
            in the paper.  The state_dict keys and shapes are the same.
        options: of `ResNet`.

    Raises:
        ValueError: `version` is neither of the two.
    """
    return ResNet(_bottleneck(version), (3, 4, 6, 3), **options)


def resnet101(*, version: str = "v1.5", **options: Any) -> ResNet:
    """ResNet-101, of bottlenecks; arguments as for `resnet50`.

    7.6 G multiply-adds at 224x224 as v1 and 7.8 G as v1.5, 44.5 M parameters.  Loads torchvision's `resnet101` (v1.5).
    """
    return ResNet(_bottleneck(version), (3, 4, 23, 3), **options)


def resnet152(*, version: str = "v1.5", **options: Any) -> ResNet:
    """ResNet-152, of bottlenecks; arguments as for `resnet50`.

    11.3 G multiply-adds at 224x224 as v1, 11.5 G as v1.5, 60.2 M parameters.  Loads torchvision's `resnet152` (v1.5).
    """
    return ResNet(_bottleneck(version), (3, 8, 36, 3), **options)


def plain18(**options: Any) -> ResNet:
    """ResNet-18 without its shortcuts; `options` are the keyword arguments of `ResNet`."""
    return ResNet(PlainBlock, (2, 2, 2, 2), **options)


def plain34(**options: Any) -> ResNet:
    """ResNet-34 without its shortcuts; `options` are the keyword arguments of `ResNet`.

    Its training error is higher than that of the shallower `plain18`: the degradation problem.
    """
    return ResNet(PlainBlock, (3, 4, 6, 3), **options)


def _bottleneck(version: str) -> type[Bottleneck]:
    if version not in _BOTTLENECKS:
        raise ValueError(f'version: expected "v1" or "v1.5", got {version!r}')
    return _BOTTLENECKS[version]
