"""Pre-activation networks for small images: the residual path is an identity from the first block to the last."""

from __future__ import annotations

from typing import Any

from resfuse.models.cifar import blocks_per_stage
from resfuse.models.network import Network
from resfuse.nn import PreActBasicBlock, PreActBottleneck

_BLOCKS: dict[str, type[PreActBasicBlock] | type[PreActBottleneck]] = {
    "basic": PreActBasicBlock,
    "bottleneck": PreActBottleneck,
}


class CifarPreActResNet(Network):
    """A pre-activation network for images of about 32x32, of fused blocks in three stages.

    The first BN and ReLU follow the stem's convolution, before the paths split, and fuse with it, so the first block
    has none of its own.  One more BN and ReLU follow the last addition.

    Shapes: input (N, in_channels, H, W), of any H and W; output (N, num_classes).

    Equivalent to::

        x = relu(bn1(conv1(x)))                              # 3x3 convolution
        x = layer3(layer2(layer1(x)))                        # `blocks` blocks each, the first of the last two halves
        return fc(avgpool(relu(bn2(x))).flatten(1))

    Args:
        block: `PreActBasicBlock` or `PreActBottleneck` of `resfuse.nn`.
        blocks: number of blocks of each stage.
        num_classes: length of the output.
        width: channels of the stem; a block of stage i has `planes = width * 2**i`.
        shortcut: "B": where the shape changes, a 1x1 convolution of the pre-activated input.  "A": there the identity
            with zeros for the additional channels.  "C": the convolution in every block, which the paper found worse.
        options: in_channels, zero_init_residual (start with the last convolution of every block at zero, so that the
            block is its shortcut), norm_layer and checkpoint, as for `Network`.

    Raises:
        ValueError: `shortcut` is none of the three, or a size is not positive.

    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks" (arXiv:1603.05027), figure 4 (e) and the
    appendix.  A block's stride is on its 3x3 convolution (the first one of a basic block).
    """

    def __init__(
        self,
        block: type[PreActBasicBlock] | type[PreActBottleneck],
        blocks: int,
        *,
        num_classes: int = 10,
        width: int = 16,
        shortcut: str = "B",
        **options: Any,
    ) -> None:
        options |= {"num_classes": num_classes, "width": width, "shortcut": shortcut}
        super().__init__(block, (blocks,) * 3, preactivated=True, **options)


def cifar_preact_resnet(depth: int, block: str | None = None, **options: Any) -> CifarPreActResNet:
    """The pre-activation network of `depth` layers for small images; `options` are those of `CifarPreActResNet`.

    Parameters: 110 (basic) and 164 (bottleneck): 1.7 M, 1001 (bottleneck): 10.3 M.

    Args:
        depth: 6n + 2 with basic blocks, 9n + 2 with bottlenecks.
        block: "basic" or "bottleneck"; None chooses as the paper does: bottlenecks from 164 layers on.
        options: of `CifarPreActResNet`.

    Raises:
        ValueError: `depth` is not of that form, with a positive n, or `block` is neither of the two.

    Source: He et al. 2016 (arXiv:1603.05027), tables 3 to 5.
    """
    if block is None:
        block = "bottleneck" if depth >= 164 else "basic"
    if block not in _BLOCKS:
        raise ValueError(f'block: expected "basic", "bottleneck" or None, got {block!r}')
    return CifarPreActResNet(_BLOCKS[block], blocks_per_stage(depth, 6 if block == "basic" else 9), **options)
