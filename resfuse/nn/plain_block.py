"""PlainBlock: two convolutions without a shortcut, the ResNet paper's baseline."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from resfuse.nn.blocks import BasicBlock, conv_bn_relu
from resfuse.nn.lazy import evaluated


class PlainBlock(BasicBlock):
    """`BasicBlock` without its shortcut: the block of the plain networks, fused.

    Shapes: input (N, inplanes, H, W), output (N, planes, ceil(H / stride), ceil(W / stride)).

    Equivalent to::

        output = relu(bn1(conv1(input)))
        output = relu(bn2(conv2(output)))

    Args:
        inplanes, planes, stride, groups, base_width, dilation, norm_layer: as for `BasicBlock`.
        downsample: must be None; accepted because networks pass it.

    Raises:
        ValueError: `downsample` is not None, `groups` not 1 or `base_width` not 64.
        NotImplementedError: `dilation` is more than 1.

    Source: He et al. 2016 (arXiv:1512.03385), section 3.3 and figure 3, middle.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *args: Any,
        **options: Any,
    ) -> None:
        if downsample is not None:
            raise ValueError(
                f"downsample: expected None, a plain block has no shortcut, got {type(downsample).__name__}"
            )
        super().__init__(inplanes, planes, stride, None, *args, **options)

    @evaluated
    def forward(self, x: Tensor) -> Any:
        return conv_bn_relu(self._modules, "2", conv_bn_relu(self._modules, "1", x))

    def zero_init_last(self) -> None:
        """Do nothing: without a shortcut, zeroing the last batch norm would cut the network."""
