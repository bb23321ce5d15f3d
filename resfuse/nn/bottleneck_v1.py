"""BottleneckV1: the bottleneck as first published, with the stride on its first convolution."""

from __future__ import annotations

from typing import ClassVar

from resfuse.nn.blocks import Bottleneck


class BottleneckV1(Bottleneck):
    """`Bottleneck` with the stride on the first 1x1 convolution instead of the 3x3 (ResNet v1).

    Shapes, arguments, children and state_dict keys are those of `Bottleneck`.  The weights of either load into the
    other, but compute something else where the stride is not 1.

    Source: He et al. 2016 (arXiv:1512.03385), table 1 and its authors' released models.
    """

    stride_first: ClassVar[bool] = True
