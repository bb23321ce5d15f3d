"""`fuse_` on torchvision's families: what is fused in each, and that nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.regnet import BlockParams, RegNet, ResBottleneckBlock
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
from torchvision.models.segmentation.fcn import FCN, FCNHead
from torchvision.ops.misc import Conv2dNormActivation, FrozenBatchNorm2d

from resfuse import fuse_
from tests import models
from tests.models import both, calls_by_kind

IMAGE = (2, 3, 48, 48)


def resnet(block: type[nn.Module] = Bottleneck, **options: Any) -> nn.Module:
    return ResNet(block, [1, 1, 1, 1], num_classes=5, **options)


def regnet(se_ratio: float | None) -> nn.Module:
    parameters = BlockParams.from_init_params(4, 16, 8.0, 2.0, 8, se_ratio=se_ratio)
    return RegNet(parameters, num_classes=5, stem_width=8)


def dilated(**layers: str) -> nn.Module:
    return IntermediateLayerGetter(resnet(replace_stride_with_dilation=[False, True, True]), layers)


def without_dropout(model: nn.Module) -> nn.Module:
    """Dropout draws its numbers in another order in another memory format."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def joined(model: nn.Module, images: Tensor) -> Tensor:
    """All outputs of a model that returns a dictionary."""
    return torch.cat([output.flatten(1) for output in model(images).values()], 1)


def fcn() -> nn.Module:
    return without_dropout(FCN(dilated(layer3="out", layer2="aux"), FCNHead(1024, 4), FCNHead(512, 4)))


def deeplab() -> nn.Module:
    return without_dropout(DeepLabV3(dilated(layer3="out"), DeepLabHead(1024, 4, (1, 2, 3))))


def stack() -> nn.Module:
    """torchvision's Conv2dNormActivation with all of its options that a ResNet has."""
    return nn.Sequential(
        Conv2dNormActivation(3, 24, stride=2, bias=True),
        Conv2dNormActivation(24, 48, groups=4, inplace=False),
        Conv2dNormActivation(48, 64, kernel_size=1, activation_layer=None),
        Conv2dNormActivation(64, 40, dilation=2),
        Conv2dNormActivation(40, 40, activation_layer=nn.SiLU),
    )


def backbone(norm: Callable[..., nn.Module] = FrozenBatchNorm2d) -> nn.Module:
    return resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=norm, trainable_layers=3)


STEM, BLOCK, GETTER, CONV = "ResNet", "Bottleneck", "IntermediateLayerGetter", "Conv2dNormActivation"
FAMILIES: dict[str, tuple[Callable[[], nn.Module], models.Evaluate, dict[str, int]]] = {
    "resnet, basic": (
        lambda: resnet(BasicBlock), models.call, {STEM: 1, "BasicBlock": 8, "Sequential": 3},
    ),
    "resnext": (
        lambda: resnet(groups=8, width_per_group=4), models.call, {STEM: 1, BLOCK: 12, "Sequential": 4},
    ),
    "wide": (lambda: resnet(width_per_group=128), models.call, {STEM: 1, BLOCK: 12, "Sequential": 4}),
    # The stem, three calls of each block and two projections, which all are Conv2dNormActivations.
    "regnet x": (lambda: regnet(None), models.call, {"SimpleStemIN": 1, CONV: 4 * 3 + 2}),
    "regnet y": (lambda: regnet(0.25), models.call, {"SimpleStemIN": 1, CONV: 4 * 3 + 2}),
    "Conv2dNormActivation": (stack, models.call, {CONV: 5}),
    "fcn": (fcn, joined, {GETTER: 1, BLOCK: 9, "Sequential": 3, "FCNHead": 2}),
    "deeplabv3": (
        deeplab,
        joined,
        {GETTER: 1, BLOCK: 9, "Sequential": 3 + 2, "DeepLabHead": 1, "ASPPConv": 3, "ASPPPooling": 1},
    ),
    "detection backbone": (
        lambda: backbone(nn.BatchNorm2d),
        joined,
        {GETTER: 1, "BasicBlock": 16, "Sequential": 3},
    ),
    "detection backbone, frozen norms": (
        backbone, joined, {GETTER: 1, "BasicBlock": 16, "Sequential": 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_eager(family: str) -> None:
    build, evaluate, calls = FAMILIES[family]
    report = models.assert_equal_before_and_after(build, IMAGE, evaluate)
    assert calls_by_kind(report) == calls
    assert {module.reason for module in report.left} <= {"activation is SiLU: applied after the fused conv + bn"}


def test_frozen_norm_has_its_own_eps() -> None:
    """torchvision computes (var + eps)^-1/2 with the module's eps, which counts where variances are small."""
    for eps in (0.0, 1e-5, 0.3):
        fused, eager, _ = both(lambda eps=eps: resnet(norm_layer=lambda c: FrozenBatchNorm2d(c, eps=eps)))
        for model in (fused, eager):
            for name, buffer in model.named_buffers():
                if name.endswith("running_var"):
                    buffer.uniform_(0.01, 0.1, generator=torch.Generator().manual_seed(len(name)))
        with models.counted_calls() as calls:
            models.assert_same(fused.double(), eager.double(), models.random_input(IMAGE))
        assert calls.conv_bn_act == 17


def detector() -> nn.Module:
    model = FasterRCNN(
        backbone(), num_classes=3, min_size=64, max_size=96, box_detections_per_img=5,
        rpn_post_nms_top_n_train=30, rpn_post_nms_top_n_test=20, box_batch_size_per_image=16,
    )  # fmt: skip
    for tower in (model.rpn.head, model.roi_heads.box_predictor):
        for module in tower.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(module.weight, std=0.1)
    return model


def pictures(dtype: torch.dtype) -> list[Tensor]:
    return [models.random_input((3, *size), seed=size[0]).to(dtype).sigmoid() for size in ((64, 48), (40, 72))]


def test_faster_rcnn_detects_the_same() -> None:
    fused, eager, report = both(detector)
    with models.counted_calls() as calls, torch.no_grad():
        found = fused.double().eval()(pictures(torch.float64))
        assert calls.total == report.fused_ops == 20
        expected = eager.double().eval()(pictures(torch.float64))
    assert sum(len(image["boxes"]) for image in expected) > 0
    torch.testing.assert_close(found, expected)


def test_faster_rcnn_training_step() -> None:
    """Losses, and all weights after a step, with most of the backbone frozen as torchvision has it."""
    fused, eager, _ = both(detector)
    targets = [
        {"boxes": torch.tensor([[4.0, 5, 30, 40], [10, 8, 38, 36]]).double(), "labels": torch.tensor([1, 2])},
        {"boxes": torch.tensor([[2.0, 3, 50, 30]]).double(), "labels": torch.tensor([1])},
    ]
    losses: list[dict[str, Tensor]] = []
    before = copy.deepcopy(eager).double().state_dict()
    for model in (fused.double().train(), eager.double().train()):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01, momentum=0.9)
        torch.manual_seed(1)  # which anchors and proposals are sampled
        losses.append(model(pictures(torch.float64), copy.deepcopy(targets)))
        sum(losses[-1].values()).backward()
        optimizer.step()
    assert set(losses[0]) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(fused.state_dict(), eager.state_dict())
    changed = {name.split(".")[0] for name, tensor in fused.state_dict().items() if not tensor.equal(before[name])}
    assert changed == {"backbone", "rpn", "roi_heads"}


def regnet_block(stride: int = 1, se_ratio: float | None = 0.25) -> nn.Module:
    return ResBottleneckBlock(16, 16 * stride, stride, nn.BatchNorm2d, nn.ReLU, 8, 1.0, se_ratio)


@pytest.mark.parametrize("name", ["f", "f.c", "f.c.0", "f.c.1", "f.b", "f.a.0", "proj", "proj.1", "activation"])
def test_hook_inside_of_a_regnet_block_fires(name: str) -> None:
    """Hooked before `fuse_` and after it."""
    for late in (True, False):
        eager = models.seeded(lambda: regnet_block(2)).double()
        fused = copy.deepcopy(eager)
        seen: list[list[Tensor]] = [[], []]
        if late:
            fuse_(fused)
        for found, model in zip(seen, (fused, eager), strict=True):
            model.get_submodule(name).register_forward_hook(lambda _, args, out, found=found: found.append(out.clone()))
        if not late:
            fuse_(fused)
        models.assert_same(fused, eager, models.random_input((2, 16, 9, 9)))
        assert len(seen[0]) == 1
        torch.testing.assert_close(seen[0], seen[1])


def test_shared_last_convolution_of_a_regnet_block() -> None:
    """A module that a block takes over may be called from elsewhere too."""

    def build() -> nn.Module:
        block = regnet_block()
        return nn.Sequential(block, block.f.c)

    models.assert_equal_before_and_after(build, (2, 16, 9, 9))
