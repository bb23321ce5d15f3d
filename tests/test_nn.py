"""The modules of `resfuse.nn` and the fused call under them: equal to eager, and unnoticed by whoever looks inside."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations
from torchvision.ops.misc import FrozenBatchNorm2d

import resfuse
import resfuse.nn as rnn
from resfuse.nn import fused_call
from tests import models
from tests.models import reloaded

OWN_BLOCKS = {
    torchvision.models.resnet.BasicBlock: rnn.BasicBlock,
    torchvision.models.resnet.Bottleneck: rnn.Bottleneck,
}


def own_block(name: str) -> nn.Module:
    """The block of resfuse.nn for a torchvision block of `models.BLOCKS`, with the same state."""
    block = OWN_BLOCKS[models.BLOCKS[name][0]](**models.block_options(name))
    block.load_state_dict(models.block(name).state_dict())
    return block


class Eager(nn.Module):
    """What a fused module is equivalent to, spelled out."""

    def __init__(self, conv: nn.Module, bn: nn.Module, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.bn, self.act = conv, bn, act

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        output = self.bn(self.conv(input))
        if residual is not None:
            output += residual
        return output if self.act is None else self.act(output)


class Called(Eager):
    """The same modules in a fused call."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return fused_call.conv_bn_act(self.conv, self.bn, input, residual, self.act)


class WithResidual(nn.Module):
    """Gives a module a residual made of its input, so that both take one argument."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input: Tensor) -> Tensor:
        return self.module(input, input.flip(2))


class Alone(WithResidual):
    """The same without a residual."""

    def forward(self, input: Tensor) -> Tensor:
        return self.module(input)


class OnlyNorm(nn.Module):
    """Gives a batch norm the names that it has in `Eager`."""

    def __init__(self, bn: nn.Module) -> None:
        super().__init__()
        self.bn = bn

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.bn(input, residual)


class EagerPreActBasicBlock(rnn.PreActBasicBlock):
    def forward(self, input: Tensor) -> Tensor:
        preactivated = torch.relu(self.bn1(input))
        output = self.conv2(torch.relu(self.bn2(self.conv1(preactivated))))
        return output + (input if self.downsample is None else self.downsample(preactivated))


class EagerPreActBottleneck(rnn.PreActBottleneck):
    def forward(self, input: Tensor) -> Tensor:
        preactivated = torch.relu(self.bn1(input))
        output = torch.relu(self.bn2(self.conv1(preactivated)))
        output = self.conv3(torch.relu(self.bn3(self.conv2(output))))
        return output + (input if self.downsample is None else self.downsample(preactivated))


def pair(conv: nn.Module | None = None, bn: nn.Module | None = None, act: nn.Module | None = None) -> tuple[Any, Any]:
    """(eager, fused) with equal but separate modules."""
    eager = models.seeded(
        lambda: Eager(conv or nn.Conv2d(6, 8, 3, padding=1), bn or nn.BatchNorm2d(8), act or nn.ReLU(inplace=True))
    )
    twin = copy.deepcopy(eager)
    return eager, Called(twin.conv, twin.bn, twin.act)


def assert_module_matches(
    fused: nn.Module, eager: nn.Module, input: Tensor, fused_calls: int = 1, modes: tuple[bool, ...] = (True, False)
) -> None:
    """In float64, through several steps: each mode twice, so that what one call leaves behind enters the next."""
    fused, eager = fused.double(), eager.double()
    for training in modes + modes:
        with models.counted_calls() as calls:
            models.assert_same(fused.train(training), eager.train(training), input)
        assert calls.conv_bn_act + calls.bn_act == fused_calls


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", models.BLOCKS)
def test_block_equals_torchvisions(name: str, training: bool) -> None:
    fused, eager = own_block(name).double().train(training), models.block(name).double().train(training)
    models.assert_same(fused, eager, models.block_input(name))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["basic-stride", "bottleneck", "odd-channels"])
def test_block_keeps_the_contract(name: str, training: bool, memory_format: torch.memory_format) -> None:
    fused, eager = own_block(name).train(training), models.block(name).train(training)
    input = models.decided_input(eager, models.block_input(name).shape).to(memory_format=memory_format)
    models.assert_contract(fused, eager, input)


@pytest.mark.parametrize("name", models.BLOCKS)
def test_block_has_torchvisions_state_and_arguments(name: str) -> None:
    fused, eager = own_block(name), models.block(name)
    assert list(fused.state_dict()) == list(eager.state_dict())
    eager.load_state_dict(fused.state_dict())
    assert inspect.signature(type(fused).__init__).parameters.keys() == (
        inspect.signature(type(eager).__init__).parameters.keys()
    )
    assert type(fused).expansion == type(eager).expansion
    assert dict(fused.named_children()).keys() == dict(eager.named_children()).keys()
    for child, twin in zip(fused.modules(), eager.modules(), strict=True):
        assert child.extra_repr() == twin.extra_repr()  # stride on the 3x3 (v1.5), padding, groups, eps, momentum


@pytest.mark.parametrize("block", OWN_BLOCKS)
def test_block_inside_torchvisions_resnet(block: type[nn.Module]) -> None:
    eager, fused = models.small_resnet(block), models.small_resnet(OWN_BLOCKS[block])
    fused.load_state_dict(eager.state_dict())
    for training in (True, False):
        models.assert_same(
            fused.double().train(training), eager.double().train(training), models.random_input((2, 3, 64, 64))
        )


def test_zero_init_last() -> None:
    basic, bottleneck = rnn.BasicBlock(8, 8), rnn.Bottleneck(8, 2)
    basic.zero_init_last(), bottleneck.zero_init_last()
    assert not basic.bn2.weight.any()
    assert not bottleneck.bn3.weight.any()
    assert bottleneck.bn2.weight.all()
    rnn.BasicBlock(8, 8, norm_layer=lambda channels: nn.BatchNorm2d(channels, affine=False)).zero_init_last()


@pytest.mark.parametrize(("options", "error"), [({"groups": 2}, ValueError), ({"dilation": 2}, NotImplementedError)])
@pytest.mark.parametrize("block", [rnn.BasicBlock, rnn.PreActBasicBlock])
def test_basic_block_refuses_what_torchvision_refuses(
    block: type[nn.Module], options: dict[str, int], error: type[Exception]
) -> None:
    with pytest.raises(error, match="expected"):
        block(16, 16, **options)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("fused_class", "eager_class", "operators"),
    [(rnn.PreActBasicBlock, EagerPreActBasicBlock, (1, 1)), (rnn.PreActBottleneck, EagerPreActBottleneck, (2, 1))],
)
def test_preact_block_equals_eager(
    fused_class: Any, eager_class: Any, operators: tuple[int, int], stride: int, training: bool
) -> None:
    inplanes, planes = 16, 16 // fused_class.expansion * stride
    downsample = nn.Conv2d(inplanes, planes * fused_class.expansion, 1, stride, bias=False) if stride > 1 else None
    eager = models.seeded(lambda: eager_class(inplanes, planes, stride, copy.deepcopy(downsample)))
    fused = fused_class(inplanes, planes, stride, copy.deepcopy(downsample))
    fused.load_state_dict(eager.state_dict())
    with models.counted_calls() as calls:
        models.assert_same(
            fused.double().train(training), eager.double().train(training), models.random_input((2, inplanes, 9, 9))
        )
    assert (calls.conv_bn_act, calls.bn_act) == operators


def test_preact_identity_is_clean() -> None:
    """With the last convolution at zero the block returns its input, negative values included."""
    block = models.seeded(lambda: rnn.PreActBottleneck(16, 4))
    nn.init.zeros_(block.conv3.weight)
    input = models.random_input((2, 16, 5, 5))
    assert torch.equal(block(input), input)


CONV_OPTIONS: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 1), "stride": (2, 1), "padding": (1, 0)},
    {"kernel_size": 3, "dilation": 2, "padding": "same"},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "groups": 2, "padding": 1},
    {"kernel_size": 1, "bias": True},
]


@pytest.mark.parametrize("options", CONV_OPTIONS, ids=str)
@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_conv_bn_act(options: dict[str, Any], activation: str) -> None:
    fused = models.seeded(lambda: rnn.ConvBNAct2d(6, 8, **options, activation=activation))
    eager = Eager(
        nn.Conv2d(6, 8, **{"bias": False, **options}),
        nn.BatchNorm2d(8),
        nn.ReLU() if activation == "relu" else nn.Identity(),
    )
    eager.load_state_dict(fused.state_dict())
    assert_module_matches(fused, eager, models.random_input((2, 6, 9, 8)))


def test_conv_bn_act_with_residual() -> None:
    fused = models.seeded(lambda: rnn.ConvBNAct2d(8, 8, 3, padding=1))
    eager = Eager(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    eager.load_state_dict(fused.state_dict())
    assert_module_matches(WithResidual(fused), WithResidual(eager), models.random_input((2, 8, 5, 5)))


def test_conv_bn_act_passes_every_argument_on() -> None:
    module = rnn.ConvBNAct2d(
        4, 6, 3, 2, 1, 1, 2, True, "reflect", "meta", torch.bfloat16,
        eps=1e-3, momentum=None, affine=False, track_running_stats=False, activation="identity",
    )  # fmt: skip
    conv = nn.Conv2d(4, 6, 3, 2, 1, 1, 2, True, "reflect")
    bn = nn.BatchNorm2d(6, 1e-3, None, False, False)
    assert module.conv.extra_repr() == conv.extra_repr()
    assert module.bn.extra_repr() == bn.extra_repr()
    assert module.conv.weight.dtype == torch.bfloat16
    assert module.conv.weight.is_meta
    with pytest.raises(ValueError, match="gelu"):
        rnn.ConvBNAct2d(4, 4, 1, activation="gelu")


@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("residual", [False, True])
def test_bn_act(activation: str, residual: bool) -> None:
    fused = models.seeded(lambda: rnn.BNAct2d(6, 1e-4, 0.3, activation=activation))
    act = nn.ReLU() if activation == "relu" else nn.Identity()
    eager = Eager(nn.Identity(), nn.BatchNorm2d(6, 1e-4, 0.3), act)
    eager.bn.load_state_dict(fused.state_dict())
    assert isinstance(fused, nn.BatchNorm2d)
    assert list(fused.state_dict()) == list(eager.bn.state_dict())
    wrap = WithResidual if residual else Alone
    assert_module_matches(wrap(OnlyNorm(fused)), wrap(eager), models.random_input((2, 6, 5, 4)))


def test_bn_act_inside_a_conv_bn_act() -> None:
    eager = Eager(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    models.randomise(eager)
    bn = rnn.BNAct2d(8)
    bn.load_state_dict(eager.bn.state_dict())
    assert_module_matches(Called(copy.deepcopy(eager.conv), bn), eager, models.random_input((2, 6, 5, 5)))


def test_add_relu() -> None:
    input, residual = models.random_input((2, 3, 4, 5)), models.random_input((2, 3, 4, 5), seed=2)
    assert torch.equal(rnn.AddReLU()(input, residual), torch.relu(input + residual))


# Batch norm's settings: all of them change what one call computes or leaves behind.
NORMS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.BatchNorm2d(8),
    "eps": lambda: nn.BatchNorm2d(8, eps=0.1),
    "momentum": lambda: nn.BatchNorm2d(8, momentum=0.7),
    "momentum-0": lambda: nn.BatchNorm2d(8, momentum=0.0),
    "cumulative": lambda: nn.BatchNorm2d(8, momentum=None),
    "untracked": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "not-affine": lambda: nn.BatchNorm2d(8, affine=False),
    "frozen": lambda: FrozenBatchNorm2d(8, eps=0.01),
    "timm": lambda: BatchNormAct2d(8, apply_act=False),
    "timm-relu": lambda: BatchNormAct2d(8),
    "timm-frozen": lambda: FrozenBatchNormAct2d(8, eps=0.01),
    "synchronised": lambda: nn.SyncBatchNorm(8, momentum=None),  # among several processes: test_distributed
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("residual", [False, True])
def test_norm_settings(name: str, residual: bool) -> None:
    eager, fused = pair(nn.Conv2d(8, 8, 3, padding=1), NORMS[name](), nn.ReLU())
    input = models.random_input((2, 8, 5, 5))
    if not residual:
        assert_module_matches(fused, eager, input)
    elif name not in ("timm-relu", "timm-frozen"):
        assert_module_matches(WithResidual(fused), WithResidual(eager), input)
    else:  # a ReLU before the addition too: the norm has to be called (eager has no backward for it)
        with torch.no_grad(), models.counted_calls() as calls:
            torch.testing.assert_close(fused(input, input), eager(input, input))
        assert calls.conv_bn_act == 0
        assert fused_call.reasons_against(fused.conv, fused.bn, residual=True)


def test_statistics_switched_off_after_construction() -> None:
    eager, fused = pair()
    for model in (eager, fused):
        model.bn.track_running_stats = False
    assert_module_matches(fused, eager, models.random_input((2, 6, 5, 5)))
    for model in (eager, fused):
        model.bn.running_mean = model.bn.running_var = None
    assert_module_matches(fused, eager, models.random_input((2, 6, 5, 5)))


def test_frozen_norm_inside_of_a_model_in_training() -> None:
    eager, fused = pair()
    for model in (eager, fused):
        model.double().train()
        model.bn.eval().requires_grad_(False)
    models.assert_same(fused, eager, models.random_input((2, 6, 5, 5)))
    assert fused.bn.num_batches_tracked == 0
    assert fused.bn.weight.grad is None


def test_one_value_per_channel() -> None:
    _, fused = pair()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fused.train()(torch.zeros(1, 6, 1, 1))
    assert fused.bn.num_batches_tracked == 0
    fused.eval()(torch.zeros(1, 6, 1, 1))


def test_momentum_none_is_the_average_of_all_batches() -> None:
    _, fused = pair(bn=nn.BatchNorm2d(8, momentum=None))
    fused.bn.reset_running_stats()
    inputs = [models.random_input((4, 6, 5, 5), seed) for seed in range(3)]
    with torch.no_grad():
        for input in inputs:
            fused.train()(input)
        means = torch.stack([fused.conv(input).mean((0, 2, 3)) for input in inputs])
    torch.testing.assert_close(fused.bn.running_mean, means.mean(0))
    assert fused.bn.num_batches_tracked == 3


def test_two_forwards_before_one_backward() -> None:
    eager, fused = pair()
    first, second = models.random_input((2, 6, 5, 5), 1).double(), models.random_input((3, 6, 4, 4), 2).double()
    grads = []
    for model in (eager, fused):
        model.double().train()
        outputs = model(first), model(second)
        (outputs[0].sum() + outputs[1].square().sum()).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def test_nan_is_not_swallowed() -> None:
    _, fused = pair()
    input = models.random_input((1, 6, 5, 5))
    input[0, 0, 2, 2] = float("nan")
    for training in (True, False):
        output = fused.train(training)(input)
        assert output.isnan().any(), training


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["basic", "bottleneck-stride"])
def test_layout_of_the_output_is_eagers(name: str, memory_format: torch.memory_format) -> None:
    fused, eager = own_block(name), models.block(name)
    for training in (True, False):
        for weights in (torch.contiguous_format, torch.channels_last):
            for model in (fused, eager):
                model.to(memory_format=weights).train(training)
            input = models.block_input(name).to(memory_format=memory_format)
            assert fused(input).stride() == eager(input).stride()


# What has to be noticed: each entry changes a pair of conv and bn, after which the modules must be called.
def _weight_norm_hook(model: Eager) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.conv)


def _replace_forward(model: Eager) -> None:
    forward = model.bn.forward
    model.bn.forward = lambda input: 2 * forward(input)


def _replace_conv_forward(model: Eager) -> None:
    forward = model.conv._conv_forward
    model.conv._conv_forward = lambda *args: forward(*args) + 1


def _subclass(model: Eager) -> None:
    class Doubled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model.conv.__class__ = Doubled


def _plain_tensor(model: Eager) -> None:
    weight = model.conv.weight
    del model.conv.weight
    model.conv.weight = weight.detach() * 2


def _plain_statistic(model: Eager) -> None:
    mean = model.bn.running_mean
    del model.bn.running_mean
    model.bn.running_mean = mean + 1


def _asymmetric(model: Eager) -> None:
    model.conv = models.seeded(lambda: nn.Conv2d(6, 8, 2, padding="same"))


def _reflect(model: Eager) -> None:
    model.conv = models.seeded(lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"))


def _group_norm(model: Eager) -> None:
    model.bn = nn.GroupNorm(2, 8)


UNFUSABLE: dict[str, Callable[[Any], object]] = {
    "weight_norm": lambda model: parametrizations.weight_norm(model.conv),
    "spectral_norm": lambda model: parametrizations.spectral_norm(model.conv),
    "weight_norm hook": _weight_norm_hook,
    "forward replaced": _replace_forward,
    "_conv_forward replaced": _replace_conv_forward,
    "subclass": _subclass,
    "weight is no parameter": _plain_tensor,
    "statistic is no buffer": _plain_statistic,
    "asymmetric padding": _asymmetric,
    "reflect": _reflect,
    "GroupNorm": _group_norm,
    "InstanceNorm": lambda model: setattr(model, "bn", nn.InstanceNorm2d(8, affine=True)),
    "BatchNormAct2d, other activation": lambda model: setattr(
        model, "bn", models.seeded(lambda: BatchNormAct2d(8, act_layer=nn.GELU, inplace=False))
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", UNFUSABLE)
def test_falls_back_to_the_modules(name: str) -> None:
    eager, fused = pair()
    for model in (eager.double(), fused.double()):
        torch.manual_seed(0)  # a spectral norm begins with random vectors
        UNFUSABLE[name](model)
    assert fused_call.reasons_against(fused.conv, fused.bn)
    assert_module_matches(fused, eager, models.random_input((2, 6, 5, 5)), fused_calls=0)


@pytest.mark.parametrize("name", NORMS)
def test_reasons_agree_with_the_calls(name: str) -> None:
    _, fused = pair(bn=NORMS[name]())
    assert fused_call.reasons_against(fused.conv, fused.bn) == []


@pytest.mark.parametrize("which", ["conv", "bn", "act"])
@pytest.mark.parametrize(
    "register",
    [
        lambda module, hook: module.register_forward_hook(hook),
        lambda module, hook: module.register_forward_hook(hook, with_kwargs=True, always_call=True),
        lambda module, hook: module.register_forward_pre_hook(hook),
        lambda module, hook: module.register_forward_pre_hook(hook, with_kwargs=True),
        lambda module, hook: module.register_full_backward_hook(hook),
        lambda module, hook: module.register_full_backward_pre_hook(hook),
    ],
    ids=["forward", "forward-kwargs", "pre", "pre-kwargs", "backward", "backward-pre"],
)
def test_hooks_on_inner_modules_run(which: str, register: Callable[..., Any]) -> None:
    eager, fused = pair(act=nn.ReLU())
    seen: list[nn.Module] = []
    handles = [register(getattr(model, which), lambda module, *_: seen.append(module)) for model in (eager, fused)]
    models.assert_same(fused.double(), eager.double(), models.random_input((2, 6, 5, 5)))
    assert seen == [getattr(fused, which), getattr(eager, which)]
    for handle in handles:
        handle.remove()
    with models.counted_calls() as calls:
        fused(models.random_input((2, 6, 5, 5)).double())
    assert calls.conv_bn_act == 1
    assert len(seen) == 2


def test_a_hook_that_changes_the_output_is_obeyed() -> None:
    eager, fused = pair()
    for model in (eager, fused):
        model.bn.register_forward_hook(lambda module, args, output: output * 2)
    models.assert_same(fused.double(), eager.double(), models.random_input((2, 6, 5, 5)))


@pytest.mark.parametrize(
    "register",
    [
        torch_module.register_module_forward_hook,
        torch_module.register_module_forward_pre_hook,
        torch_module.register_module_full_backward_hook,
        torch_module.register_module_full_backward_pre_hook,
    ],
)
def test_global_hooks_see_the_inner_modules(register: Callable[..., Any]) -> None:
    _, fused = pair(act=nn.ReLU())
    seen = []
    handle = register(lambda module, *_: seen.append(module))
    try:
        models.results(fused, models.random_input((2, 6, 5, 5)))
    finally:
        handle.remove()
    assert {fused.conv, fused.bn, fused.act} <= set(seen)


def test_another_activation_is_called() -> None:
    for act in (nn.SiLU(), nn.LeakyReLU(inplace=True), nn.ReLU6(inplace=True)):
        eager, fused = pair(nn.Conv2d(8, 8, 1), act=act)
        assert_module_matches(fused, eager, models.random_input((2, 8, 5, 5)))
        assert_module_matches(WithResidual(fused), WithResidual(eager), models.random_input((2, 8, 5, 5)))


def test_residual_that_broadcasts_or_does_not_fit() -> None:
    eager, fused = pair()
    input, residual = models.random_input((2, 6, 5, 5)), models.random_input((1, 8, 1, 5))
    torch.testing.assert_close(fused(input, residual), eager(input, residual))
    assert fused.bn.num_batches_tracked == 1
    with pytest.raises(RuntimeError, match="must match the size"):
        eager(input, models.random_input((2, 8, 4, 4)))
    with pytest.raises(RuntimeError, match="must match the size"):
        fused(input, models.random_input((2, 8, 4, 4)))
    fused.bn.num_batches_tracked.fill_(1)
    with pytest.raises(ValueError, match="input: expected 6 channels"):
        fused(models.random_input((2, 5, 5, 5)))
    assert fused.bn.num_batches_tracked == 1


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_autocast(frozen: bool, training: bool) -> None:
    """The dtypes of eager everywhere: frozen norms promote to float32, an addition rounds to the output's dtype."""
    bns = [FrozenBatchNorm2d(8) if frozen else nn.BatchNorm2d(8) for _ in range(2)]
    eager, fused = zip(*(pair(nn.Conv2d(8, 8, 3, padding=1), bn) for bn in bns), strict=True)

    def run(models_: tuple[nn.Module, ...], input: Tensor, residual: Tensor) -> list[Tensor]:
        hidden = models_[0].train(training)(input)
        return [hidden, models_[1].train(training)(hidden, residual), models_[1](input, residual)]

    input = models.random_input((2, 8, 5, 5))
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (run(pair_, input, input) for pair_ in (eager, fused))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    block = own_block("bottleneck-stride").to(dtype)
    eager = models.block("bottleneck-stride").to(dtype)
    input = models.block_input("bottleneck-stride").to(dtype)
    for training in (True, False):
        output, expected = block.train(training)(input), eager.train(training)(input)
        assert output.dtype == dtype
        torch.testing.assert_close(output, expected, rtol=0.05, atol=0.05)


def test_sync_conversion_keeps_the_activation() -> None:
    for activation in ("relu", "identity"):
        eager = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU() if activation == "relu" else nn.Identity())
        models.randomise(eager)
        fused = nn.Sequential(rnn.BNAct2d(6, activation=activation))
        fused[0].load_state_dict(eager[0].state_dict())
        weight = fused[0].weight
        for model in (copy.deepcopy(fused), reloaded(fused), fused):
            synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
            assert isinstance(synced[0], nn.SyncBatchNorm)
            assert list(synced.state_dict()) == list(eager.state_dict())
            twin = copy.deepcopy(eager).double()
            models.assert_same(synced.double(), twin, models.random_input((2, 6, 5, 5)))
            models.assert_same(synced.eval(), twin.eval(), models.random_input((2, 6, 5, 5)))
        assert synced[0].weight is weight


def test_sync_conversion_of_others_is_left_alone() -> None:
    rnn.BNAct2d(4)
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(4))) is nn.SyncBatchNorm
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(BatchNormAct2d(4))) is nn.SyncBatchNorm


@pytest.mark.parametrize("name", ["basic-stride", "bottleneck"])
def test_block_after_sync_conversion(name: str) -> None:
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(own_block(name)).double()
    assert any(isinstance(module, nn.SyncBatchNorm) for module in fused.modules())
    models.assert_same(fused, models.block(name).double(), models.block_input(name))


def test_lazy_modules() -> None:
    fused = Called(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU())
    input = models.random_input((2, 6, 5, 5))
    fused(input)  # materialises
    eager = Eager(*map(copy.deepcopy, (fused.conv, fused.bn, fused.act)))
    assert_module_matches(fused, eager, input)


def test_fx_tracing_sees_the_modules() -> None:
    block = own_block("basic-stride").eval()
    traced = torch.fx.symbolic_trace(block)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    eager_graph = torch.fx.symbolic_trace(models.block("basic-stride")).graph
    assert sorted(targets) == sorted(node.target for node in eager_graph.nodes if node.op == "call_module")
    input = models.block_input("basic-stride")
    torch.testing.assert_close(traced(input), block(input))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # from torch 2.15 on
def test_jit_trace() -> None:
    block = own_block("basic-stride").eval()
    input = models.block_input("basic-stride")
    traced = torch.jit.trace(block, input)
    other = models.block_input("basic-stride", size=12, batch=1)
    torch.testing.assert_close(traced(other), block(other))


def test_torch_func() -> None:
    block, eager = own_block("basic").eval(), models.block("basic").eval()
    input = models.block_input("basic", batch=3)
    parameters = {name: 2 * tensor.detach() for name, tensor in block.named_parameters()}

    def loss(model: nn.Module) -> Callable[..., Tensor]:
        return lambda state, image: torch.func.functional_call(model, state, (image.unsqueeze(0),)).square().mean()

    found, expected = (
        torch.func.vmap(torch.func.grad(loss(model)), (None, 0))(parameters, input) for model in (block, eager)
    )
    torch.testing.assert_close(found, expected)
    found, expected = (torch.func.functional_call(model, parameters, (input,)) for model in (block, eager))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # used by torch's own formulas
def test_forward_mode_gradients() -> None:
    block, eager = own_block("basic").eval(), models.block("basic").eval()
    input, tangent = models.block_input("basic", seed=1), models.block_input("basic", seed=2)
    found, expected = (torch.func.jvp(model, (input,), (tangent,)) for model in (block, eager))
    torch.testing.assert_close(found, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(input, tangent)
        output = torch.autograd.forward_ad.unpack_dual(block(dual)).tangent
    torch.testing.assert_close(output, expected[1])


def test_meta_and_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    block = own_block("bottleneck-stride")
    shape = block(models.block_input("bottleneck-stride")).shape
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert block.eval()(mode.from_tensor(models.block_input("bottleneck-stride"))).shape == shape
    for training in (True, False):
        meta = block.to("meta").train(training)
        assert meta(models.block_input("bottleneck-stride").to("meta")).shape == shape


@models.compiles
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["basic-stride", "bottleneck"])
def test_compile_fullgraph(name: str, training: bool) -> None:
    torch._dynamo.reset()
    fused, eager = own_block(name).train(training), models.block(name).train(training)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    input = models.decided_input(eager, models.block_input(name).shape)
    found, expected = models.results(compiled, input), models.results(eager, input)
    for key, tensor in expected.items():
        torch.testing.assert_close(
            found[key.replace("grad of ", "grad of _orig_mod.").replace("buffer ", "buffer _orig_mod.")],
            tensor, rtol=1e-4, atol=1e-4,
        )  # fmt: skip
    tracked = [buffer for buffer_name, buffer in fused.named_buffers() if "num_batches" in buffer_name]
    assert all(count == int(training) for count in tracked)


@models.compiles
def test_compiled_torch_func() -> None:
    """Inside of compiled torch.func transforms tensors do not say that they need a gradient."""
    torch._dynamo.reset()
    block, eager = own_block("basic").eval(), models.block("basic").eval()
    input = models.block_input("basic")
    parameters = {name: tensor.detach() for name, tensor in block.named_parameters()}

    def gradient(model: nn.Module) -> Callable[..., dict[str, Tensor]]:
        return torch.func.grad(lambda state: torch.func.functional_call(model, state, (input,)).square().mean())

    compiled = torch.compile(gradient(block), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(parameters), gradient(eager)(parameters), rtol=1e-4, atol=1e-5)


@models.compiles
@pytest.mark.slow
def test_compile_with_inductor_every_module() -> None:
    class All(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = rnn.ConvBNAct2d(4, 16, 3, padding=1)
            self.blocks = nn.Sequential(rnn.BasicBlock(16, 16), rnn.Bottleneck(16, 4))
            self.preact = nn.Sequential(rnn.PreActBasicBlock(16, 16), rnn.PreActBottleneck(16, 4))
            self.bn, self.add = rnn.BNAct2d(16), rnn.AddReLU()

        def forward(self, input: Tensor) -> Tensor:
            hidden = self.blocks(self.conv(input))
            return self.add(self.bn(self.preact(hidden), hidden), hidden)

    torch._dynamo.reset()
    model = models.seeded(All)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True)
    for training in (True, False, True):
        model.train(training), twin.train(training)
        input = models.random_input((2, 4, 8, 8))
        torch.testing.assert_close(compiled(input), model(input), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=1e-4, atol=1e-4)


def test_pickle_and_deepcopy() -> None:
    for module in (own_block("basic-stride"), rnn.ConvBNAct2d(16, 8, 3), rnn.PreActBasicBlock(16, 16), rnn.AddReLU()):
        for twin in (reloaded(module), copy.deepcopy(module)):
            assert type(twin) is type(module)
            torch.testing.assert_close(twin.state_dict(), module.state_dict())


def test_repr_names_the_activation() -> None:
    assert "ReLU" in repr(rnn.BNAct2d(4))
    assert "ReLU" in repr(rnn.ConvBNAct2d(4, 4, 1))
    assert "Identity" in repr(rnn.ConvBNAct2d(4, 4, 1, activation="identity"))


def test_exports() -> None:
    assert resfuse.nn is rnn
    assert all(hasattr(rnn, name) for name in rnn.__all__)
