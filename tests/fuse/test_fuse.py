"""`fuse_`: what it fuses, what it reports, and that nobody but the clock can tell the difference."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable

import pytest
import timm
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops.misc import Conv2dNormActivation, FrozenBatchNorm2d

from resfuse import fuse_, unfuse_
from resfuse.fuse import FuseReport
from tests import models
from tests.models import IMAGE, both, calls_by_kind, conv_bn_relu, state

# Modules fused in each model -> the number of fused calls.
EXPECTED = {
    "torchvision/resnet18": {"ResNet": 1, "BasicBlock": 16, "Sequential": 3},
    "torchvision/resnet50": {"ResNet": 1, "Bottleneck": 48, "Sequential": 4},
    "torchvision/resnext50_32x4d": {"ResNet": 1, "Bottleneck": 48, "Sequential": 4},
    "torchvision/wide_resnet50_2": {"ResNet": 1, "Bottleneck": 48, "Sequential": 4},
    "timm/resnet18": {"ResNet": 1, "BasicBlock": 16, "Sequential": 3},
    "timm/resnet50": {"ResNet": 1, "Bottleneck": 48, "Sequential": 4},
    "timm/resnet50d": {"ResNet": 1, "Bottleneck": 48, "Sequential": 6},
    "timm/resnext50_32x4d": {"ResNet": 1, "Bottleneck": 48, "Sequential": 4},
}


QUICK = ("torchvision/resnet18", "timm/resnet50d")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in EXPECTED]
)
def test_whole_model_equals_eager(name: str) -> None:
    """Forward, every gradient, running statistics and batch counts, in training and then in inference."""
    eager = models.model(name)
    fused = copy.deepcopy(eager)
    report = fuse_(fused)
    assert calls_by_kind(report) == EXPECTED[name]
    assert report.left == []
    assert list(fused.state_dict()) == list(eager.state_dict())
    fused, eager = fused.double(), eager.double()
    for training in (True, False):
        with models.counted_calls() as calls:
            models.assert_same(fused.train(training), eager.train(training), models.random_input(IMAGE))
        assert calls.conv_bn_act == report.fused_ops


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", models.BLOCKS)
def test_block_keeps_the_contract(name: str, training: bool) -> None:
    eager = models.block(name).train(training)
    fused = copy.deepcopy(eager)
    fuse_(fused)
    input = models.decided_input(eager, models.block_input(name).shape)
    models.assert_contract(fused, eager, input)


SEQUENTIALS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "conv-bn-relu": (conv_bn_relu, ("0 + 1 + 2",)),
    "conv-bn": (lambda: conv_bn_relu()[:2], ("0 + 1",)),
    "bn-relu": (lambda: conv_bn_relu()[1:], ("1 + 2",)),
    "bn-relu-conv": (lambda: nn.Sequential(*conv_bn_relu()[1:], nn.Conv2d(8, 8, 1)), ("0 + 1",)),
    "stack": (
        lambda: nn.Sequential(*conv_bn_relu(), nn.MaxPool2d(2), *conv_bn_relu(), *conv_bn_relu()[:2], nn.Sigmoid()),
        ("0 + 1 + 2", "4 + 5 + 6", "7 + 8"),
    ),
    "other activation": (lambda: nn.Sequential(*conv_bn_relu()[:2], nn.SiLU()), ("0 + 1",)),
    "named": (
        lambda: nn.Sequential(
            torch.nn.modules.container.OrderedDict(
                first=nn.Conv2d(8, 8, 1), norm=nn.BatchNorm2d(8), act=nn.ReLU(), last=nn.Conv2d(8, 8, 1)
            )
        ),
        ("first + norm + act",),
    ),
    "torchvision's ConvNormActivation": (lambda: Conv2dNormActivation(8, 8), ("0 + 1 + 2",)),
    "frozen": (lambda: nn.Sequential(nn.Conv2d(8, 8, 1), FrozenBatchNorm2d(8), nn.ReLU()), ("0 + 1 + 2",)),
    "timm's norm": (lambda: nn.Sequential(nn.Conv2d(8, 8, 1), BatchNormAct2d(8)), ("0 + 1 + 1.act",)),
}


@pytest.mark.parametrize("name", SEQUENTIALS)
def test_sequential(name: str) -> None:
    build, ops = SEQUENTIALS[name]
    fused, eager, report = both(build)
    assert [module.ops for module in report.fused] == [ops]
    assert isinstance(fused, type(eager))
    for training in (True, False):
        with models.counted_calls() as calls:
            models.assert_same(
                fused.double().train(training), eager.double().train(training), models.random_input((2, 8, 6, 6))
            )
        assert calls.conv_bn_act + calls.bn_act == len(ops)


def test_sequential_still_is_one() -> None:
    fused, eager, _ = both(lambda: nn.Sequential(*conv_bn_relu(), *conv_bn_relu()))
    input = models.random_input((2, 8, 6, 6))
    for model in (fused, eager):
        model.double().eval()
    torch.testing.assert_close(fused[:3](input.double()), eager[:3](input.double()))
    for model in (fused, eager):
        model.append(nn.Conv2d(8, 4, 1).double())
        nn.init.ones_(model[-1].weight), nn.init.ones_(model[-1].bias)
        del model[2]  # now conv, bn, conv, bn, relu, conv
    assert len(fused) == len(eager) == 6
    models.assert_same(fused, eager, input)


def test_block_called_with_keywords() -> None:
    fused, eager, _ = both(lambda: BasicBlock(8, 8))
    input = models.random_input((2, 8, 6, 6))
    torch.testing.assert_close(fused(x=input), eager(x=input), rtol=1e-5, atol=1e-5)


def test_frozen_layers_of_a_model_in_training() -> None:
    """Batch norms in eval mode without gradients, inside of a model in training mode."""
    fused, eager, _ = both(models.small_resnet)
    for model in (fused.double(), eager.double()):
        model.train()
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d) and not name.startswith("layer4"):
                module.eval().requires_grad_(False)
        model.conv1.requires_grad_(False)
    models.assert_same(fused, eager, models.random_input(IMAGE))


def test_timm_norm_with_an_activation_of_its_own() -> None:
    """A ReLU before the addition ends the call, and the addition begins one with the ReLU after it."""
    for apply_act, calls in ((True, 3), (False, 2)):
        fused, eager, report = both(
            lambda apply_act=apply_act: timm.models.resnet.BasicBlock(
                8, 8, norm_layer=lambda c, **_: BatchNormAct2d(c, apply_act=apply_act, act_kwargs={"inplace": False})
            )
        )
        assert report.fused_ops == calls
        with torch.no_grad():  # the addition in place, of a ReLU's output, has no gradient
            input = models.random_input((2, 8, 6, 6)).double()
            torch.testing.assert_close(fused.double()(input), eager.double()(input))


def test_report_is_readable() -> None:
    report = fuse_(models.small_resnet(Bottleneck))
    assert str(report).splitlines()[0] == "fused 17 of 17 conv + bn, 4 of 4 residual adds: 17 calls"
    assert "4  Bottleneck  conv1 + bn1 + relu; conv2 + bn2 + relu; conv3 + bn3 + add + relu" in str(report)
    report = fuse_(models.small_resnet(), filter_fn=lambda module, name: name == "")
    assert str(report).splitlines()[0] == "fused 1 of 12 conv + bn, 0 of 0 residual adds: 1 call"
    assert "left 11 modules alone" in str(report)
    assert "BasicBlock: filter_fn: layer1.0.bn1, layer1.0.bn2" in str(report)
    assert str(FuseReport()) == "fused no module"
    from rich.console import Console

    console = Console(width=100, file=io.StringIO())
    console.print(report)
    assert "conv1 + bn1 + relu" in console.file.getvalue()


def test_filter() -> None:
    asked = {}

    def keep(module: nn.Module, name: str) -> bool:
        asked[name] = module
        return name.startswith("layer2")

    model = models.small_resnet()
    report = fuse_(model, filter_fn=keep)
    assert [module.name for module in report.fused] == ["layer2.0", "layer2.0.downsample"]
    assert len(asked) == 12  # layer1 to layer4 only pass on what blocks may write over
    assert all(model.get_submodule(name) is module for name, module in asked.items())
    assert {module.reason for module in report.left} == {
        f"{kind}: filter_fn" for kind in ("ResNet", "BasicBlock", "Sequential")
    }


def test_twice_is_once() -> None:
    model = models.small_resnet()
    first = fuse_(model)
    classes = [type(module) for module in model.modules()]
    before = state(model)
    second = fuse_(model)
    assert second.fused == []
    assert len(second.left) == first.fused_ops
    assert all(module.reason.endswith(": already fused") for module in second.left)
    assert state(model) == before
    assert classes == [type(module) for module in model.modules()]


def test_shared_modules_are_handled_once() -> None:
    block = models.block("basic")
    model = nn.Sequential(block, block, nn.Sequential(block))
    report = fuse_(model)
    assert [module.name for module in report.fused] == ["0"]
    unfuse_(model)
    assert type(block) is BasicBlock


def test_shortcut_that_broadcasts() -> None:
    fused, eager, _ = both(lambda: BasicBlock(8, 8, downsample=nn.AdaptiveAvgPool2d(1)))
    models.assert_same(fused.double(), eager.double(), models.random_input((2, 8, 6, 6)))


def test_in_and_after_inference_mode() -> None:
    fused, eager = models.small_resnet(), models.small_resnet()
    with torch.inference_mode():
        fuse_(fused)
        created = models.small_resnet()
    models.assert_same(fused.double(), eager.double(), models.random_input(IMAGE))
    fuse_(created)
    input = models.random_input(IMAGE)
    with torch.no_grad():
        torch.testing.assert_close(created.eval()(input), models.small_resnet().eval()(input), rtol=1e-4, atol=1e-4)


def test_imports_no_vision_library() -> None:
    code = (
        "import sys, torch, resfuse\n"
        "model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))\n"
        "assert len(resfuse.fuse_(model).fused) == 1\n"
        "print(sorted({'torchvision', 'timm', 'rich'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]", run.stderr
