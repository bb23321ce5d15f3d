"""Every way of writing a block is fused, and none of them computes anything else afterwards."""

from __future__ import annotations

import copy
import random
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse import fuse_
from tests import models
from tests.fuse import styles
from tests.fuse.styles import STYLES, TRAPS, C

INPUT = (2, C, 6, 6)


def drawn_alike(model: Any, input: Tensor) -> Tensor:
    torch.manual_seed(3)
    return model(input)


def assert_same_without_gradient(fused: Any, eager: Any) -> None:
    """In inference mode, where memory is written over; the input is kept."""
    with torch.inference_mode():
        for model in (fused, eager):
            model.eval()
        input = models.random_input(INPUT).double()
        kept = input.clone()
        torch.testing.assert_close(drawn_alike(fused, input), drawn_alike(eager, input))
        assert torch.equal(input, kept)


@pytest.mark.parametrize("name", STYLES)
def test_style_is_fused(name: str) -> None:
    build, calls = STYLES[name]
    report = models.assert_equal_before_and_after(build, INPUT)
    assert report.fused_ops == calls
    fused, eager, _ = models.both(build)
    assert_same_without_gradient(fused.double(), eager.double())


def forwards_of(build: Any) -> tuple[nn.Module, nn.Module]:
    fused, eager, _ = models.both(build)
    assert vars(fused).keys() == vars(eager).keys()  # following a forward leaves nothing behind
    return fused.double(), eager.double()


@pytest.mark.parametrize("name", TRAPS)
def test_trap(name: str) -> None:
    fused, eager = forwards_of(TRAPS[name])
    for training in (True, False):
        for model in (fused, eager):
            model.train(training)
        input = models.random_input(INPUT)
        try:
            models.results(copy.deepcopy(eager), input.double(), evaluate=drawn_alike)
        except RuntimeError:  # eager has no gradient where it writes to what was saved
            with torch.no_grad():
                found, expected = (drawn_alike(model, input.double()) for model in (fused, eager))
            torch.testing.assert_close(found, expected)
            continue
        models.assert_same(fused, eager, input, evaluate=drawn_alike)
    assert_same_without_gradient(fused, eager)


@pytest.mark.parametrize("name", [*STYLES, *TRAPS])
def test_between_other_layers(name: str) -> None:
    """What a block is given may not be computed yet, and what it returns neither."""
    build = STYLES[name][0] if name in STYLES else TRAPS[name]
    fused, eager = forwards_of(lambda: nn.Sequential(*models.conv_bn_relu(), build(), *models.conv_bn_relu()[1:]))
    assert type(fused) is not nn.Sequential  # it was followed through the block
    for training in (True, False):
        for model in (fused, eager):
            model.train(training)
        with torch.no_grad():
            found, expected = (drawn_alike(model, models.random_input(INPUT).double()) for model in (fused, eager))
        torch.testing.assert_close(found, expected)
    fused, eager = forwards_of(lambda: nn.Sequential(nn.Conv2d(C, C, 1), build()))
    assert_same_without_gradient(fused, eager)


def test_python_and_torch_random_states_and_output_are_untouched(capsys: pytest.CaptureFixture[str]) -> None:
    class Draws(styles.Functional):
        def forward(self, x: Tensor) -> Tensor:
            print("drawn", random.random(), torch.rand(1))
            self.drawn = x
            return super().forward(x)

    model = Draws()
    states = random.getstate(), torch.get_rng_state()
    assert fuse_(model).fused_ops == 2
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert not hasattr(model, "drawn")
    assert capsys.readouterr().out == ""


def test_forward_replaced_later_on_the_class() -> None:
    class Later(styles.Functional):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.bn1(self.conv1(x)))

    fused, eager = forwards_of(lambda: nn.Sequential(Later(), Later()))
    with mock.patch.object(Later, "forward", lambda self, x: self.conv1(x) * 3):
        models.assert_same(fused, eager, models.random_input(INPUT))
    models.assert_same(fused, eager, models.random_input(INPUT))
    with mock.patch.object(Later, "forward", lambda self, x: F.relu(self.bn2(self.conv2(x)))):
        models.assert_same(fuse_twin(fused), eager, models.random_input(INPUT))


def fuse_twin(model: nn.Module) -> nn.Module:
    """The same model, fused anew while its class has another forward."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module.__class__ = getattr(type(module), "_resfuse_original", type(module))
    fuse_(twin)
    return twin


@pytest.mark.parametrize("name", ["conv2d", "batch_norm", "relu"])
def test_functions_of_pytorch_replaced(name: str) -> None:
    """As profilers and quantisers do: the modules are called, and call what was put there."""
    fused, eager = forwards_of(lambda: styles.Attribute(act=nn.ReLU()))
    function, calls = getattr(F, name), []

    def replaced(*args: Any, **options: Any) -> Tensor:
        calls.append(name)
        return function(*args, **options) * 2

    with mock.patch.object(F, name, replaced):
        models.assert_same(fused, eager, models.random_input(INPUT))
    assert len(calls) == 2 * 2


def test_forward_of_modules_replaced() -> None:
    fused, eager = forwards_of(styles.Functional)
    forward = nn.Conv2d.forward
    with mock.patch.object(nn.Conv2d, "forward", lambda self, x: forward(self, x) * 2):
        models.assert_same(fused, eager, models.random_input(INPUT))


def test_block_under_vmap() -> None:
    """Tensors have no memory there that could be compared."""
    fused, eager = forwards_of(lambda: styles.Functional(styles.projection()))
    batches = models.random_input((3, *INPUT)).double()
    for model in (fused, eager):
        model.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(fused)(batches), torch.vmap(eager)(batches))


def test_class_that_asks_something_of_its_subclasses() -> None:
    class Registered(styles.Functional):
        def __init_subclass__(cls, *, key: str) -> None:
            raise AssertionError("a subclass was registered")

    assert fuse_(Registered()).fused_ops == 2
