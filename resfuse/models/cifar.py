"""The CIFAR family: residual networks of 6n + 2 layers for small images, and their plain counterparts."""

from __future__ import annotations

from typing import Any

from resfuse.models.network import Network
from resfuse.nn import BasicBlock, PlainBlock


class CifarResNet(Network):
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
        width: channels of the first stage; the second has twice as many, the third four times.
        shortcut: "A", "B" or "C" as in the paper, see `resfuse.models.network`; blocks without shortcuts ignore it.
            The paper's CIFAR networks have A.
        options: in_channels, zero_init_residual, norm_layer and checkpoint, as for `Network`.

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
        width: int = 16,
        shortcut: str = "A",
        **options: Any,
    ) -> None:
        options |= {"num_classes": num_classes, "width": width, "shortcut": shortcut}
        super().__init__(block, (blocks,) * 3, **options)


def cifar_resnet(depth: int, **options: Any) -> CifarResNet:
    """The residual network of `depth` = 6n + 2 layers for small images; `options` are those of `CifarResNet`.

    Parameters: 20: 0.27 M, 32: 0.46 M, 44: 0.66 M, 56: 0.85 M, 110: 1.7 M, 1202: 19.4 M.

    Raises:
        ValueError: `depth` is not 6n + 2 with a positive n.

    Source: He et al. 2016 (arXiv:1512.03385), section 4.2 and table 6.

    Example:
        >>> import torch
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
