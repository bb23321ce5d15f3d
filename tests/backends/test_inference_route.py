"""Fused calls in inference whose arguments an operator of a GPU backend checks: what it refuses goes the long way."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resfuse
from resfuse.backends import dispatch
from resfuse.backends.cuda_conv import ConvConfig, use_config
from resfuse.nn import ConvBNAct2d
from resfuse.nn.fused_call import own_conv_bn_act
from tests.emulator import backend as emulator
from tests.emulator import sm90 as sm90_emulator


@pytest.fixture(params=["cuda_emulator", "sm90_emulator"], autouse=True)
def counted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Runs the backend; names each convolution's way: "route" by its operator alone, "checked" through the ops."""
    module: Any = {"cuda_emulator": emulator, "sm90_emulator": sm90_emulator}[request.param]
    if (reason := module.unavailable_reason()) is not None:
        pytest.skip(reason)
    ways: list[str] = []

    def wrap(owner: Any, name: str, way: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def counting(*args: Any, **options: Any) -> Any:
            output = function(*args, **options)
            if output is not None:
                ways.append(way)
            return output

        monkeypatch.setattr(owner, name, counting)

    stand_in = types.SimpleNamespace(
        KERNELS=module.KERNELS, unavailable_reason=lambda: None, unsupported_reasons=lambda _: [],
        inference_route=module.inference_route, conv_bn_act_forward=module.conv_bn_act_forward,
    )  # fmt: skip
    monkeypatch.setitem(dispatch._registered, request.param, stand_in)
    wrap(dispatch, "_routed_inference", "route")
    wrap(stand_in, "conv_bn_act_forward", "checked")
    dispatch.forget_choices()
    with resfuse.use_backend(request.param), torch.no_grad():
        yield ways
    dispatch.forget_choices()


def layer(channels: int = 16, **options: Any) -> ConvBNAct2d:
    made = ConvBNAct2d(channels, 24, 3, padding=1, **options)
    for tensor in (made.bn.running_mean, made.bn.running_var, made.bn.weight, made.bn.bias):
        assert tensor is not None
        nn.init.uniform_(tensor, 0.5, 1.5)
    return made.eval().to(torch.bfloat16, memory_format=torch.channels_last)


def image(channels: int = 16, side: int = 6) -> Tensor:
    made = torch.randn(2, channels, side, side, dtype=torch.bfloat16)
    return made.contiguous(memory_format=torch.channels_last)


def checked(module: ConvBNAct2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """By the public function, which checks its arguments in Python."""
    bn, conv = module.bn, module.conv
    return resfuse.conv_bn_act(
        x, conv.weight, bn.running_mean, bn.running_var, bn.weight, bn.bias, conv_bias=conv.bias, residual=residual,
        stride=conv.stride, padding=conv.padding,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_same_bits(counted: list[str], bias: bool, layout: torch.memory_format) -> None:
    module, x, residual = layer(bias=bias), image(), image(24)
    x, residual = x.contiguous(memory_format=layout), residual.contiguous(memory_format=layout)
    for given in (None, residual):
        found = module(x, given)
        assert counted.pop() == "route"
        expected = checked(module, x, given)
        assert counted.pop() == "checked"
        assert torch.equal(found, expected) and found.stride() == expected.stride()


def test_state_is_read_at_every_call(counted: list[str]) -> None:
    module, x = layer(), image()
    module(x)
    module.conv.weight.data[3] = 0
    assert module.bn.running_mean is not None
    module.bn.running_mean.data += 1
    module.bn.eps, module.conv.stride = 0.25, (2, 2)
    found = module(x)
    conv, bn = module.conv, copy.deepcopy(module.bn)
    expected = resfuse.conv_bn_act(
        x, conv.weight, bn.running_mean, bn.running_var, bn.weight, bn.bias, stride=2, padding=1, eps=0.25
    )
    assert counted == ["route", "route", "checked"]
    assert torch.equal(found, expected)


def test_the_residual_may_be_overwritten_but_not_under_the_input(counted: list[str]) -> None:
    block = resfuse.nn.BasicBlock(16, 16).eval().to(torch.bfloat16, memory_format=torch.channels_last)
    x = image()
    kept = x.clone()
    first, second = block(x), block(x)
    assert torch.equal(first, second) and torch.equal(x, kept)
    assert set(counted) == {"route"}
    conv, bn = layer(16), image(16)
    call = (conv.conv.weight[:16], None, ((1, 1), (1, 1), (1, 1), 1), _state(conv.bn, 16), True)
    shared = image()
    output = dispatch._routed_inference(shared, [call], shared, True, False)
    assert output is not None and output.data_ptr() != shared.data_ptr()
    output = dispatch._routed_inference(shared, [call], bn, True, False)
    assert output is not None and output.data_ptr() == bn.data_ptr()


def _state(bn: nn.BatchNorm2d, channels: int) -> Any:
    vectors = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    return resfuse.types.BatchNorm(*(v[:channels] for v in vectors if v is not None), False, 0.1, 1e-5)


def test_what_the_operator_refuses_has_the_words_of_the_checks(counted: list[str]) -> None:
    module, x = layer(bias=True), image()
    with pytest.raises(ValueError, match="input: expected 16 channels"):
        module(image(8))
    assert module.conv.bias is not None
    module.conv.bias.data = module.conv.bias.data.float()
    with pytest.raises(TypeError, match="conv_bias: expected dtype"):
        module(x)
    module.conv.bias.data = module.conv.bias.data.bfloat16()
    module.bn.running_var = torch.ones(23)
    with pytest.raises(ValueError, match="running_var: expected shape"):
        module(x)
    with pytest.raises(ValueError, match="running_var: expected shape"):
        own_conv_bn_act(module.conv, module.bn, x, image(24), module.act, overwrite_residual=True)
    assert "route" not in counted


def test_a_configuration_counts(request: pytest.FixtureRequest, counted: list[str]) -> None:
    if "sm90" in request.node.name:
        pytest.skip("the configurations of cuda")
    module, x = layer(), image()
    blocks = []
    for rows in (32, 64, 32):
        with use_config(ConvConfig(rows, 64)), emulator.launches() as launched:
            module(x)
        blocks.append(launched.blocks)
    assert blocks == [3, 2, 3] and counted == ["route"] * 3


def test_requests_count(counted: list[str]) -> None:
    module, x = layer(), image()
    module(x)
    with resfuse.use_backend("reference"):
        module(x)
    with resfuse.use_backend("cpu"):
        module(x)
    assert counted == ["route"]
