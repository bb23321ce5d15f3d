"""The fused methods of torchvision's modules."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse.nn.blocks import BasicBlock, Bottleneck, returns_new_tensor
from resfuse.nn.fused_call import add_act, conv_bn_act, global_hooks, keeps_dtype, unobserved
from resfuse.nn.sequential import sequential_forward
from resfuse.surgery.fused import Fused
from resfuse.surgery.mixins import is_plain_sequential


class FusedTorchvisionBasicBlock(Fused):
    """`torchvision.models.resnet.BasicBlock`."""

    forward = BasicBlock.forward


class FusedTorchvisionBottleneck(Fused):
    """`torchvision.models.resnet.Bottleneck`."""

    forward = Bottleneck.forward


class FusedTorchvisionResNet(Fused):
    """`torchvision.models.resnet.ResNet`: its stem."""

    def _forward_impl(self: Any, x: Tensor) -> Tensor:
        x = conv_bn_act(self.conv1, self.bn1, x, None, self.relu)
        x = self.maxpool(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


class FusedTorchvisionResBottleneckBlock(Fused):
    """`torchvision.models.regnet.ResBottleneckBlock`: its last convolution adds the shortcut."""

    def forward(self: Any, x: Tensor) -> Tensor:
        tail = regnet_tail(self.f)
        residual = x if self.proj is None else self.proj(x)
        if tail is None or global_hooks():
            return add_act(self.f(x), residual, self.activation)
        output = sequential_forward(tail.rest, x)
        if keeps_dtype(output, residual):
            overwrite = self.proj is not None and returns_new_tensor(self.proj)
            return conv_bn_act(tail.conv, tail.bn, output, residual, self.activation, overwrite)
        return add_act(conv_bn_act(tail.conv, tail.bn, output), residual, self.activation)


class FusedIntermediateLayerGetter(Fused):
    """`torchvision.models._utils.IntermediateLayerGetter`, the backbone of its detection and segmentation models."""

    def forward(self: Any, x: Tensor) -> OrderedDict[str, Tensor]:
        outputs: OrderedDict[str, Tensor] = OrderedDict()
        for names in getter_segments(self):
            x = sequential_forward([self._modules[name] for name in names], x)
            if names[-1] in self.return_layers:
                outputs[self.return_layers[names[-1]]] = x
        return outputs


class FusedASPPPooling(Fused):
    """`torchvision.models.segmentation.deeplabv3.ASPPPooling`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        x = sequential_forward(self._modules.values(), x)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class RegNetTail(NamedTuple):
    """The children of a `BottleneckTransform`, the last one (`c`) split into its parts."""

    rest: list[nn.Module]
    conv: nn.Module
    bn: nn.Module


def regnet_tail(transform: nn.Module) -> RegNetTail | None:
    """A `BottleneckTransform` in parts; None if it, or its child `c`, must be called."""
    children = list(transform._modules.values())
    last = children[-1] if children else None
    for module in (transform, last):
        if module is None or not is_plain_sequential(module) or not unobserved(module):
            return None
        if module._compiled_call_impl is not None:
            return None
    parts = list(last._modules.values())  # type: ignore[union-attr]
    return RegNetTail(children[:-1], parts[0], parts[1]) if len(parts) == 2 else None  # type: ignore[arg-type]


def getter_segments(getter: Any) -> list[list[str]]:
    """The names of an IntermediateLayerGetter's children, split after each requested output."""
    segments: list[list[str]] = [[]]
    for name in getter._modules:
        segments[-1].append(name)
        if name in getter.return_layers:
            segments.append([])
    return [names for names in segments if names]
