"""The residual networks of the papers, built from fused blocks; torchvision's weights load where it has the network."""

from resfuse.models.cifar import CifarResNet, cifar_plain, cifar_resnet
from resfuse.models.cifar_preact import CifarPreActResNet, cifar_preact_resnet
from resfuse.models.imagenet import ResNet, plain18, plain34, resnet18, resnet34, resnet50, resnet101, resnet152
from resfuse.models.stage import Stage

__all__ = [
    "CifarPreActResNet",
    "CifarResNet",
    "ResNet",
    "Stage",
    "cifar_plain",
    "cifar_preact_resnet",
    "cifar_resnet",
    "plain18",
    "plain34",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
]
