"""Changes of a model after `fuse_`: training, loading, hooks and parametrizations all count at the next call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.models.resnet import BasicBlock, Bottleneck

from resfuse import fuse_, unfuse_
from tests import models
from tests.models import IMAGE, both, conv_bn_relu

CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda model: [parameter.mul_(1.5) for parameter in model.parameters()],
    "by .data": lambda model: [parameter.data.mul_(1.5) for parameter in model.parameters()],
    "one value": lambda model: model.layer1[0].bn1.bias.data.__setitem__(3, 9.0),
    "new .data": lambda model: [
        setattr(parameter, "data", parameter.data * 1.5) for parameter in model.layer2[0].parameters()
    ],
    "statistics": lambda model: model.layer2[0].bn2.running_var.mul_(3),
    "reset": lambda model: model.layer3[0].downsample[1].reset_running_stats(),
    "new parameter": lambda model: setattr(model.bn1, "weight", nn.Parameter(model.bn1.weight * 2)),
    "load_state_dict": lambda model: model.load_state_dict(
        models.randomise(models.small_resnet(), seed=7).state_dict()
    ),
    "eps": lambda model: setattr(model.layer1[0].bn1, "eps", 0.5),
    "settings": lambda model: model.layer1[0].conv2.__dict__.update(padding=(2, 2), dilation=(2, 2)),
    "new module": lambda model: setattr(model, "bn1", models.seeded(lambda: nn.BatchNorm2d(64), seed=3)),
    "dtype and back": lambda model: model.bfloat16().float(),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_nothing_is_stale_after(name: str) -> None:
    fused, eager, _ = both(models.small_resnet)
    input = models.random_input((1, 3, 32, 32))
    with torch.no_grad():
        before = fused.eval()(input)
        for model in (fused, eager):
            CHANGES[name](model)
        after = fused.eval()(input)
        assert not torch.allclose(after, before, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(after, eager.eval()(input), rtol=1e-4, atol=1e-4)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=1e-4),
    "sgd-fused": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, fused=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, 1e-3),
    "adam-foreach": lambda parameters: torch.optim.Adam(parameters, 1e-3, foreach=True),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, 1e-3, fused=True, amsgrad=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_made_before_and_after(name: str) -> None:
    """One optimizer through eager, fused and unfused steps, and one made while fused: all end where eager ends."""
    eager = models.seeded(lambda: nn.Sequential(*conv_bn_relu(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))).double()
    through, after = copy.deepcopy(eager), copy.deepcopy(eager)
    fuse_(after)
    optimizers = [OPTIMIZERS[name](model.parameters()) for model in (eager, through, after)]
    changes = {2: fuse_, 4: unfuse_}
    for step in range(6):
        if step in changes:
            changes[step](through)
        for model, optimizer in zip((eager, through, after), optimizers, strict=True):
            # Gradients are kept as tensors for the first steps, so their strides are of before, too.
            optimizer.zero_grad(set_to_none=step > 3)
            model(models.random_input((2, 8, 6, 6), seed=step).double()).square().mean().backward()
            optimizer.step()
    for model in (through, after):
        torch.testing.assert_close(model.state_dict(), eager.state_dict(), rtol=1e-6, atol=1e-7)


def test_hook_on_a_fused_block_fires() -> None:
    fused, eager, _ = both(models.small_resnet)
    features: list[list[Tensor]] = [[], []]
    for found, model in zip(features, (fused.eval(), eager.eval()), strict=True):
        for module in (model, model.layer1, model.layer1[0], model.layer3[0], model.layer2[0].downsample):
            module.register_forward_hook(lambda _, args, output, found=found: found.append(output.clone()))
            module.register_forward_pre_hook(lambda _, args, found=found: found.append(args[0].clone()))
        model(models.random_input(IMAGE))
    assert len(features[0]) == 10
    torch.testing.assert_close(features[0], features[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["conv1", "bn1", "layer1.0.conv1", "layer1.0.bn2", "layer2.0.downsample.1", "relu"])
def test_hook_added_to_an_inner_module_later_fires(name: str) -> None:
    fused, eager, _ = both(models.small_resnet)
    seen: list[list[Tensor]] = [[], []]
    for found, model in zip(seen, (fused.double(), eager.double()), strict=True):
        model.get_submodule(name).register_forward_hook(lambda _, args, out, found=found: found.append(out.clone()))
    models.assert_same(fused, eager, models.random_input(IMAGE))
    assert len(seen[0]) == 1
    torch.testing.assert_close(seen[0], seen[1])


@pytest.mark.parametrize("normalise", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrization_added_later_is_obeyed(normalise: Callable[..., Any]) -> None:
    fused, eager, _ = both(models.small_resnet)
    for model in (fused.double(), eager.double()):
        torch.manual_seed(0)
        normalise(model.layer1[0].conv2)
        normalise(model.layer2[0].downsample[0])
    models.assert_same(fused, eager, models.random_input(IMAGE))


@pytest.mark.parametrize("order", ["before", "after"])
def test_sync_batchnorm_conversion(order: str) -> None:
    eager = models.small_resnet(Bottleneck)
    fused = copy.deepcopy(eager)
    if order == "before":
        fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
        assert fuse_(fused).fused == fuse_(copy.deepcopy(eager)).fused
    else:
        fuse_(fused)
        fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in fused.modules()) == 17
    assert list(fused.state_dict()) == list(eager.state_dict())
    models.assert_same(fused.double(), eager.double(), models.random_input(IMAGE))
    models.assert_same(fused.eval(), eager.eval(), models.random_input(IMAGE))


def test_changed_blocks_call_what_they_were_given() -> None:
    """After `fuse_`: another activation and another shortcut; timm's blocks are in test_timm."""
    fused, eager, _ = both(lambda: BasicBlock(8, 8))
    for model in (fused.double(), eager.double()):
        torch.manual_seed(0)
        model.relu = nn.GELU()
        model.downsample = nn.Sequential(nn.Conv2d(8, 8, 1)).double()
    models.assert_same(fused, eager, models.random_input((2, 8, 6, 6)))
