"""The fused methods of timm's modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from resfuse.nn.blocks import CHAINS, Chain, basic_block_forward, bottleneck_forward, plain_convolution
from resfuse.nn.fused_call import (
    activation_of,
    add_act,
    bn_act,
    conv_bn_act,
    global_hooks,
    must_decompose,
    unobserved,
)
from resfuse.nn.sequential import sequential_forward
from resfuse.surgery.fused import Fused
from resfuse.surgery.mixins import is_plain_sequential


class FusedTimmBasicBlock(Fused):
    """`timm.models.resnet.BasicBlock`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if not timm_block_extras(self):
            return basic_block_forward(self, x, "act1", "act2")
        output = _convolve(self.conv1, self.bn1, x, self.drop_block, self.act1, self.aa)
        return _end(self, conv_bn_act(self.conv2, self.bn2, output), x, self.act2)

    def chained_forward(self: Any, x: Tensor) -> Tensor:
        return basic_block_forward(self, x, "act1", "act2", consume=True)


class FusedTimmBottleneck(Fused):
    """`timm.models.resnet.Bottleneck`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if not timm_block_extras(self):
            return bottleneck_forward(self, x, "act1", "act2", "act3")
        output = conv_bn_act(self.conv1, self.bn1, x, None, self.act1)
        output = _convolve(self.conv2, self.bn2, output, self.drop_block, self.act2, self.aa)
        return _end(self, conv_bn_act(self.conv3, self.bn3, output), x, self.act3)

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


class FusedTimmPreActBasic(Fused):
    """`timm.models.resnetv2.PreActBasic`: each BatchNormAct2d with the convolution before it."""

    def forward(self: Any, x: Tensor) -> Tensor:
        preactivated = bn_act(self.norm1, x)
        shortcut = x if self.downsample is None else self.downsample(preactivated)
        output = conv_bn_act(self.conv1, self.norm2, preactivated)
        return _add_shortcut(self, self.conv2, output, shortcut)


class FusedTimmPreActBottleneck(Fused):
    """`timm.models.resnetv2.PreActBottleneck`: each BatchNormAct2d with the convolution before it."""

    def forward(self: Any, x: Tensor) -> Tensor:
        preactivated = bn_act(self.norm1, x)
        shortcut = x if self.downsample is None else self.downsample(preactivated)
        output = conv_bn_act(self.conv1, self.norm2, preactivated)
        output = conv_bn_act(self.conv2, self.norm3, output)
        return _add_shortcut(self, self.conv3, output, shortcut)


class FusedTimmResNetV2(Fused):
    """`timm.models.resnetv2.ResNetV2`: the BatchNormAct2d that follows the last pre-activation block."""

    def forward_features(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.stages(x)
        return bn_act(self.norm, x)


class FusedTimmConvNormAct(Fused):
    """`timm.layers.ConvNormAct`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        output = conv_bn_act(self.conv, self.bn, x)
        aa = getattr(self, "aa", None)
        return output if aa is None else aa(output)


def timm_block_extras(block: Any) -> list[str]:
    """Names of a timm block's active children other than convolutions, norms and activations."""
    extras = [name for name in ("se", "drop_path") if getattr(block, name) is not None]
    return extras + [name for name in ("drop_block", "aa") if activation_of(block._modules.get(name)) != "identity"]


def _convolve(
    conv: nn.Module, bn: nn.Module, input: Tensor, drop_block: nn.Module, act: nn.Module, aa: nn.Module
) -> Tensor:
    """The convolution of a block that drop-block and anti-aliasing belong to."""
    if activation_of(drop_block) == "identity":
        return aa(conv_bn_act(conv, bn, input, None, act))
    return aa(act(drop_block(conv_bn_act(conv, bn, input))))


def _end(block: Any, output: Tensor, input: Tensor, act: nn.Module) -> Tensor:
    """The end of a block with attention, drop-path and the like, after its last batch norm."""
    if block.se is not None:
        output = block.se(output)
    if block.drop_path is not None:
        output = block.drop_path(output)
    shortcut = input if block.downsample is None else block.downsample(input)
    return add_act(output, shortcut, act, in_place=True)


def _add_shortcut(block: Any, conv: nn.Module, input: Tensor, shortcut: Tensor) -> Tensor:
    """conv(input) + shortcut, added in place where the convolution's output has no other reader."""
    z = conv(input)
    if activation_of(block.drop_path) != "identity":
        return block.drop_path(z) + shortcut
    own = plain_convolution(conv) and not global_hooks() and not must_decompose(z)
    return z.add_(shortcut) if own and z.dtype is shortcut.dtype and z.shape == shortcut.shape else z + shortcut


def _has_no_extras(block: Any) -> bool:
    return not timm_block_extras(block)


CHAINS[FusedTimmBasicBlock.forward] = Chain(FusedTimmBasicBlock.chained_forward, "bn2", "act2", _has_no_extras)
CHAINS[FusedTimmBottleneck.forward] = Chain(FusedTimmBottleneck.chained_forward, "bn3", "act3", _has_no_extras)
