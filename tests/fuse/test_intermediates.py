"""Tensors that somebody looks at inside of a fused model: they are there, and are not overwritten."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter

import resfuse
from resfuse import functional
from tests import models
from tests.models import IMAGE, both, chain_of_blocks


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
        found = {module.name: module.ops for module in report.fused}
        assert found[""] == (ops,)
        with torch.no_grad():
            found, expected = (model(models.random_input(IMAGE)) for model in (fused, eager))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class Keeping(nn.BatchNorm2d):
    """Keeps what it returns."""

    def forward(self, input: Tensor) -> Tensor:
        self.kept = super().forward(input)
        return self.kept


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
    fused, _, _ = both(lambda: torchvision.models.resnet50(num_classes=5))
    function, overwritten = functional.inference, []

    def inference(input: Tensor, calls: Any, residual: Tensor | None, *args: Any) -> Tensor | None:
        output = function(input, calls, residual, *args)
        overwritten.append(None not in (residual, output) and residual.data_ptr() == output.data_ptr())
        return output

    input = models.random_input(IMAGE)
    with mock.patch.object(functional, "inference", inference), torch.no_grad():
        fused.eval()(input)
        cpu = "cpu" in resfuse.available_backends()
        assert sum(overwritten) == (16 if cpu else 0)
        overwritten.clear()
        with torch.enable_grad():
            fused.train()(input)
        fused(input)
    assert sum(overwritten) == 0
