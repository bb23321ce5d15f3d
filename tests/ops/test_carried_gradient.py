"""The gradient of a residual block's input: the sum of two, which the block's first convolution computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resfuse
from resfuse.nn import BasicBlock, Bottleneck
from resfuse.ops import conv_bn_act
from tests import models, shapes

pytestmark = pytest.mark.usefixtures("one_thread")

ON_CPU = [name for name in shapes.BACKENDS if "cpu" in shapes.devices_of(name)]


@pytest.fixture
def carried(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The gradients that are carried to a convolution."""
    found: list[Tensor] = []
    carry = conv_bn_act._carry

    def noting(node: Any, grad: Tensor) -> None:
        found.append(grad)
        carry(node, grad)

    monkeypatch.setattr(conv_bn_act, "_carry", noting)
    return found


def blocks(kind: type[nn.Module] = BasicBlock, count: int = 2) -> nn.Sequential:
    width = 16 if kind is BasicBlock else 4
    return models.seeded(lambda: nn.Sequential(*(kind(16, width) for _ in range(count))))  # type: ignore[call-arg]


def image(**options: Any) -> Tensor:
    torch.manual_seed(1)
    made = torch.randn(2, 16, 6, 5, **options).contiguous(memory_format=torch.channels_last)
    return made.requires_grad_()


def gradients(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    loss = (run(x) * torch.linspace(-1, 1, 5, device=x.device, dtype=x.dtype)).sum()
    return list(torch.autograd.grad(loss, [x, *model.parameters()]))


def expected(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    """With the sum left to autograd."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv_bn_act, "_carrier", lambda *_: None)
        return gradients(run, model, x)


def check(found: list[Tensor], right: list[Tensor]) -> None:
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_both_gradients_arrive(kind: type[nn.Module], backend: str, carried: list[Tensor]) -> None:
    model, x = blocks(kind), image()
    with resfuse.use_backend(backend):
        found = gradients(model, model, x)
        assert len(carried) == 2
        check(found, expected(model, model, x))
    assert len(carried) == 2


def test_it_is_added_in_the_memory_that_it_came_in(carried: list[Tensor]) -> None:
    model, x = blocks(count=1), image()
    with resfuse.use_backend("cpu"):
        grad_input = gradients(model, model, x)[0]
    assert grad_input.data_ptr() == carried[0].data_ptr()


def test_inputs_of_all_kinds(carried: list[Tensor]) -> None:
    """A leaf, a function's result, one of several results, and a view."""
    model, x = blocks(count=1), image()

    def run(of: Callable[[Tensor], Tensor]) -> None:
        check(gradients(lambda x: model(of(x)), model, x), expected(lambda x: model(of(x)), model, x))

    for of in (
        lambda x: x,
        lambda x: x * 2,
        lambda x: torch.cat([x, x]).split(2)[1],
        lambda x: x.permute(0, 1, 3, 2).permute(0, 1, 3, 2),
    ):
        run(of)
    assert len(carried) == 4


def test_what_is_no_block_is_left_to_autograd(carried: list[Tensor]) -> None:
    """A residual that was written to since, has fewer channels, or is of another branch."""
    conv = [models.seeded(lambda: resfuse.nn.ConvBNAct2d(16, 16, 3, padding=1)) for _ in range(2)]
    model, x = nn.ModuleList(conv), image()

    def written(x: Tensor) -> Tensor:
        x = x * 2
        y = conv[0](x)
        x.mul_(1)  # which its gradient does not need
        return conv[1](y, x)

    def branches(x: Tensor) -> Tensor:
        return conv[1](x, conv[0](x))

    wider = models.seeded(lambda: resfuse.nn.ConvBNAct2d(16, 24, 3, padding=1))

    def fewer_channels(x: Tensor) -> Tensor:
        bn = wider.bn
        return resfuse.conv_bn_act(
            conv[0](x), wider.conv.weight, bn.running_mean, bn.running_var, bn.weight, bn.bias, residual=x,
            padding=1, training=True, pad_residual=True,
        )  # fmt: skip

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(written, model, x)
    check(gradients(fewer_channels, conv[0], x), expected(fewer_channels, conv[0], x))
    check(gradients(branches, model, x), expected(branches, model, x))
    assert carried == []


def test_a_residual_that_is_added_twice(carried: list[Tensor]) -> None:
    conv = [models.seeded(lambda: resfuse.nn.ConvBNAct2d(16, 16, 3, padding=1)) for _ in range(3)]
    model, x = nn.ModuleList(conv), image()

    def run(x: Tensor) -> Tensor:
        y = conv[0](x)
        return conv[2](conv[1](y, x), x)

    check(gradients(run, model, x), expected(run, model, x))
    assert len(carried) == 2


def test_backward_that_ends_within_a_block(carried: list[Tensor]) -> None:
    """What was carried to a convolution that backward did not come to is forgotten by the next pass."""
    model, x = blocks(count=1), image()
    right = expected(model, model, x)
    loss = (model(x) * torch.linspace(-1, 1, 5)).sum()
    last = list(model.parameters())[-3:]
    torch.autograd.grad(loss, last, retain_graph=True)
    for _ in range(2):
        check(list(torch.autograd.grad(loss, [x, *model.parameters()], retain_graph=True)), right)
    check([torch.autograd.grad(loss, x, retain_graph=True)[0]], right[:1])
    assert len(carried) >= 3


def test_frozen_layers_and_hooks(carried: list[Tensor]) -> None:
    model, x = blocks(), image()
    right = expected(model, model, x)[0]
    seen: list[Tensor] = []
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    y = x * 1
    y.register_hook(seen.append)
    (model(y) * torch.linspace(-1, 1, 5)).sum().backward()
    assert x.grad is not None and len(carried) == 2
    check([x.grad, *seen], [right, right])


def test_second_derivatives(carried: list[Tensor]) -> None:
    model, x = blocks(count=1).double(), image(dtype=torch.float64)

    def second() -> list[Tensor]:
        carried.clear()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        assert carried == []
        return list(torch.autograd.grad(grad.square().sum(), [x, *model.parameters()]))

    found = second()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv_bn_act, "_carrier", lambda *_: None)
        check(found, second())


def test_a_mode_that_watches(carried: list[Tensor]) -> None:
    """Through PyTorch's dispatcher."""
    from torch.utils.flop_counter import FlopCounterMode

    model, x = blocks(), image()
    right = expected(model, model, x)
    loss = (model(x) * torch.linspace(-1, 1, 5)).sum()
    with FlopCounterMode(display=False):
        check(list(torch.autograd.grad(loss, [x, *model.parameters()])), right)
    assert len(carried) == 2
