"""Pre-activation residual blocks: BN and ReLU come before each convolution, and nothing follows the addition."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from resfuse.nn.blocks import (
    NormLayer,
    ResidualBlock,
    check_basic_block,
    conv1x1,
    conv3x3,
    pads_with_zeros,
    plain_convolution,
)
from resfuse.nn.fused_call import bn_act, conv_bn_act, global_hooks, must_decompose
from resfuse.nn.zero_pad import ZeroPadShortcut


class PreActBasicBlock(ResidualBlock):
    """The two-convolution pre-activation block, with its BN-ReLUs fused (the second one with the first convolution).

    Shapes: input (N, inplanes, H, W), output (N, planes, ceil(H / stride), ceil(W / stride)).

    Equivalent to::

        preactivated = relu(bn1(input))
        output = relu(bn2(conv1(preactivated)))
        output = conv2(output) + (input if downsample is None else downsample(preactivated))

    Args:
        inplanes, planes, stride, groups, base_width, dilation, norm_layer: as for `BasicBlock`.
        downsample: maps the input to the output's shape, where they differ: a convolution of the pre-activated input
            (without batch norm, which would not be an identity), or a `ZeroPadShortcut` of the input itself.
        preactivated: the input has already been through batch norm and ReLU, so the block has no `bn1`: for the first
            block of a network, whose BN and ReLU follow the stem's convolution (and fuse with it).

    Raises:
        ValueError: `groups` is not 1 or `base_width` not 64.
        NotImplementedError: `dilation` is more than 1.

    The shortcut is added in place to the last convolution's output, which has no other reader.

    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks" (arXiv:1603.05027), figure 4 (e); a
    projection takes the pre-activated input, as in the authors' code (see section 4.1).
    """

    last: ClassVar[str] = "conv2"
    bn1: nn.Module | None

    def __init__(self, *args: Any, preactivated: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        if preactivated:
            self.bn1 = None

    def _add_layers(
        self, inplanes: int, planes: int, stride: int, groups: int, width: int, dilation: int, norm: NormLayer
    ) -> None:
        check_basic_block(groups, width, dilation)
        self.bn1 = norm(inplanes)
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn2 = norm(planes)
        self.conv2 = conv3x3(planes, planes)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, input: Tensor) -> Tensor:
        preactivated = _preactivate(self, input)
        output = conv_bn_act(self.conv1, self.bn2, preactivated, None, self.relu)
        return _add_shortcut(self, self.conv2, output, input, preactivated)


class PreActBottleneck(ResidualBlock):
    """The three-convolution pre-activation block, with its BN-ReLUs fused (two of them with a convolution).

    Shapes: input (N, inplanes, H, W), output (N, 4 planes, ceil(H / stride), ceil(W / stride)).

    Equivalent to::

        preactivated = relu(bn1(input))
        output = relu(bn2(conv1(preactivated)))
        output = relu(bn3(conv2(output)))
        output = conv3(output) + (input if downsample is None else downsample(preactivated))

    Args:
        inplanes, planes, stride, groups, base_width, dilation, norm_layer: as for `Bottleneck`.
        downsample, preactivated: as for `PreActBasicBlock`.

    Source: He et al. 2016 (arXiv:1603.05027), as for `PreActBasicBlock`.
    """

    expansion: ClassVar[int] = 4

    last: ClassVar[str] = "conv3"
    bn1: nn.Module | None

    def __init__(self, *args: Any, preactivated: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        if preactivated:
            self.bn1 = None

    def _add_layers(
        self, inplanes: int, planes: int, stride: int, groups: int, width: int, dilation: int, norm: NormLayer
    ) -> None:
        width = int(planes * (width / 64.0)) * groups
        self.bn1 = norm(inplanes)
        self.conv1 = conv1x1(inplanes, width)
        self.bn2 = norm(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn3 = norm(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, input: Tensor) -> Tensor:
        preactivated = _preactivate(self, input)
        output = conv_bn_act(self.conv1, self.bn2, preactivated, None, self.relu)
        output = conv_bn_act(self.conv2, self.bn3, output, None, self.relu)
        return _add_shortcut(self, self.conv3, output, input, preactivated)


def _preactivate(block: PreActBasicBlock | PreActBottleneck, input: Tensor) -> Tensor:
    """relu(bn1(input)), which the convolutions and a projection share."""
    return input if block.bn1 is None else bn_act(block.bn1, input, None, block.relu)


def _add_shortcut(
    block: PreActBasicBlock | PreActBottleneck, conv: nn.Module, output: Tensor, input: Tensor, preactivated: Tensor
) -> Tensor:
    """conv(output) + shortcut, added in place where the convolution's output has no other reader."""
    downsample, z = block.downsample, conv(output)
    own = plain_convolution(conv) and not global_hooks() and not must_decompose(z)
    if own and pads_with_zeros(downsample) and z.dtype == input.dtype:
        residual = downsample.select(input)  # type: ignore[union-attr, operator]
        first = z[:, : residual.shape[1]]
        if first.shape != residual.shape:
            raise ValueError(f"input: the shortcut gives {tuple(residual.shape)}, the convolutions {tuple(z.shape)}")
        first += residual
        return z
    if downsample is None:
        residual = input
    else:
        residual = downsample(input if isinstance(downsample, ZeroPadShortcut) else preactivated)
    return z.add_(residual) if own and z.dtype == residual.dtype and z.shape == residual.shape else z + residual
