"""The fused methods of other libraries' modules.  Pickled models refer to these classes by name."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from resfuse.nn.blocks import (
    CHAINS,
    SEQUENTIAL_FORWARDS,
    BasicBlock,
    Bottleneck,
    Chain,
    basic_block_forward,
    bottleneck_forward,
    class_forward,
)
from resfuse.nn.fused_call import activation_of, bn_act, conv_bn_act, global_hooks, unobserved
from resfuse.nn.sequential import sequential_forward
from resfuse.surgery.fused import Fused


class FusedSequential(Fused):
    """`torch.nn.Sequential`."""

    def forward(self: Any, input: Any) -> Any:
        return sequential_forward(self._modules.values(), input)


SEQUENTIAL_FORWARDS.add(FusedSequential.forward)


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


class FusedIntermediateLayerGetter(Fused):
    """`torchvision.models._utils.IntermediateLayerGetter`, the backbone of its detection and segmentation models."""

    def forward(self: Any, x: Tensor) -> OrderedDict[str, Tensor]:
        outputs: OrderedDict[str, Tensor] = OrderedDict()
        for names in getter_segments(self):
            x = sequential_forward([self._modules[name] for name in names], x)
            if names[-1] in self.return_layers:
                outputs[self.return_layers[names[-1]]] = x
        return outputs


class FusedTimmBasicBlock(Fused):
    """`timm.models.resnet.BasicBlock`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if timm_block_extras(self):  # given to the block after it was fused
            return super().forward(x)  # type: ignore[misc]
        return basic_block_forward(self, x, "act1", "act2")

    def chained_forward(self: Any, x: Tensor) -> Tensor:
        return basic_block_forward(self, x, "act1", "act2", consume=True)


class FusedTimmBottleneck(Fused):
    """`timm.models.resnet.Bottleneck`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if timm_block_extras(self):  # given to the block after it was fused
            return super().forward(x)  # type: ignore[misc]
        return bottleneck_forward(self, x, "act1", "act2", "act3")

    def chained_forward(self: Any, x: Tensor) -> Tensor:
        return bottleneck_forward(self, x, "act1", "act2", "act3", consume=True)


class FusedTimmResNet(Fused):
    """`timm.models.resnet.ResNet`: its stem, of one convolution or, deep, of three."""

    def forward_features(self: Any, x: Tensor) -> Tensor:
        if not is_plain_sequential(self.conv1):
            x = conv_bn_act(self.conv1, self.bn1, x, None, self.act1)
        elif unobserved(self.conv1) and not global_hooks():
            *deep, conv = self.conv1
            x = conv_bn_act(conv, self.bn1, sequential_forward(deep, x), None, self.act1)
        else:
            x = bn_act(self.bn1, self.conv1(x), None, self.act1)
        x = self.maxpool(x)
        if self.grad_checkpointing:
            from timm.models._manipulate import checkpoint_seq

            return checkpoint_seq([self.layer1, self.layer2, self.layer3, self.layer4], x, flatten=True)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        return self.layer4(x)


def getter_segments(getter: Any) -> list[list[str]]:
    """The names of an IntermediateLayerGetter's children, each list up to one whose output is asked for."""
    segments: list[list[str]] = [[]]
    for name in getter._modules:
        segments[-1].append(name)
        if name in getter.return_layers:
            segments.append([])
    return [names for names in segments if names]


def is_plain_sequential(module: nn.Module) -> bool:
    """Whether a call of the module calls its children in order and does nothing else."""
    return class_forward(module) in SEQUENTIAL_FORWARDS


def timm_block_extras(block: Any) -> list[str]:
    """What a timm block has beside convolutions, norms and activations."""
    extras = [name for name in ("se", "drop_path") if getattr(block, name) is not None]
    return extras + [name for name in ("drop_block", "aa") if activation_of(block._modules.get(name)) != "identity"]


def _has_no_extras(block: Any) -> bool:
    return not timm_block_extras(block)


CHAINS[FusedTimmBasicBlock.forward] = Chain(FusedTimmBasicBlock.chained_forward, "bn2", "act2", _has_no_extras)
CHAINS[FusedTimmBottleneck.forward] = Chain(FusedTimmBottleneck.chained_forward, "bn3", "act3", _has_no_extras)
