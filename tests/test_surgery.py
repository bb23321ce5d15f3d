"""`fuse_` and `unfuse_`: what is fused, what is left and why, and that nobody but the clock can tell the difference."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import timm
import torch
import torchvision
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops.misc import Conv2dNormActivation, FrozenBatchNorm2d

import resfuse
import resfuse.nn as rnn
from resfuse import functional, fuse_, unfuse_
from resfuse.surgery import FuseReport, fuse
from tests import models
from tests.models import both, calls_by_kind

IMAGE = (4, 3, 32, 32)

# Modules fused in each model -> the number of fused calls.
EXPECTED = {
    "torchvision/resnet18": {"torchvision ResNet stem": 1, "torchvision BasicBlock": 16, "Sequential": 3},
    "torchvision/resnet50": {"torchvision ResNet stem": 1, "torchvision Bottleneck": 48, "Sequential": 4},
    "torchvision/resnext50_32x4d": {"torchvision ResNet stem": 1, "torchvision Bottleneck": 48, "Sequential": 4},
    "torchvision/wide_resnet50_2": {"torchvision ResNet stem": 1, "torchvision Bottleneck": 48, "Sequential": 4},
    "timm/resnet18": {"timm ResNet stem": 1, "timm BasicBlock": 16, "Sequential": 3},
    "timm/resnet50": {"timm ResNet stem": 1, "timm Bottleneck": 48, "Sequential": 4},
    "timm/resnet50d": {"timm ResNet stem": 1, "timm Bottleneck": 48, "Sequential": 6},
    "timm/resnext50_32x4d": {"timm ResNet stem": 1, "timm Bottleneck": 48, "Sequential": 4},
}


def state(model: nn.Module) -> list[Any]:
    """All that `fuse_` could change: classes, instance attributes, and each tensor's identity, layout and values."""
    found: list[Any] = []
    for name, module in model.named_modules():
        found.append((name, id(module), type(module), sorted(module.__dict__), module.training))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        checksum = zlib.crc32(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
        found.append((name, id(tensor), tensor.stride(), tensor.requires_grad, tensor.dtype, checksum))
    return found


def reloaded(model: nn.Module) -> nn.Module:
    """The model after pickling."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def conv_bn_relu(channels: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


LARGE = ("torchvision/resnext50_32x4d", "torchvision/wide_resnet50_2", "timm/resnet50", "timm/resnext50_32x4d")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in EXPECTED]
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


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.preserve_format])
def test_network_in_float32(memory_format: torch.memory_format) -> None:
    fused, eager, _ = both(models.small_resnet, memory_format=memory_format)
    input = models.random_input(IMAGE)
    for training in (True, False):
        output, expected = fused.train(training)(input), eager.train(training)(input)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


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
    "timm's norm": (lambda: nn.Sequential(nn.Conv2d(8, 8, 1), BatchNormAct2d(8)), ("0 + 1",)),
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


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, lambda channels: nn.BatchNorm2d(channels, eps=0.1, momentum=None)])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_other_norms(norm: Callable[[int], nn.Module], block: type[nn.Module]) -> None:
    fused, eager, report = both(lambda: torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=5, norm_layer=norm))
    assert report.left == []
    for training in (True, False):
        with models.counted_calls() as calls:
            models.assert_same(
                fused.double().train(training), eager.double().train(training), models.random_input(IMAGE)
            )
        assert calls.conv_bn_act == report.fused_ops


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
    """A ReLU before the addition can not be fused with it."""
    fused, eager, report = both(lambda: timm.models.resnet.BasicBlock(8, 8, norm_layer=BatchNormAct2d))
    assert report.fused == []
    assert "before the residual is added" in report.left[0].reason
    fused, eager, report = both(
        lambda: timm.models.resnet.BasicBlock(8, 8, norm_layer=lambda c, **_: BatchNormAct2d(c, apply_act=False))
    )
    assert len(report.fused) == 1
    models.assert_same(fused.double(), eager.double(), models.random_input((2, 8, 6, 6)))


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
        "has batch norms, but BasicConv2d is no pattern that resfuse knows",
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
    assert "is not the one that resfuse knows" in report.left[0].reason


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


def test_report_is_readable() -> None:
    report = fuse_(models.small_resnet(Bottleneck))
    assert str(report).splitlines()[0] == "fused 9 modules into 17 calls"
    assert "torchvision Bottleneck" in str(report)
    assert "conv3 + bn3 + add + relu" in str(report)
    report = fuse_(models.small_resnet(), filter_fn=lambda module, name: name == "")
    assert "left 7 modules alone" in str(report)
    assert "filter_fn: layer1.0, layer2.0" in str(report)
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
    assert len(asked) == len(report.fused) + len(report.left) == 8
    assert all(model.get_submodule(name) is module for name, module in asked.items())
    assert {module.reason for module in report.left} == {"filter_fn"}


def test_twice_is_once() -> None:
    model = models.small_resnet()
    first = fuse_(model)
    classes = [type(module) for module in model.modules()]
    before = state(model)
    second = fuse_(model)
    assert second.fused == []
    assert {module.name for module in second.left} == {module.name for module in first.fused}
    assert {module.reason for module in second.left} == {"already fused"}
    assert state(model) == before
    assert classes == [type(module) for module in model.modules()]


def test_shared_modules_are_handled_once() -> None:
    block = models.block("basic")
    model = nn.Sequential(block, block, nn.Sequential(block))
    report = fuse_(model)
    assert [module.name for module in report.fused] == ["", "0"]
    unfuse_(model)
    assert type(block) is BasicBlock


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


@pytest.mark.parametrize("failing", ["filter", "class", "weights"])
def test_failure_leaves_the_model_as_it_was(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.small_resnet(Bottleneck)
    before = state(model)
    count = iter(range(100))

    def fail(*_: Any) -> Any:
        if next(count) == 3:
            raise KeyboardInterrupt if failing == "class" else RuntimeError("no")
        return True

    def failing_after(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: (fail(), function(*args))[1]

    if failing == "class":
        monkeypatch.setattr(fuse, "fused_class", failing_after(fuse.fused_class))
    elif failing == "weights":
        monkeypatch.setattr(fuse, "to_channels_last", failing_after(fuse.to_channels_last))
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        fuse_(model, filter_fn=fail if failing == "filter" else None)
    assert state(model) == before
    with pytest.raises(ValueError, match="memory_format"):
        fuse_(model, memory_format=torch.contiguous_format)


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


def test_inference_between_training_steps() -> None:
    fused, eager, _ = both(models.small_resnet)
    input, target = models.random_input(IMAGE), torch.tensor([1, 2, 3, 4])
    for model in (fused.double(), eager.double()):
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        model.outputs = []
        for _ in range(3):
            with torch.inference_mode():
                model.outputs.append(model.eval()(input.double()).clone())
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.train()(input.double()), target).backward()
            optimizer.step()
    torch.testing.assert_close(fused.outputs, eager.outputs, rtol=1e-6, atol=1e-6)


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


def test_weights_become_channels_last_and_return() -> None:
    model = models.small_resnet(Bottleneck)
    conv = model.layer1[0].conv2
    weight, values = conv.weight, conv.weight.detach().clone()
    model(models.random_input(IMAGE)).sum().backward()
    former = {name: parameter.stride() for name, parameter in model.named_parameters()}
    fuse_(model)
    converted = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    like_torch = copy.deepcopy(model).to(memory_format=torch.channels_last)
    for parameter, expected in zip(model.parameters(), like_torch.parameters(), strict=True):
        assert parameter.stride() == expected.stride()
        assert parameter.grad.stride() == parameter.stride()
    assert all(resfuse.layout.is_channels_last(module.weight) for module in converted)
    assert conv.weight is weight
    assert torch.equal(weight, values)
    assert model.layer1(torch.randn(1, 64, 8, 8)).is_contiguous(memory_format=torch.channels_last)
    unfuse_(model)
    assert former == {name: parameter.stride() for name, parameter in model.named_parameters()}
    assert all(parameter.grad.stride() == parameter.stride() for parameter in model.parameters())
    fuse_(model, memory_format=torch.preserve_format)
    assert former == {name: parameter.stride() for name, parameter in model.named_parameters()}


def test_weights_that_share_memory_keep_it() -> None:
    model = conv_bn_relu()
    flat = torch.zeros(8 * 8 * 9 + 1)
    model[0].weight.data = flat[1:].view(8, 8, 3, 3)
    pointer = model[0].weight.data_ptr()
    assert len(fuse_(model).fused) == 1
    assert model[0].weight.data_ptr() == pointer
    shared = conv_bn_relu().share_memory()
    fuse_(shared)
    assert shared[0].weight.is_shared()


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


def test_hook_on_the_deep_stem_fires() -> None:
    fused, eager, _ = both(lambda: timm.create_model("resnet26d", num_classes=5))
    seen: list[list[Tensor]] = [[], []]
    for found, model in zip(seen, (fused.double(), eager.double()), strict=True):
        model.conv1.register_forward_hook(lambda _, args, output, found=found: found.append(output.clone()))
    models.assert_same(fused, eager, models.random_input(IMAGE))
    torch.testing.assert_close(seen[0], seen[1])
    assert len(seen[0]) == 1


@pytest.mark.parametrize("normalise", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrization_added_later_is_obeyed(normalise: Callable[..., Any]) -> None:
    fused, eager, _ = both(models.small_resnet)
    for model in (fused.double(), eager.double()):
        torch.manual_seed(0)
        normalise(model.layer1[0].conv2)
        normalise(model.layer2[0].downsample[0])
    models.assert_same(fused, eager, models.random_input(IMAGE))


def test_old_weight_norm_hook_is_obeyed() -> None:
    fused, eager, _ = both(models.small_resnet)
    for model in (fused.double(), eager.double()):
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(model.layer1[0].conv1)
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
    """After `fuse_`: another activation, another shortcut, drop-path and attention in a timm block."""
    fused, eager, _ = both(lambda: nn.Sequential(BasicBlock(8, 8), timm.models.resnet.Bottleneck(8, 2)))
    for model in (fused.double(), eager.double()):
        torch.manual_seed(0)
        model[0].relu = nn.GELU()
        model[0].downsample = nn.Sequential(nn.Conv2d(8, 8, 1)).double()
        model[1].se = timm.layers.create_attn("se", 8).double()
        model[1].drop_path = nn.Identity()
        model[1].aa = nn.AvgPool2d(1)
    models.assert_same(fused, eager, models.random_input((2, 8, 6, 6)))


def test_shortcut_that_broadcasts() -> None:
    fused, eager, _ = both(lambda: BasicBlock(8, 8, downsample=nn.AdaptiveAvgPool2d(1)))
    models.assert_same(fused.double(), eager.double(), models.random_input((2, 8, 6, 6)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    fused, eager, _ = both(models.small_resnet)
    input = models.random_input(IMAGE).to(dtype)
    tolerance = 1e-8 if dtype == torch.float64 else 0.1
    for training in (True, False):
        output, expected = (model.to(dtype).train(training)(input) for model in (fused, eager))
        assert output.dtype == dtype
        torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training: bool) -> None:
    """Every layer's output has eager's dtype, and about its values."""
    fused, eager, _ = both(models.small_resnet)
    found: list[list[Tensor]] = [[], []]
    for outputs, model in zip(found, (fused, eager), strict=True):
        for module in (model.maxpool, model.layer1[0], model.layer2[0], model.layer4[0], model.fc):
            module.register_forward_hook(lambda _, args, output, outputs=outputs: outputs.append(output))
        with torch.autocast("cpu", torch.bfloat16):
            model.train(training)(models.random_input(IMAGE))
    for output, expected in zip(*found, strict=True):
        assert output.dtype == expected.dtype == torch.bfloat16
        assert (output - expected).norm() < 0.05 * expected.norm()


def test_gradient_checkpointing_in_timm() -> None:
    fused, eager, _ = both(lambda: timm.create_model("resnet10t", num_classes=5))
    for model in (fused.double(), eager.double()):
        model.set_grad_checkpointing()
    models.assert_same(fused, eager, models.random_input(IMAGE))


def test_features_only_model_of_timm() -> None:
    eager = models.seeded(lambda: timm.create_model("resnet18", features_only=True))
    fused = copy.deepcopy(eager)
    report = fuse_(fused)
    assert calls_by_kind(report) == {"timm BasicBlock": 16, "Sequential": 3}
    assert "FeatureListNet is no pattern" in report.left[0].reason
    for output, expected in zip(fused(models.random_input(IMAGE)), eager(models.random_input(IMAGE)), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)


def test_fx_feature_extraction() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    fused, eager, _ = both(models.small_resnet)
    nodes = {"layer1.0.add": "sum", "layer3": "last"}
    input = models.random_input(IMAGE)
    found, expected = (create_feature_extractor(model.eval(), nodes)(input) for model in (fused, eager))
    torch.testing.assert_close(found, expected)


def test_intermediate_layers_inside_of_a_run_are_seen() -> None:
    for asked, ops in (("relu", "conv1 + bn1 + relu"), ("bn1", "conv1 + bn1"), ("conv1", "bn1 + relu")):
        layers = {asked: "asked", "layer1": "last"}
        fused, eager, report = both(lambda layers=layers: IntermediateLayerGetter(models.small_resnet(), layers.copy()))
        assert report.fused[0] == ("", "torchvision IntermediateLayerGetter", (ops,))
        with torch.no_grad():
            found, expected = (model(models.random_input(IMAGE)) for model in (fused, eager))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class Keeping(nn.BatchNorm2d):
    """Keeps what it returns."""

    def forward(self, input: Tensor) -> Tensor:
        self.kept = super().forward(input)
        return self.kept


def chain_of_blocks() -> nn.Module:
    return nn.Sequential(
        BasicBlock(8, 8), BasicBlock(8, 8), Bottleneck(8, 2), Bottleneck(8, 4, downsample=models.projection(8, 16, 1))
    )


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("name", [name for name, _ in chain_of_blocks().named_modules()])
def test_what_a_hook_saw_is_not_overwritten(name: str, pre: bool) -> None:
    """In inference a block writes its output over its input, but not where somebody could still look at that.

    Eager does so, too (inplace ReLUs), so what counts is that hooks hold the same values in the end.
    """
    fused, eager, _ = both(chain_of_blocks)
    held: list[list[Tensor]] = [[], []]
    for tensors, model in zip(held, (fused.eval(), eager.eval()), strict=True):
        module = model.get_submodule(name)
        if pre:
            module.register_forward_pre_hook(lambda _, args, tensors=tensors: tensors.extend(args))
        else:
            module.register_forward_hook(lambda _, args, output, tensors=tensors: tensors.extend((*args, output)))
        with torch.inference_mode():
            model(models.random_input((2, 8, 6, 6)))
    assert held[0]
    torch.testing.assert_close(held[0], held[1], rtol=1e-4, atol=1e-4)


def test_what_a_module_keeps_is_not_overwritten() -> None:
    fused, eager, _ = both(chain_of_blocks)
    input = models.random_input((2, 8, 6, 6))
    kept = input.clone()
    for model in (fused.eval(), eager.eval()):
        for norm in (model[0].bn2, model[1].bn2, model[3].downsample[1]):
            norm.__class__ = Keeping
    with torch.no_grad():
        torch.testing.assert_close(fused(input), eager(input), rtol=1e-4, atol=1e-4)
    assert torch.equal(input, kept)
    for index in (0, 1):
        torch.testing.assert_close(fused[index].bn2.kept, eager[index].bn2.kept, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fused[3].downsample[1].kept, eager[3].downsample[1].kept, rtol=1e-4, atol=1e-4)


def test_residuals_are_overwritten_in_inference_only() -> None:
    fused, _, report = both(lambda: torchvision.models.resnet50(num_classes=5))
    assert sum(module.kind == "Sequential of blocks" for module in report.fused) == 4
    function, overwritten = functional.conv_bn_act, []

    def conv_bn_act(*args: Any, **options: Any) -> Tensor:
        output = function(*args, **options)
        residual = options["residual"]
        overwritten.append(residual is not None and residual.data_ptr() == output.data_ptr())
        return output

    input = models.random_input(IMAGE)
    with mock.patch.object(functional, "conv_bn_act", conv_bn_act), torch.no_grad():
        fused.eval()(input)
        cpu = "cpu" in resfuse.available_backends()
        assert sum(overwritten) == (16 if cpu else 0)
        overwritten.clear()
        with torch.enable_grad():
            fused.train()(input)
        fused(input)
    assert sum(overwritten) == 0


def test_a_compiled_block_is_called() -> None:
    fused, _, _ = both(chain_of_blocks)
    fused[1]._compiled_call_impl = lambda input: input + 100
    input = models.random_input((2, 8, 6, 6))
    assert fused.eval()[:2](input).min() > 50


def test_blocks_as_leaves_of_an_fx_trace() -> None:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, (BasicBlock, Bottleneck)) or super().is_leaf_module(module, name)

    fused, _, _ = both(chain_of_blocks)
    calls = [node.target for node in Tracer().trace(fused).nodes if node.op == "call_module"]
    assert calls == ["0", "1", "2", "3"]


def test_nothing_to_do() -> None:
    report = fuse_(nn.Linear(2, 2))
    assert (report.fused, report.left) == ([], [])
    unfuse_(nn.Linear(2, 2))


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


@models.compiles
@pytest.mark.parametrize("training", [True, False])
def test_compile_fullgraph(training: bool) -> None:
    torch._dynamo.reset()
    fused, eager, _ = both(lambda: torchvision.models.resnet18(num_classes=5))
    compiled = torch.compile(fused.train(training), fullgraph=True, backend="aot_eager")
    eager.train(training)
    input = models.random_input(IMAGE)
    output, expected = compiled(input), eager(input)
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in fused.parameters())
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(fused.get_buffer(name), buffer, rtol=1e-3, atol=1e-4)
    assert fused.layer1[0].bn1.num_batches_tracked == int(training)


@models.compiles
@pytest.mark.slow
def test_compile_with_inductor() -> None:
    torch._dynamo.reset()
    fused, eager, _ = both(models.small_resnet)
    compiled = torch.compile(fused, fullgraph=True)
    input = models.random_input(IMAGE)
    for training in (True, False, True):
        output, expected = compiled.train(training)(input), eager.train(training)(input)
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
        output.sum().backward()
    torch.testing.assert_close(fused.state_dict(), eager.state_dict(), rtol=1e-3, atol=1e-4)


def test_export() -> None:
    fused, eager, _ = both(lambda: nn.Sequential(BasicBlock(8, 8)))
    input = models.random_input((2, 8, 6, 6))
    program = torch.export.export(fused.eval(), (input,))
    torch.testing.assert_close(program.module()(input), eager.eval()(input), rtol=1e-4, atol=1e-4)


def test_onnx_export_sees_pytorchs_operators() -> None:
    block = models.block("basic").eval()
    fuse_(block)
    with mock.patch.object(torch.onnx, "is_in_onnx_export", return_value=True):  # as inside of torch.onnx.export
        program = torch.export.export(block, (models.block_input("basic"),), strict=False)
    assert not [node for node in program.graph.nodes if "resfuse" in str(node.target)]
    assert [node for node in program.graph.nodes if "conv2d" in str(node.target)]


def test_meta_device() -> None:
    model = models.small_resnet().to("meta")
    assert len(fuse_(model).fused) == 8
    assert model(torch.empty(IMAGE, device="meta")).shape == (4, 10)
    unfuse_(model)
    assert model.conv1.weight.is_contiguous()


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


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel() -> None:
    fused, eager, report = both(models.small_resnet)
    wrapped = nn.parallel.DistributedDataParallel(fused.double())
    with models.counted_calls() as calls:
        found = models.results(wrapped, models.random_input(IMAGE).double())
    assert calls.conv_bn_act == report.fused_ops
    expected = models.results(eager.double(), models.random_input(IMAGE).double())
    for name, tensor in expected.items():
        key = name.replace("grad of ", "grad of module.").replace("buffer ", "buffer module.")
        torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("process_group")
def test_fully_sharded() -> None:
    fused, eager, report = both(models.small_resnet, memory_format=torch.preserve_format)
    for module in (fused.layer1[0], fused.layer2[0], fused):
        torch.distributed.fsdp.fully_shard(module)
    input = models.random_input(IMAGE)
    with models.counted_calls() as calls:
        output = fused(input)
        output.sum().backward()
    assert calls.conv_bn_act == report.fused_ops
    torch.testing.assert_close(output, eager(input), rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="FSDP"):
        unfuse_(fused)


def test_imports_no_vision_library() -> None:
    code = (
        "import sys, torch, resfuse\n"
        "model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))\n"
        "assert len(resfuse.fuse_(model).fused) == 1\n"
        "print(sorted({'torchvision', 'timm', 'rich'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]", run.stderr
