"""`unfuse_`, a `fuse_` that fails, and copies: nothing is lost, and nothing but classes and strides changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune
from torchvision.models.resnet import BasicBlock, Bottleneck

from resfuse import fuse_, unfuse_
from resfuse.fuse import fuse
from tests import models
from tests.models import IMAGE, both, conv_bn_relu, reloaded, state


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet50d"])
@pytest.mark.parametrize("training", [True, False])
def test_unfuse_restores_everything(name: str, training: bool) -> None:
    model = models.model(name).train(training)
    before = state(model)
    fuse_(model)
    assert state(model) != before
    assert unfuse_(model) is model
    assert state(model) == before


def test_nothing_but_the_class_and_the_strides_change() -> None:
    model = models.small_resnet().to(torch.bfloat16)
    model.layer1.requires_grad_(False)
    model.layer2.eval()
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [(parameter.requires_grad, parameter.dtype, parameter.device) for parameter in parameters.values()]
    modes = [module.training for module in modules.values()]
    report = fuse_(model)
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    assert flags == [(parameter.requires_grad, parameter.dtype, parameter.device) for parameter in parameters.values()]
    assert modes == [module.training for module in modules.values()]
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert isinstance(model, torchvision.models.ResNet)
    assert isinstance(model.layer1[0], BasicBlock)
    assert repr(model).count("FusedBasicBlock") == 4
    assert len(report.fused) == 8


@pytest.mark.parametrize("failing", ["filter", "class", "following"])
def test_failure_leaves_the_model_as_it_was(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.small_resnet(Bottleneck)
    before = state(model)
    count = iter(range(100))

    def fail(*_: Any) -> Any:
        if next(count) == (0 if failing == "following" else 3):
            raise KeyboardInterrupt if failing == "class" else RuntimeError("no")
        return True

    def failing_after(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: (fail(), function(*args))[1]

    if failing == "class":
        monkeypatch.setattr(fuse, "fused_class", failing_after(fuse.fused_class))
    elif failing == "following":
        monkeypatch.setattr(fuse, "follow", failing_after(fuse.follow))
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        fuse_(model, filter_fn=fail if failing == "filter" else None)
    assert state(model) == before
    with pytest.raises(ValueError, match="memory_format"):
        fuse_(model, memory_format=torch.contiguous_format)


def test_parameters_are_left_as_they_are() -> None:
    """What needs contiguous parameters works as before: safetensors, L-BFGS, `parameters_to_vector`, pruning, views."""
    fused, eager, _ = both(lambda: models.small_resnet(Bottleneck))
    assert [p.stride() for p in fused.parameters()] == [p.stride() for p in eager.parameters()]
    flat = nn.utils.parameters_to_vector(fused.parameters())
    nn.utils.vector_to_parameters(flat, fused.parameters())
    assert fused.layer1[0].conv2.weight.view(64, -1).shape == (64, 64 * 9)
    optimizer = torch.optim.LBFGS(fused.parameters(), max_iter=1)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = fused(models.random_input(IMAGE)).square().mean()
        loss.backward()
        return loss

    before = closure()
    optimizer.step(closure)
    assert fused(models.random_input(IMAGE)).square().mean() != before
    assert all(p.grad.is_contiguous() for p in fused.parameters())
    prune.ln_structured(fused.layer1[0].conv2, "weight", amount=0.5, n=2, dim=0)
    fused(models.random_input(IMAGE))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.preserve_format])
def test_memory_format_of_activations(memory_format: torch.memory_format) -> None:
    fused, eager, _ = both(lambda: models.small_resnet(Bottleneck), memory_format=memory_format)
    input = models.random_input((1, 64, 8, 8))
    expected = eager.layer1(input).stride() if memory_format is torch.preserve_format else None
    output = fused.layer1(input)
    assert output.is_contiguous(memory_format=torch.channels_last) == (expected is None)
    assert expected is None or output.stride() == expected


def test_unfuse_survives_what_happened_since() -> None:
    model = nn.Sequential(*conv_bn_relu(), *conv_bn_relu())
    fuse_(model)
    model[0] = nn.Identity()
    model[3] = nn.Conv1d(8, 8, 3)
    del model[1]
    unfuse_(model)
    assert type(model) is nn.Sequential


@pytest.mark.parametrize("way", [copy.deepcopy, copy.copy, reloaded])
def test_copies_are_fused_and_can_be_unfused(way: Callable[[nn.Module], nn.Module]) -> None:
    fused, eager, report = both(models.small_resnet)
    twin = way(fused)
    assert type(twin) is type(fused)
    assert [type(module) for module in twin.modules()] == [type(module) for module in fused.modules()]
    input = models.random_input(IMAGE)
    with models.counted_calls() as calls:
        torch.testing.assert_close(twin.eval()(input), eager.eval()(input), rtol=1e-4, atol=1e-4)
    assert calls.conv_bn_act == report.fused_ops
    unfuse_(twin)
    assert [type(module) for module in twin.modules()] == [type(module) for module in eager.modules()]
    strides = [parameter.stride() for parameter in eager.parameters()]
    assert [parameter.stride() for parameter in twin.parameters()] == strides
    if way is not copy.copy:
        assert type(fused.layer1[0]) is not BasicBlock


def test_unfuse_refuses_a_class_derived_since() -> None:
    model = models.block("basic")
    fuse_(model)
    fused_class = type(model)
    derived = type("Sharded", (fused_class,), {})
    model.__class__ = derived
    before = state(model)
    with pytest.raises(TypeError, match="Sharded"):
        unfuse_(model)
    assert state(model) == before
    model.__class__ = fused_class
    assert type(unfuse_(model)) is BasicBlock


def test_state_dict_goes_both_ways() -> None:
    fused, eager, _ = both(models.small_resnet)
    other = models.randomise(models.small_resnet(), seed=5)
    input = models.random_input(IMAGE)
    for model in (fused, eager):
        model.eval()(input)
        model.load_state_dict(other.state_dict())
    torch.testing.assert_close(fused(input), eager(input), rtol=1e-4, atol=1e-4)
    models.small_resnet().load_state_dict(fused.state_dict())
    fused.load_state_dict(fused.state_dict(), assign=True)
    torch.testing.assert_close(fused(input), eager(input), rtol=1e-4, atol=1e-4)
