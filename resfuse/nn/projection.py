"""Projection: the shortcut with parameters, options B and C of the ResNet paper."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from resfuse.nn.blocks import conv1x1
from resfuse.nn.sequential import FusedSequential


class Projection(FusedSequential):
    """1x1 convolution and batch norm as one fused call, with the state_dict keys of torchvision's `downsample`.

    Shapes: input (N, in_channels, H, W), output (N, out_channels, ceil(H / stride), ceil(W / stride)).

    Equivalent to::

        nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm_layer(out_channels))

    Args:
        in_channels, out_channels, stride: of the convolution.
        norm_layer: called with a number of channels; `torch.nn.BatchNorm2d` by default.

    Source: He et al. 2016 (arXiv:1512.03385), equation 2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__(conv1x1(in_channels, out_channels, stride), (norm_layer or nn.BatchNorm2d)(out_channels))
