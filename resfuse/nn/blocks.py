"""The blocks of torchvision and of the paper.

Each block runs one fused call per convolution; the last one adds the residual.  In inference it writes its output over
the residual where that has no other reader: behind a projection and, in a Sequential, in every block after the first.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from resfuse.nn.lazy import add_, call, evaluated, guard

Modules = dict[str, Any]
NormLayer = Callable[..., nn.Module]


def basic_block_forward(block: nn.Module, input: Any) -> Any:
    """Run a block with conv1, bn1, conv2, bn2, relu and downsample."""
    modules: Modules = block._modules
    output = conv_bn_relu(modules, "1", input)
    return _add_shortcut(block, call(modules["bn2"], call(modules["conv2"], output)), input)


def bottleneck_forward(block: nn.Module, input: Any) -> Any:
    """Run a block with conv1, bn1, conv2, bn2, conv3, bn3, relu and downsample."""
    modules: Modules = block._modules
    output = conv_bn_relu(modules, "2", conv_bn_relu(modules, "1", input))
    return _add_shortcut(block, call(modules["bn3"], call(modules["conv3"], output)), input)


def conv_bn_relu(modules: Modules, index: str, input: Any) -> Any:
    """relu(bn(conv(input))) with the convolution and batch norm of that number."""
    return call(modules["relu"], call(modules["bn" + index], call(modules["conv" + index], input)))


def _add_shortcut(block: Any, output: Any, input: Any) -> Any:
    residual = input if block.downsample is None else call(block.downsample, guard(input, output))
    return call(block.relu, add_(output, residual, last=True))


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """3x3 convolution without bias that keeps the size at stride 1."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, dilation, dilation, groups, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


class ResidualBlock(nn.Module):
    """The constructor of the blocks, with the arguments of torchvision's."""

    expansion: ClassVar[int] = 1
    last: ClassVar[str]
    """Name of the last layer before the addition."""

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
        self._add_layers(inplanes, planes, stride, groups, base_width, dilation, norm_layer or nn.BatchNorm2d)
        self.downsample = downsample
        self.stride = stride

    @abstractmethod
    def _add_layers(
        self, inplanes: int, planes: int, stride: int, groups: int, width: int, dilation: int, norm: NormLayer
    ) -> None:
        """Add convolutions, norms and activation; `width` is `base_width`."""

    def zero_init_last(self) -> None:
        """Set the weight of the layer before the addition to zero, so that the block starts as its shortcut.

        Source: Goyal et al. 2017 (arXiv:1706.02677), section 5.1.
        """
        weight = getattr(self._modules[self.last], "weight", None)
        if weight is not None:
            nn.init.zeros_(weight)


class BasicBlock(ResidualBlock):
    """The two-convolution residual block of ResNet-18 and -34, fused.

    Arguments, children and state_dict keys are those of torchvision's `BasicBlock`, so it can be handed to
    `torchvision.models.ResNet(block=...)` and load its checkpoints.

    Shapes: input (N, inplanes, H, W), output (N, planes, ceil(H / stride), ceil(W / stride)).

    Equivalent to::

        output = relu(bn1(conv1(input)))
        output = bn2(conv2(output))
        output += input if downsample is None else downsample(input)
        output = relu(output)

    Args:
        inplanes, planes: channels of the input and of the output.
        stride: of the first convolution.
        downsample: maps the input to the output's shape, where they differ.
        groups, base_width, dilation: must be 1, 64 and 1; accepted because `ResNet` passes them.
        norm_layer: called with a number of channels; `torch.nn.BatchNorm2d` by default.

    Raises:
        ValueError: `groups` or `base_width` have another value.
        NotImplementedError: `dilation` is more than 1.

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), figure 5, left.
    """

    last: ClassVar[str] = "bn2"

    def _add_layers(
        self, inplanes: int, planes: int, stride: int, groups: int, width: int, dilation: int, norm: NormLayer
    ) -> None:
        check_basic_block(groups, width, dilation)
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm(planes)

    @evaluated
    def forward(self, x: Tensor) -> Any:
        return basic_block_forward(self, x)


class Bottleneck(ResidualBlock):
    """The three-convolution residual block of ResNet-50 and deeper, ResNeXt and Wide-ResNet, fused.

    Arguments, children and state_dict keys are those of torchvision's `Bottleneck`, so it can be handed to
    `torchvision.models.ResNet(block=...)` and load its checkpoints.  The stride is on the 3x3 convolution (v1.5).

    Shapes: input (N, inplanes, H, W), output (N, 4 planes, ceil(H / stride), ceil(W / stride)).

    Equivalent to::

        output = relu(bn1(conv1(input)))
        output = relu(bn2(conv2(output)))
        output = bn3(conv3(output))
        output += input if downsample is None else downsample(input)
        output = relu(output)

    Args:
        inplanes: channels of the input.
        planes: a quarter of the output's channels.
        stride: of the 3x3 convolution.
        downsample: maps the input to the output's shape, where they differ.
        groups, base_width: the 3x3 convolution has `int(planes * base_width / 64) * groups` channels, in `groups`.
        dilation: of the 3x3 convolution.
        norm_layer: called with a number of channels; `torch.nn.BatchNorm2d` by default.

    Source: He et al. 2016 (arXiv:1512.03385), figure 5, right; Xie et al. 2017 (arXiv:1611.05431) for `groups`;
    Goyal et al. 2017 (arXiv:1706.02677) for the stride's place.
    """

    expansion: ClassVar[int] = 4
    last: ClassVar[str] = "bn3"
    stride_first: ClassVar[bool] = False
    """The stride is on the first 1x1 convolution (v1)."""

    def _add_layers(
        self, inplanes: int, planes: int, stride: int, groups: int, width: int, dilation: int, norm: NormLayer
    ) -> None:
        width = int(planes * (width / 64.0)) * groups
        first, second = (stride, 1) if self.stride_first else (1, stride)
        self.conv1 = conv1x1(inplanes, width, first)
        self.bn1 = norm(width)
        self.conv2 = conv3x3(width, width, second, groups, dilation)
        self.bn2 = norm(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)

    @evaluated
    def forward(self, x: Tensor) -> Any:
        return bottleneck_forward(self, x)


class BottleneckV1(Bottleneck):
    """`Bottleneck` with the stride on the first 1x1 convolution instead of the 3x3 (ResNet v1).

    Shapes, arguments, children and state_dict keys are those of `Bottleneck`.  The weights of either load into the
    other, but compute something else where the stride is not 1.

    Source: He et al. 2016 (arXiv:1512.03385), table 1 and its authors' released models.
    """

    stride_first: ClassVar[bool] = True


def check_basic_block(groups: int, base_width: int, dilation: int) -> None:
    """Reject the options that torchvision's BasicBlock rejects, with the same exceptions."""
    if groups != 1 or base_width != 64:
        raise ValueError(f"BasicBlock: expected groups=1 and base_width=64, got {groups} and {base_width}")
    if dilation > 1:
        raise NotImplementedError(f"BasicBlock: expected dilation=1, got {dilation}")
