"""BottleneckV1: the bottleneck as first published, with the stride on its first convolution."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from resfuse.nn.blocks import Bottleneck, conv1x1, conv3x3


class BottleneckV1(Bottleneck):
    """`Bottleneck` with the stride on the first 1x1 convolution instead of the 3x3 (ResNet v1).

    Shapes, arguments, children and state_dict keys are those of `Bottleneck`.  The weights of either load into the
    other, but compute something else where the stride is not 1.

    Source: He et al. 2016 (arXiv:1512.03385), table 1 and its authors' released models.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__(inplanes, planes, stride, downsample, groups, base_width, dilation, norm_layer)
        if stride != 1:
            width = self.conv1.out_channels
            self.conv1 = conv1x1(inplanes, width, stride)
            self.conv2 = conv3x3(width, width, 1, groups, dilation)
