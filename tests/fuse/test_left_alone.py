"""Models that `fuse_` leaves alone: those that it does not know exactly, each with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.models.resnet import BasicBlock

import resfuse.nn as rnn
from resfuse import fuse_
from tests import models
from tests.models import conv_bn_relu, state


class OwnForward(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class OwnSequential(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class OwnPickling(nn.Sequential):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return super().__reduce_ex__(protocol)


def hooked(name: str) -> nn.Module:
    block = BasicBlock(8, 8)
    block.get_submodule(name).register_forward_hook(lambda *_: None)
    return block


def parametrized() -> nn.Module:
    block = BasicBlock(8, 8)
    parametrizations.weight_norm(block.conv2)
    return block


def forward_replaced() -> nn.Module:
    block = BasicBlock(8, 8)
    block.forward = lambda x: x
    return block


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "hook on conv": (lambda: hooked("conv1"), "conv1 + bn1 + relu: Conv2d has hooks"),
    "hook on bn": (lambda: hooked("bn2"), "conv2 + bn2 + add + relu: BatchNorm2d has hooks"),
    "parametrization": (parametrized, "conv2 + bn2 + add + relu: ParametrizedConv2d has a parametrization"),
    "forward replaced": (forward_replaced, "its forward was replaced on the instance"),
    "block subclass": (lambda: OwnForward(8, 8), "OwnForward overrides BasicBlock.forward"),
    "Sequential subclass": (lambda: OwnSequential(*conv_bn_relu()), "OwnSequential overrides Sequential.forward"),
    "own pickling": (lambda: OwnPickling(*conv_bn_relu()), "OwnPickling has its own way of being pickled"),
    "GroupNorm": (
        lambda: BasicBlock(8, 8, norm_layer=lambda channels: nn.GroupNorm(2, channels)),
        "GroupNorm is not exactly BatchNorm2d",
    ),
    "padding mode": (
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(8)),
        "0 + 1: padding_mode='circular'",
    ),
    "no pattern": (
        lambda: torchvision.models.googlenet(init_weights=False, aux_logits=False).conv1,
        "unsupported module type BasicConv2d, which has batch norms",
    ),
    "own module": (lambda: rnn.BasicBlock(8, 8), "already fused"),
    "fx": (lambda: torch.fx.symbolic_trace(conv_bn_relu()), "a torch.fx.GraphModule"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone_with_a_reason(name: str) -> None:
    build, reason = LEFT[name]
    model = build()
    before = state(model)
    report = fuse_(model)
    assert report.fused == []
    assert [module.name for module in report.left] == [""]
    assert reason in report.left[0].reason
    assert state(model) == before


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_script_module_is_left_alone() -> None:
    model = nn.Sequential(torch.jit.script(conv_bn_relu()), conv_bn_relu(), *conv_bn_relu())
    report = fuse_(model)
    assert [module.name for module in report.fused] == ["", "1"]
    assert [module.name for module in report.left] == ["0"]
    assert "ScriptModule" in report.left[0].reason
    model(models.random_input((2, 8, 6, 6)))
    block = BasicBlock(8, 8, downsample=torch.jit.script(models.projection(8, 8, 1))).eval()
    assert len(fuse_(block).fused) == 1
    block(models.random_input((2, 8, 6, 6)))


def test_a_library_whose_forward_is_another_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: BasicBlock, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) * self.scale + x)

    monkeypatch.setattr(BasicBlock, "forward", forward)
    report = fuse_(BasicBlock(8, 8))
    assert "differs from the supported releases" in report.left[0].reason


def test_part_of_a_sequential_is_left_alone() -> None:
    model = nn.Sequential(*conv_bn_relu(), *conv_bn_relu())
    seen = []
    model[4].register_forward_hook(lambda *_: seen.append(1))
    report = fuse_(model)
    assert report.fused[0].ops == ("0 + 1 + 2",)
    assert report.left == [("3", "BatchNorm2d has hooks")]
    with models.counted_calls() as calls:
        model(models.random_input((2, 8, 6, 6)))
    assert calls.conv_bn_act == len(seen) == 1
