"""The modules of `resfuse.nn`: equal to eager, forward and backward."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import nn

import resfuse.nn as rnn
from tests import models
from tests.nn.pairs import OWN_BLOCKS, Alone, Called, Eager, OnlyNorm, WithResidual, assert_module_matches, own_block


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", models.BLOCKS)
def test_block_equals_torchvisions(name: str, training: bool) -> None:
    fused, eager = own_block(name).double().train(training), models.block(name).double().train(training)
    models.assert_same(fused, eager, models.block_input(name))


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


def test_zero_init_last_without_a_weight() -> None:
    """It does nothing; with one, see test_models."""
    rnn.BasicBlock(8, 8, norm_layer=lambda channels: nn.BatchNorm2d(channels, affine=False)).zero_init_last()


@pytest.mark.parametrize(("options", "error"), [({"groups": 2}, ValueError), ({"dilation": 2}, NotImplementedError)])
@pytest.mark.parametrize("block", [rnn.BasicBlock, rnn.PreActBasicBlock])
def test_basic_block_refuses_what_torchvision_refuses(
    block: type[nn.Module], options: dict[str, int], error: type[Exception]
) -> None:
    with pytest.raises(error, match="expected"):
        block(16, 16, **options)


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


def test_repr_names_the_activation() -> None:
    assert "ReLU" in repr(rnn.BNAct2d(4))
    assert "ReLU" in repr(rnn.ConvBNAct2d(4, 4, 1))
    assert "Identity" in repr(rnn.ConvBNAct2d(4, 4, 1, activation="identity"))
