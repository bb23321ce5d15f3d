"""Modules: drop-in parts of a ResNet that run fused, with the state_dict keys of the modules they stand for."""

from resfuse.nn.add_relu import AddReLU
from resfuse.nn.blocks import BasicBlock, Bottleneck
from resfuse.nn.bn_act import BNAct2d
from resfuse.nn.conv_bn_act import ConvBNAct2d
from resfuse.nn.preact_blocks import PreActBasicBlock, PreActBottleneck
from resfuse.nn.sync_bn_act import SyncBNAct2d

__all__ = [
    "AddReLU",
    "BNAct2d",
    "BasicBlock",
    "Bottleneck",
    "ConvBNAct2d",
    "PreActBasicBlock",
    "PreActBottleneck",
    "SyncBNAct2d",
]
