"""The ImageNet family: ResNet-18 to -152 and the plain networks, with torchvision's names and state_dict keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from resfuse.models.network import Network
from resfuse.nn import BasicBlock, Bottleneck, BottleneckV1, PlainBlock

_BOTTLENECKS: dict[str, type[Bottleneck]] = {"v1": BottleneckV1, "v1.5": Bottleneck}


class ResNet(Network):
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
        width: channels of the stem; a block of stage i has `planes = width * 2**i`.
        groups, width_per_group: of a bottleneck's 3x3 convolution; 32 and 4 make ResNeXt 32x4d, 1 and 128 Wide-ResNet.
        shortcut: "A", "B" or "C" as in the paper, see `resfuse.models.network`; blocks without shortcuts ignore it.
        options: in_channels, zero_init_residual, norm_layer and checkpoint, as for `Network`.

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
        width: int = 64,
        groups: int = 1,
        width_per_group: int = 64,
        shortcut: str = "B",
        **options: Any,
    ) -> None:
        if len(layers) != 4 or min(layers) < 1:
            raise ValueError(f"layers: expected four positive numbers of blocks, got {tuple(layers)}")
        options["block_options"] = {"groups": groups, "base_width": width_per_group}
        options |= {"num_classes": num_classes, "width": width, "shortcut": shortcut}
        super().__init__(block, layers, stem=(7, 2, 3), pool=True, **options)


def resnet18(**options: Any) -> ResNet:
    """ResNet-18, of basic blocks; `options` are the keyword arguments of `ResNet`.

    1.8 G multiply-adds at 224x224, 11.7 M parameters.  Loads torchvision's `resnet18`.

    Example:
        >>> import torch
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
