"""The blocks of torchvision and of the paper, and the fused forward that `fuse_` gives to other libraries' blocks.

Each block runs one fused call per convolution; the last one adds the residual.  In inference it writes its output over
the residual where that has no other reader: behind a projection and, in a Sequential that passes the output of one
block to the next (`resfuse.nn.sequential`), in every block after the first.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from resfuse.nn.batch_norm import batch_norm_kind
from resfuse.nn.fused_call import activation_of, conv_bn_act, global_hooks, unobserved
from resfuse.nn.zero_pad import ZeroPadShortcut

Modules = dict[str, Any]
NormLayer = Callable[..., nn.Module]


class Chain(NamedTuple):
    """A block as one of several in a row, each taking the output of the one before."""

    forward: Callable[[Any, Tensor], Tensor]
    """Its forward for an input that is not read afterwards."""
    bn: str
    act: str
    """Names of the last batch norm and activation."""
    applies: Callable[[Any], bool] = lambda block: True
    """True if the block can currently be chained."""


# Keyed by the forward of a class, so that a subclass which overrides it does not match.
CHAINS: dict[Callable[..., Tensor], Chain] = {}

# Forwards that call the children in order and do nothing else.
SEQUENTIAL_FORWARDS: set[Callable[..., Any]] = {nn.Sequential.forward}


def basic_block_forward(block: nn.Module, input: Tensor, act1: str, act2: str, consume: bool = False) -> Tensor:
    """Run a block with conv1, bn1, conv2, bn2 and downsample.

    Args:
        block: the module.
        input: (N, C, H, W).
        act1, act2: names of its activations.
        consume: the input is not read afterwards and may be overwritten.
    """
    modules: Modules = block._modules
    output = conv_bn_act(modules["conv1"], modules["bn1"], input, None, modules[act1])
    shortcut = _shortcut(block, input, consume and plain_convolution(modules["conv1"]))
    return conv_bn_act(modules["conv2"], modules["bn2"], output, shortcut[0], modules[act2], *shortcut[1:])


def bottleneck_forward(
    block: nn.Module, input: Tensor, act1: str, act2: str, act3: str, consume: bool = False
) -> Tensor:
    """Run a block with conv1, bn1, conv2, bn2, conv3, bn3 and downsample; see `basic_block_forward`."""
    modules: Modules = block._modules
    output = conv_bn_act(modules["conv1"], modules["bn1"], input, None, modules[act1])
    output = conv_bn_act(modules["conv2"], modules["bn2"], output, None, modules[act2])
    shortcut = _shortcut(block, input, consume and plain_convolution(modules["conv1"]))
    return conv_bn_act(modules["conv3"], modules["bn3"], output, shortcut[0], modules[act3], *shortcut[1:])


def _shortcut(block: nn.Module, input: Tensor, consume: bool) -> tuple[Tensor, bool, bool]:
    """The residual, `overwrite_residual` and `pad_residual` of a block's last call."""
    downsample: Any = block.downsample
    if downsample is None:
        return input, consume, False
    if pads_with_zeros(downsample):
        return downsample.select(input), False, True
    return downsample(input), returns_new_tensor(downsample), False


def pads_with_zeros(downsample: nn.Module | None) -> bool:
    """True if calling a shortcut can be replaced by adding what it selects to the first channels."""
    return type(downsample) is ZeroPadShortcut and unobserved(downsample) and not global_hooks()


def returns_new_tensor(module: nn.Module) -> bool:
    """True if a module is a Sequential that ends in a batch norm, and only the caller sees its output."""
    if class_forward(module) not in SEQUENTIAL_FORWARDS or not module._modules or not unobserved(module):
        return False
    return ends_unseen(next(reversed(module._modules.values())), None)


def class_forward(module: nn.Module) -> Any:
    """The forward of a module's class; None if it has none (a ScriptModule)."""
    return getattr(type(module), "forward", None)


def ends_unseen(bn: Any, act: nn.Module | None) -> bool:
    """True if a batch norm and activation return a new tensor that nothing on them observes or keeps."""
    kind = batch_norm_kind(bn)
    return kind is not None and not kind.activated and unobserved(bn) and activation_of(act) is not None


def plain_convolution(conv: nn.Module) -> bool:
    """True if nothing on a convolution observes or keeps its input or output."""
    return type(conv) is nn.Conv2d and unobserved(conv) and "_conv_forward" not in conv.__dict__


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

    def forward(self, x: Tensor) -> Tensor:
        return basic_block_forward(self, x, "relu", "relu")


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

    def forward(self, x: Tensor) -> Tensor:
        return bottleneck_forward(self, x, "relu", "relu", "relu")


class BottleneckV1(Bottleneck):
    """`Bottleneck` with the stride on the first 1x1 convolution instead of the 3x3 (ResNet v1).

    Shapes, arguments, children and state_dict keys are those of `Bottleneck`.  The weights of either load into the
    other, but compute something else where the stride is not 1.

    Source: He et al. 2016 (arXiv:1512.03385), table 1 and its authors' released models.
    """

    stride_first: ClassVar[bool] = True


CHAINS[BasicBlock.forward] = Chain(lambda block, x: basic_block_forward(block, x, "relu", "relu", True), "bn2", "relu")
CHAINS[Bottleneck.forward] = Chain(
    lambda block, x: bottleneck_forward(block, x, "relu", "relu", "relu", True), "bn3", "relu"
)


def check_basic_block(groups: int, base_width: int, dilation: int) -> None:
    """Reject the options that torchvision's BasicBlock rejects, with the same exceptions."""
    if groups != 1 or base_width != 64:
        raise ValueError(f"BasicBlock: expected groups=1 and base_width=64, got {groups} and {base_width}")
    if dilation > 1:
        raise NotImplementedError(f"BasicBlock: expected dilation=1, got {dilation}")
