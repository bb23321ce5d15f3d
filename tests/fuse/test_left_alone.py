"""What `fuse_` leaves alone, each with a reason, and what it fuses around that."""

from __future__ import annotations

import importlib
import linecache
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.models.resnet import BasicBlock

import resfuse.nn as rnn
from resfuse import fuse_
from tests import models
from tests.models import conv_bn_relu, state


class OwnCall(nn.Sequential):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return super().__call__(*args, **options)


class OwnPickling(nn.Sequential):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return super().__reduce_ex__(protocol)


class Generating(nn.Sequential):
    def forward(self, input: Tensor) -> Any:
        for module in self:
            input = module(input)
            yield input


class Counting(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        for _ in range(int(input.sum())):
            input = super().forward(input)
        return input


class Undefined(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale


def forward_replaced() -> nn.Module:
    block = conv_bn_relu()
    block.forward = lambda x: x
    return block


def from_text(source: str) -> nn.Module:
    """A module of a class whose source is nowhere."""
    namespace: dict[str, Any] = {"nn": nn}
    exec(source, namespace)
    return namespace["Block"](*conv_bn_relu())


NO_SOURCE = """
class Block(nn.Sequential):
    def forward(self, input):
        return self[2](self[1](self[0](input)))
"""

# Not even their class changes.
LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "forward replaced": (forward_replaced, "its forward was replaced on the instance"),
    "own pickling": (lambda: OwnPickling(*conv_bn_relu()), "OwnPickling has its own way of being pickled"),
    "own __call__": (lambda: OwnCall(*conv_bn_relu()), "OwnCall has a __call__ of its own"),
    "generator": (lambda: Generating(*conv_bn_relu()), "it has a construct that is not supported, at line"),
    "a size that decides": (lambda: Counting(*conv_bn_relu()), "its forward cannot be followed at line"),
    "an error in it": (lambda: Undefined(*conv_bn_relu()), "AttributeError: 'FusedUndefined' object has no attribute"),
    "no source": (lambda: from_text(NO_SOURCE), "its source is not available"),
    "own module": (lambda: rnn.BasicBlock(8, 8), "already fused"),
    "fx": (lambda: torch.fx.symbolic_trace(conv_bn_relu()), "a torch.fx.GraphModule"),
    "norm alone": (lambda: nn.Sequential(nn.BatchNorm2d(8)), "no convolution before it and no ReLU behind it"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone_with_a_reason(name: str) -> None:
    build, reason = LEFT[name]
    model = build()
    before = state(model)
    report = fuse_(model)
    assert report.fused == []
    assert report.left
    assert all(reason in module.reason for module in report.left)
    assert state(model) == before


def changed(change: Callable[[Any], object], **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        block = BasicBlock(8, 8, **options)
        change(block)
        return block

    return build


# The rest of the model is fused: (build, what is said of which module, calls).
PARTS: dict[str, tuple[Callable[[], nn.Module], str, str, tuple[str, ...]]] = {
    "hook on conv": (
        changed(lambda block: block.conv1.register_forward_hook(lambda *_: None)),
        "bn1", "Conv2d has hooks", ("conv2 + bn2 + add + relu",),
    ),
    "hook on bn": (
        changed(lambda block: block.bn2.register_forward_hook(lambda *_: None)),
        "bn2", "BatchNorm2d has hooks", ("conv1 + bn1 + relu",),
    ),
    "parametrization": (
        changed(lambda block: parametrizations.weight_norm(block.conv2)),
        "conv2", "ParametrizedConv2d has a parametrization", ("conv1 + bn1 + relu", "bn2 + add + relu"),
    ),
    "padding mode": (
        changed(lambda block: setattr(block, "conv1", nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"))),
        "bn1", "padding_mode='circular'", ("conv2 + bn2 + add + relu",),
    ),
    "other activation": (
        changed(lambda block: setattr(block, "relu", nn.SiLU())),
        "relu", "activation is SiLU: applied after the fused conv + bn", ("conv1 + bn1", "conv2 + bn2 + add"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_part_is_left_with_a_reason(name: str) -> None:
    build, left, reason, ops = PARTS[name]
    fused, eager, report = models.both(build)
    assert [module.ops for module in report.fused] == [ops]
    assert [(module.name, module.reason) for module in report.left] == [(left, reason)]
    models.assert_same(fused.double(), eager.double(), models.random_input((2, 8, 6, 6)))


def test_what_contains_a_block_that_is_left_is_fused() -> None:
    model = nn.Sequential(*conv_bn_relu(), nn.Sequential(Undefined(*conv_bn_relu()), *conv_bn_relu()))
    report = fuse_(model)
    assert [(module.name, module.ops) for module in report.fused] == [("", ("0 + 1 + 2",)), ("3", ("1 + 2 + 3",))]
    assert [module.name for module in report.left] == ["3.0.1"]


def test_source_edited_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs counts, not what stands in the file by now."""
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "edited_since.py"
    file.write_text("from torch import nn\n" + NO_SOURCE)
    block = importlib.import_module("edited_since").Block(*conv_bn_relu())
    file.write_text(file.read_text().replace("self[2](", "self[2](2 * "))
    linecache.checkcache()
    report = fuse_(block)
    assert report.fused == []
    assert "its source is not the one that runs" in report.left[0].reason


@pytest.mark.parametrize("model", [None, [conv_bn_relu()], conv_bn_relu])
def test_what_is_no_module(model: Any) -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got (NoneType|list|function)"):
        fuse_(model)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_script_module_is_left_alone() -> None:
    model = nn.Sequential(torch.jit.script(conv_bn_relu()), conv_bn_relu(), *conv_bn_relu())
    report = fuse_(model)
    assert [module.name for module in report.fused] == ["", "1"]
    assert all("ScriptModule" in module.reason for module in report.left)
    model(models.random_input((2, 8, 6, 6)))
    block = BasicBlock(8, 8, downsample=torch.jit.script(models.projection(8, 8, 1))).eval()
    assert len(fuse_(block).fused) == 1
    block(models.random_input((2, 8, 6, 6)))


def test_part_of_a_sequential_is_left_alone() -> None:
    model = nn.Sequential(*conv_bn_relu(), *conv_bn_relu())
    seen = []
    model[4].register_forward_hook(lambda *_: seen.append(1))
    report = fuse_(model)
    assert report.fused[0].ops == ("0 + 1 + 2",)
    assert report.left == [("4", "BatchNorm2d has hooks")]
    with models.counted_calls() as calls:
        model(models.random_input((2, 8, 6, 6)))
    assert calls.conv_bn_act == len(seen) == 1
