"""Pre-activation residual blocks: BN and ReLU come before each convolution, and nothing follows the addition."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from resfuse.nn.blocks import NormLayer, ResidualBlock, check_basic_block, conv1x1, conv3x3
from resfuse.nn.lazy import add, call, evaluated, guard, settle
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

    @evaluated
    def forward(self, input: Tensor) -> Any:
        preactivated = _preactivate(self, input)
        output = _conv_bn_relu(self, "conv1", "bn2", preactivated)
        return _add_shortcut(self, call(self.conv2, output), input, preactivated)


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

    @evaluated
    def forward(self, input: Tensor) -> Any:
        preactivated = _preactivate(self, input)
        output = _conv_bn_relu(self, "conv1", "bn2", preactivated)
        output = _conv_bn_relu(self, "conv2", "bn3", output)
        return _add_shortcut(self, call(self.conv3, output), input, preactivated)


def _preactivate(block: PreActBasicBlock | PreActBottleneck, input: Any) -> Any:
    return input if block.bn1 is None else settle(call(block.relu, call(block.bn1, input)))


def _conv_bn_relu(block: Any, conv: str, bn: str, input: Any) -> Any:
    return call(block.relu, call(block._modules[bn], call(block._modules[conv], input)))


def _add_shortcut(block: Any, z: Any, input: Any, preactivated: Any) -> Any:
    downsample = block.downsample
    if downsample is None:
        return add(z, input)
    return add(z, call(downsample, guard(input if isinstance(downsample, ZeroPadShortcut) else preactivated, z)))
