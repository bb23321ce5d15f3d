"""Pre-activation residual blocks: BN and ReLU come before each convolution, and nothing follows the addition."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from resfuse.nn.blocks import check_basic_block, conv1x1, conv3x3
from resfuse.nn.fused_call import bn_act, conv_bn_act


class PreActBasicBlock(nn.Module):
    """The two-convolution pre-activation block, with its BN-ReLUs fused (the second one with the first convolution).

    Shapes: input (N, inplanes, H, W), output (N, planes, ceil(H / stride), ceil(W / stride)).

    Equivalent to::

        preactivated = relu(bn1(input))
        output = relu(bn2(conv1(preactivated)))
        output = conv2(output) + (input if downsample is None else downsample(preactivated))

    Args:
        inplanes, planes, stride, groups, base_width, dilation, norm_layer: as for `BasicBlock`.
        downsample: what brings the (pre-activated) input to the output's shape, where they differ: a convolution
            without batch norm, which would not be an identity.

    Raises:
        ValueError: `groups` is not 1 or `base_width` not 64.
        NotImplementedError: `dilation` is more than 1.

    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks" (arXiv:1603.05027), figure 4 (e); a
    projection takes the pre-activated input, as in its authors' code (its section 4.1: for shortcuts that are none).
    """

    expansion: ClassVar[int] = 1

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
        super().__init__()
        check_basic_block(groups, base_width, dilation)
        norm_layer = norm_layer or nn.BatchNorm2d
        self.bn1 = norm_layer(inplanes)
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn2 = norm_layer(planes)
        self.conv2 = conv3x3(planes, planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, input: Tensor) -> Tensor:
        preactivated = _preactivate(self, input)
        output = conv_bn_act(self.conv1, self.bn2, preactivated, None, self.relu)
        return self.conv2(output) + _shortcut(self, input, preactivated)


class PreActBottleneck(nn.Module):
    """The three-convolution pre-activation block, with its BN-ReLUs fused (two of them with a convolution).

    Shapes: input (N, inplanes, H, W), output (N, 4 planes, ceil(H / stride), ceil(W / stride)).

    Equivalent to::

        preactivated = relu(bn1(input))
        output = relu(bn2(conv1(preactivated)))
        output = relu(bn3(conv2(output)))
        output = conv3(output) + (input if downsample is None else downsample(preactivated))

    Args:
        inplanes, planes, stride, groups, base_width, dilation, norm_layer: as for `Bottleneck`.
        downsample: as for `PreActBasicBlock`.

    Source: He et al. 2016 (arXiv:1603.05027), as for `PreActBasicBlock`.
    """

    expansion: ClassVar[int] = 4

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
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.bn1 = norm_layer(inplanes)
        self.conv1 = conv1x1(inplanes, width)
        self.bn2 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn3 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, input: Tensor) -> Tensor:
        preactivated = _preactivate(self, input)
        output = conv_bn_act(self.conv1, self.bn2, preactivated, None, self.relu)
        output = conv_bn_act(self.conv2, self.bn3, output, None, self.relu)
        return self.conv3(output) + _shortcut(self, input, preactivated)


def _preactivate(block: PreActBasicBlock | PreActBottleneck, input: Tensor) -> Tensor:
    """relu(bn1(input)), which the convolutions and a projection share."""
    return bn_act(block.bn1, input, None, block.relu)


def _shortcut(block: PreActBasicBlock | PreActBottleneck, input: Tensor, preactivated: Tensor) -> Tensor:
    """The input itself, or the projection of what the convolutions see."""
    return input if block.downsample is None else block.downsample(preactivated)
