"""The operator calls of a model: where they belong, and that recording them does nothing else."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resfuse
from resfuse.tracing import Call, Tracer

torchvision = pytest.importorskip("torchvision")

SMALL = (2, 3, 64, 64)


def small() -> nn.Module:
    """A torchvision ResNet with four blocks."""
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)


def calls_of(model: nn.Module, *inputs: Any, fused: bool = False, backward: bool = False) -> list[Call]:
    tracer = Tracer(model, inputs)
    if fused:
        resfuse.fuse_(tracer.model)
    return tracer.calls(backward=backward)


def names(model: nn.Module, **options: bool) -> list[tuple[str, list[str], list[str]]]:
    calls = calls_of(model, (1, 3, 8, 8), **options)
    return [(call.path, *([str(run.func) for run in runs] for runs in (call.forward, call.backward))) for call in calls]


def by_path(calls: list[Call], name: str) -> dict[str, Call]:
    return {call.path: call for call in calls if any(name in str(run.func) for run in call.forward)}


@pytest.mark.parametrize("fused", [False, True])
def test_calls_have_the_paths_of_modules_and_their_own_gradients(fused: bool) -> None:
    model = small().train()
    found = by_path(calls_of(model, SMALL, fused=fused, backward=True), "conv_bn_act" if fused else "convolution")
    assert set(found) == {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    for path, call in found.items():
        gradients = [run for run in call.backward if "conv" in str(run.func)]
        assert [list(run.args[-1]) for run in gradients] == [[path != "conv1", True, False]], "images need no gradient"
        weight = model.get_submodule(path).weight
        assert call.forward[0].args[1].shape == gradients[0].args[2].shape == weight.shape
    (pool,) = by_path(calls_of(model, SMALL, fused=fused, backward=True), "max_pool2d").values()
    assert pool.path == "maxpool" and [str(run.func) for run in pool.backward if "pool" in str(run.func)]


def test_gradients_follow_what_is_frozen() -> None:
    model = small().train()
    model.conv1.requires_grad_(False)
    model.bn1.requires_grad_(False)
    found = by_path(calls_of(model, SMALL, backward=True), "convolution")
    assert not found["conv1"].backward
    assert list(found["layer1.0.conv1"].backward[-1].args[-1]) == [False, True, False]
    images = torch.empty(SMALL, device="meta", requires_grad=True)
    found = by_path(calls_of(model, images, backward=True), "convolution")
    assert list(found["conv1"].backward[-1].args[-1]) == [True, False, False]


@pytest.mark.parametrize("fused", [False, True])
def test_autocast_casts_the_images_and_each_parameter_once(fused: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    with torch.autocast("cpu", torch.bfloat16):
        found = calls_of(model.train(), (2, 3, 8, 8), fused=fused)
    casts = [call.path for call in found if "_to_copy" in str(call.forward[0].func)]
    assert sorted(casts) == ["" if fused else "0", "0", "0", "4", "4"]
    (product,) = by_path(found, "conv_bn_act" if fused else "convolution").values()
    assert {tensor.dtype for tensor in product.forward[0].args[:2]} == {torch.bfloat16}


def test_the_model_is_left_alone() -> None:
    seen: list[str] = []
    model = small().train()
    model.layer1[0].conv1.register_forward_hook(lambda *_: seen.append("hook"))
    model.layer2[0].register_forward_pre_hook(lambda *_: seen.append("pre-hook"))
    model.bn1.momentum = None
    model.fc.weight.grad = torch.ones_like(model.fc.weight)

    def state() -> Any:
        tensors = {name: (id(t), t.data_ptr(), t.stride()) for name, t in model.state_dict(keep_vars=True).items()}
        modules = [(id(module), type(module), module.training) for module in model.modules()]
        return tensors, modules, torch.get_num_threads(), torch.compiler.is_compiling(), nn.Module.__call__

    values, random, before = copy.deepcopy(model.state_dict()), torch.get_rng_state(), state()
    found = calls_of(model, SMALL, fused=True, backward=True)
    assert seen == [] and state() == before and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert model.bn1.momentum is None and model.bn1.num_batches_tracked == 0
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight)) and model.conv1.weight.grad is None
    assert "layer1.0.conv1" in by_path(found, "convolution"), "the hook keeps it from being fused"
    model(torch.randn(SMALL))
    assert sorted(seen) == ["hook", "pre-hook"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.compile imports
@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_wrappers_are_looked_into(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    assert names(wrap(model)) == names(model)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_mode_around_does_not_matter(mode: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    expected = names(model, fused=True, backward=True)
    assert len(expected) >= 2
    with mode():
        assert names(model, fused=True, backward=True) == expected


class Tied(nn.Module):
    """One weight in two modules, and a tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight
        self.scale = torch.ones(4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"output": self.b(self.a(x)) * self.scale}


def test_tied_and_plain_tensors() -> None:
    found = [str(run.func) for call in calls_of(Tied(), (2, 4), backward=True) for run in call.forward]
    assert found == ["aten.t.default", "aten.mm.default"] * 2 + ["aten.mul.Tensor"]


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Locked(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("there is only one")


@pytest.mark.parametrize(
    ("model", "inputs", "error", "message"),
    [
        (Branches(), ((2, 2),), ValueError, "model: Branches cannot be traced for inputs of shape (2, 2): "),
        (nn.Linear(3, 4), ((2, 5),), ValueError, "model: Linear cannot be traced for inputs of shape (2, 5): "),
        (nn.LazyLinear(4), (torch.empty(2, 3),), ValueError, "model: LazyLinear cannot be "),
        (Locked(3, 4), ((2, 3),), ValueError, "model: Locked cannot be copied: there is only one"),
        (nn.Linear(3, 4), (), ValueError, "inputs: expected at least one tensor or shape, got none"),
        (nn.Linear(3, 4), ((2, 0),), ValueError, "inputs[0]: expected sizes of at least 1, got (2, 0)"),
        (nn.Linear(3, 4), ("ab",), TypeError, "inputs[0]: expected a tensor or a shape of integers, got 'ab'"),
        (nn.Linear(3, 4), ((2, 3.0),), TypeError, "inputs[0]: expected a tensor or a shape of integers"),
        (torch.relu, ((2, 3),), TypeError, "model: expected a torch.nn.Module, got builtin_function_or_method"),
    ],
)
def test_what_cannot_be_traced(model: Any, inputs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        calls_of(model, *inputs)
    assert not torch.compiler.is_compiling()
