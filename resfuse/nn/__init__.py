"""Modules: drop-in parts of a ResNet that run fused, with the state_dict keys of the modules they replace."""

from resfuse.nn.add_relu import AddReLU
from resfuse.nn.blocks import BasicBlock, Bottleneck, BottleneckV1
from resfuse.nn.bn_act import BNAct2d
from resfuse.nn.conv_bn_act import ConvBNAct2d
from resfuse.nn.plain_block import PlainBlock
from resfuse.nn.preact_blocks import PreActBasicBlock, PreActBottleneck
from resfuse.nn.projection import Projection
from resfuse.nn.sync_bn_act import SyncBNAct2d
from resfuse.nn.zero_pad import ZeroPadShortcut

__all__ = [
    "AddReLU",
    "BNAct2d",
    "BasicBlock",
    "Bottleneck",
    "BottleneckV1",
    "ConvBNAct2d",
    "PlainBlock",
    "PreActBasicBlock",
    "PreActBottleneck",
    "Projection",
    "SyncBNAct2d",
    "ZeroPadShortcut",
]
