"""The networks of `resfuse.models` out of `torch.nn` modules alone, written down from the papers: what they must equal.

Names of children are those of `resfuse.models`, so that the state_dict keys can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)


class ZeroPad(nn.Module):
    """Option A: every second pixel, zeros for the new channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.missing, self.stride = out_channels - in_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(x, 1, self.stride) if self.stride > 1 else x  # as in the authors' Caffe models
        return torch.cat([x, x.new_zeros(x.shape[0], self.missing, *x.shape[2:])], 1)


def shortcut(option: str, in_channels: int, out_channels: int, stride: int, norm: bool = True) -> nn.Module | None:
    if option != "C" and stride == 1 and in_channels == out_channels:
        return None
    if option == "A":
        return ZeroPad(in_channels, out_channels, stride)
    projection = conv(in_channels, out_channels, 1, stride)
    return nn.Sequential(projection, nn.BatchNorm2d(out_channels)) if norm else projection


class Basic(nn.Module):
    """1512.03385, figure 5, left."""

    expansion = 1

    def __init__(self, in_channels: int, planes: int, stride: int, option: str) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.conv1, self.bn1 = conv(in_channels, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3), nn.BatchNorm2d(planes)
        self.downsample = shortcut(option, in_channels, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        f = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(f + (x if self.downsample is None else self.downsample(x)))


class Plain(Basic):
    """The same without a shortcut."""

    def __init__(self, in_channels: int, planes: int, stride: int, option: str) -> None:
        super().__init__(in_channels, planes, stride, option)
        self.downsample = None

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


class Bottleneck(nn.Module):
    """1512.03385, figure 5, right, with the stride where torchvision has it."""

    expansion = 4
    strides = (0, 1)

    def __init__(self, in_channels: int, planes: int, stride: int, option: str) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        first, second = (stride if here else 1 for here in self.strides)
        self.conv1, self.bn1 = conv(in_channels, planes, 1, first), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3, second), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = conv(planes, 4 * planes, 1), nn.BatchNorm2d(4 * planes)
        self.downsample = shortcut(option, in_channels, 4 * planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        f = self.relu(self.bn1(self.conv1(x)))
        f = self.relu(self.bn2(self.conv2(f)))
        f = self.bn3(self.conv3(f))
        return self.relu(f + (x if self.downsample is None else self.downsample(x)))


class BottleneckV1(Bottleneck):
    """With the stride where the paper has it."""

    strides = (1, 0)


class PreActBasic(nn.Module):
    """1603.05027, figure 4 (e); in the first block BN and ReLU come before, outside."""

    expansion = 1

    def __init__(self, in_channels: int, planes: int, stride: int, option: str, first: bool) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.bn1 = None if first else nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, planes, 3, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3)
        self.downsample = shortcut(option, in_channels, planes, stride, norm=False)

    def forward(self, x: Tensor) -> Tensor:
        p = x if self.bn1 is None else self.relu(self.bn1(x))
        return self.residual(p) + identity(self.downsample, x, p)

    def residual(self, p: Tensor) -> Tensor:
        return self.conv2(self.relu(self.bn2(self.conv1(p))))


class PreActBottleneck(nn.Module):
    """The same with three convolutions."""

    expansion = 4

    def __init__(self, in_channels: int, planes: int, stride: int, option: str, first: bool) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.bn1 = None if first else nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, planes, 1)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3, stride)
        self.bn3 = nn.BatchNorm2d(planes)
        self.conv3 = conv(planes, 4 * planes, 1)
        self.downsample = shortcut(option, in_channels, 4 * planes, stride, norm=False)

    def forward(self, x: Tensor) -> Tensor:
        p = x if self.bn1 is None else self.relu(self.bn1(x))
        f = self.conv2(self.relu(self.bn2(self.conv1(p))))
        return self.conv3(self.relu(self.bn3(f))) + identity(self.downsample, x, p)


def identity(downsample: nn.Module | None, x: Tensor, preactivated: Tensor) -> Tensor:
    """A shortcut without parameters takes the block's input, a convolution what BN and ReLU have made of it."""
    if downsample is None:
        return x
    return downsample(x) if isinstance(downsample, ZeroPad) else downsample(preactivated)


class Network(nn.Module):
    """Stem, stages, average pooling and one linear layer."""

    def __init__(
        self,
        block: Callable[..., nn.Module],
        layers: Sequence[int],
        option: str,
        width: int,
        classes: int,
        in_channels: int,
        large: bool,
    ) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False) if large else conv(in_channels, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        self.stages = len(layers)
        preactivation = block in (PreActBasic, PreActBottleneck)
        channels = width
        for i, count in enumerate(layers):
            stage = nn.Sequential()
            for j in range(count):
                extra = (i == j == 0,) if preactivation else ()
                stage.append(block(channels, width * 2**i, 2 if i > 0 and j == 0 else 1, option, *extra))
                channels = width * 2**i * block.expansion  # type: ignore[attr-defined]
            self.add_module(f"layer{i + 1}", stage)
        if preactivation:
            self.bn2 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, classes)
        self.preactivation = preactivation

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for i in range(self.stages):
            x = self.get_submodule(f"layer{i + 1}")(x)
        if self.preactivation:
            x = self.relu(self.bn2(x))
        return self.fc(x.mean((2, 3)))


_IMAGENET: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "resnet18": (Basic, (2, 2, 2, 2)),
    "resnet34": (Basic, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
    "plain18": (Plain, (2, 2, 2, 2)),
    "plain34": (Plain, (3, 4, 6, 3)),
}


def imagenet(
    name: str, *, shortcut: str = "B", version: str = "v1.5", width: int = 64, num_classes: int = 1000,
    in_channels: int = 3,
) -> Network:  # fmt: skip
    block, layers = _IMAGENET[name]
    block = BottleneckV1 if version == "v1" else block
    return Network(block, layers, shortcut, width, num_classes, in_channels, large=True)


def cifar(
    name: str, depth: int, block: str | None = None, *, shortcut: str | None = None, width: int = 16,
    num_classes: int = 10, in_channels: int = 3,
) -> Network:  # fmt: skip
    """1512.03385, section 4.2: 6n + 2 layers.  1603.05027: 9n + 2 with bottlenecks."""
    classes: dict[str, Callable[..., nn.Module]] = {"cifar_resnet": Basic, "cifar_plain": Plain}
    if name == "cifar_preact_resnet":
        block = block or ("bottleneck" if depth in (164, 1001) else "basic")
        chosen: Callable[..., nn.Module] = PreActBasic if block == "basic" else PreActBottleneck
        shortcut = shortcut or "B"
    else:
        chosen = classes[name]
    n = (depth - 2) // (9 if chosen is PreActBottleneck else 6)
    return Network(chosen, (n, n, n), shortcut or "A", width, num_classes, in_channels, large=False)
