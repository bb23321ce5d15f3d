"""The models of torchvision and timm that resfuse says it fuses, and how each is run for a comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Evaluate = Callable[[Any, Tensor], Tensor]
"""A model's outputs for images, all in one tensor (N, values), with nothing discrete in between (such as NMS)."""

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
WIDE = ("wide_resnet50_2", "wide_resnet101_2")
TORCHVISION = (
    *RESNETS,
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    *WIDE,
    *("regnet_x_400mf", "regnet_x_1_6gf", "regnet_x_3_2gf", "regnet_y_400mf", "regnet_y_1_6gf", "regnet_y_3_2gf"),
)
SEGMENTATION = ("fcn_resnet50", "fcn_resnet101", "deeplabv3_resnet50", "deeplabv3_resnet101")
RCNN = ("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn")
RETINANET = ("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2")
TIMM = (
    *RESNETS,
    *("resnet18d", "resnet34d", "resnet50d", "resnet101d", "resnet26t", "resnet50t", "resnetrs50"),
    *("resnext50_32x4d", "resnext50d_32x4d", "resnext101_32x8d"),
    *WIDE,
    *("seresnet18", "seresnet50", "seresnet152d", "seresnext50_32x4d"),
    *("ecaresnet26t", "ecaresnet50d", "ecaresnetlight"),
    *("resnetaa50", "resnetblur50", "resnet50_gn", "skresnet18"),
    *("resnetv2_18", "resnetv2_34", "resnetv2_50", "resnetv2_101", "resnetv2_18d", "resnetv2_50d", "resnetv2_50t"),
    *("resnetv2_50x1_bit",),
)  # fmt: skip


class Entry(NamedTuple):
    """One model."""

    family: str
    name: str
    build: Callable[[], nn.Module]
    """With random weights; nothing is downloaded."""
    evaluate: Evaluate

    def __str__(self) -> str:
        return f"{self.family}/{self.name}"


def entries() -> Iterator[Entry]:
    """Every model, from the packages that are installed.

    Raises:
        ImportError: torchvision or timm is missing.
    """
    import timm
    import torchvision
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    def get(name: str, **options: Any) -> Callable[[], nn.Module]:
        return lambda: torchvision.models.get_model(name, weights=None, **options)

    def create(name: str) -> Callable[[], nn.Module]:
        return lambda: timm.create_model(name, pretrained=False)

    def backbone(name: str) -> Callable[[], nn.Module]:
        return lambda: resnet_fpn_backbone(backbone_name=name, weights=None, trainable_layers=3)

    for name in TORCHVISION:
        yield Entry("torchvision", name, get(name), classify)
    yield Entry("torchvision", "Conv2dNormActivation stack", stack, classify)
    for name in SEGMENTATION:
        yield Entry("torchvision", name, get(name, weights_backbone=None, aux_loss=True), segment)
    for name in ("resnet18", "resnet50"):
        yield Entry("torchvision", f"{name}_fpn_backbone, frozen BN", backbone(name), features)
    for name in RCNN:
        yield Entry("torchvision", name, get(name, weights_backbone=None), detect_in_regions)
    for name in RETINANET:
        yield Entry("torchvision", name, get(name, weights_backbone=None), detect_densely)
    for name in TIMM:
        yield Entry("timm", name, create(name), classify)


def classify(model: Any, images: Tensor) -> Tensor:
    """The logits."""
    return model(images).flatten(1)


def segment(model: Any, images: Tensor) -> Tensor:
    """The maps of both classifiers."""
    return _joined(model(images))


def features(model: Any, images: Tensor) -> Tensor:
    """Every level of a feature pyramid."""
    return _joined(model(images))


def detect_densely(model: Any, images: Tensor) -> Tensor:
    """Scores and boxes of a RetinaNet for all anchors."""
    return _joined(model.head(list(model.backbone(images).values())))


def detect_in_regions(model: Any, images: Tensor) -> Tensor:
    """All outputs of an R-CNN's networks, for given regions instead of the proposals that survive a threshold."""
    levels = model.backbone(images)
    scores, deltas = model.rpn.head(list(levels.values()))
    height, width = images.shape[-2:]
    region = images.new_tensor([[0, 0, 0.7 * width, 0.5 * height], [0.2 * width, 0.4 * height, width - 1, height - 1]])
    regions, sizes = [region] * len(images), [(height, width)] * len(images)
    heads = model.roi_heads
    found = [*heads.box_predictor(heads.box_head(heads.box_roi_pool(levels, regions, sizes)))]
    if heads.has_mask():
        found.append(heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(levels, regions, sizes))))
    per_image = [tensor.reshape(len(images), -1) for tensor in found]
    return torch.cat([*(tensor.flatten(1) for tensor in (*scores, *deltas)), *per_image], 1)


def _joined(outputs: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([output.flatten(1) for output in outputs.values()], 1)


def stack() -> nn.Module:
    """Convolutions as torchvision's `Conv2dNormActivation` makes them: of all its options that a ResNet has."""
    from torchvision.ops.misc import Conv2dNormActivation

    return nn.Sequential(
        Conv2dNormActivation(3, 24, stride=2, bias=True),
        Conv2dNormActivation(24, 48, groups=4, inplace=False),
        Conv2dNormActivation(48, 64, kernel_size=1, activation_layer=None),
        Conv2dNormActivation(64, 40, dilation=2),
        Conv2dNormActivation(40, 40, activation_layer=nn.SiLU),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(40, 100),
    )
