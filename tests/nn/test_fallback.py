"""Fallback of fused calls: modules that have to be called are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations

from resfuse.nn import fused_call
from tests import models
from tests.nn.pairs import Eager, WithResidual, assert_module_matches, pair


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
    "parameter hidden": lambda model: model.bn.__dict__.update(bias=None),
    "asymmetric padding": _asymmetric,
    "reflect": _reflect,
    "GroupNorm": _group_norm,
    "InstanceNorm": lambda model: setattr(model, "bn", nn.InstanceNorm2d(8, affine=True)),
}

UNFUSABLE_NORMS = ("forward replaced", "parameter hidden", "statistic is no buffer", "GroupNorm", "InstanceNorm")


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", UNFUSABLE)
def test_falls_back_to_the_modules(name: str) -> None:
    eager, fused = pair()
    for model in (eager.double(), fused.double()):
        torch.manual_seed(0)  # a spectral norm begins with random vectors
        UNFUSABLE[name](model)
    assert fused_call.reason_against(fused.conv, fused.bn)
    calls = 0 if name in UNFUSABLE_NORMS else 1  # behind any convolution, batch norm and ReLU are one call
    assert_module_matches(fused, eager, models.random_input((2, 6, 5, 5)), fused_calls=calls)


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


def test_eps_of_zero_raises_as_in_eager() -> None:
    for model in pair(bn=nn.BatchNorm2d(8, eps=0.0)):
        with pytest.raises(ValueError, match="eps must be positive"):
            model(models.random_input((2, 6, 5, 5)))


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
