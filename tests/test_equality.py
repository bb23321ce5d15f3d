"""`python -m resfuse verify --models`: that whole models are compared rightly, and that mistakes are found."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops.misc import FrozenBatchNorm2d

from resfuse import functional, fuse_, use_backend
from resfuse.backends import reference
from resfuse.cli import catalogue, equality, main, signs
from resfuse.cli.catalogue import Entry
from tests import models


def network(norm: Callable[..., nn.Module] = nn.BatchNorm2d) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), norm(8), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout(0.5),
        BasicBlock(8, 8, norm_layer=norm), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


SMALL = Entry("tests", "network", network, catalogue.classify)
QUANTITIES = ["a ReLU's argument", "output", "gradient of the input", "gradients of parameters"]
STATISTICS = ["running_mean", "running_var", "num_batches_tracked"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small models are all there are."""
    frozen = Entry("tests", "frozen", lambda: network(FrozenBatchNorm2d), catalogue.classify)
    monkeypatch.setattr(catalogue, "entries", lambda: iter([SMALL, frozen]))
    monkeypatch.setattr(equality, "IMAGES", (4, 3, 32, 32))


@pytest.mark.usefixtures("small")
def test_every_quantity_is_compared() -> None:
    training, inference = equality.compare(SMALL)
    assert (training.training, inference.training) == (True, False)
    assert [found.quantity for found in training.deviations] == QUANTITIES + STATISTICS
    assert [found.quantity for found in inference.deviations] == QUANTITIES
    assert training.calls == 3
    for comparison in (training, inference):
        assert not comparison.worst.violated
        assert all(found.eager > 0 for found in comparison.deviations if found.quantity in QUANTITIES[1:])


def test_norms_are_calibrated() -> None:
    """What every norm gives out has the mean and the deviation of its bias and weight, in float64 exactly."""
    for norm in (nn.BatchNorm2d, FrozenBatchNorm2d):
        torch.manual_seed(0)
        images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
        model = equality.calibrate(network(norm).double(), catalogue.classify, images)
        assert model[4].p == 0
        outputs: dict[nn.Module, Tensor] = {}
        norms = (model[1], model[5].bn1, model[5].bn2)
        for module in norms:
            assert not module._forward_pre_hooks
            module.register_forward_hook(lambda module, _, output, to=outputs: to.update({module: output.clone()}))
        model(images)
        assert set(outputs) == set(norms)
        for module, output in outputs.items():
            torch.testing.assert_close(output.mean((0, 2, 3)), module.bias.detach())
            torch.testing.assert_close(output.std((0, 2, 3)), module.weight.detach(), rtol=1e-3, atol=0)
            assert 0.5 <= module.weight.min() < module.weight.max() <= 1.5


@pytest.mark.parametrize(
    ("function", "call", "quantity"),
    [
        ("conv_bn_act_forward", 2, "output"),
        ("conv_backward", 1, "gradient of the input"),
        ("conv_backward", 1, "gradients of parameters"),
        ("bn_act_backward", 0, "gradients of parameters"),
    ],
)
@pytest.mark.usefixtures("small")
def test_a_planted_mistake_is_found(function: str, call: int, quantity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One part in a thousand, in one of the three calls of a step."""
    exact = getattr(reference, function)
    calls = iter(range(1000))

    def wrong(*args: Any, **options: Any) -> Any:
        found = exact(*args, **options)
        if next(calls) % 3 == call:
            found[0].mul_(1 + 1e-3)
        return found

    monkeypatch.setattr(reference, function, wrong)
    with use_backend("reference"):
        training, _ = equality.compare(SMALL)
    assert quantity in {found.quantity for found in training.deviations if found.violated}


@pytest.mark.parametrize("mistake", ["lost", "clipped"])
@pytest.mark.usefixtures("small")
def test_a_wrong_relu_is_found(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lets everything pass, and one that lets pass too little: then its signs are what is wrong."""
    exact = functional.conv_bn_act

    def wrong(*args: Any, **options: Any) -> Tensor:
        if mistake == "lost":
            return exact(*args, **{**options, "activation": "identity"})
        output = exact(*args, **options)
        return output * (output < 1)

    monkeypatch.setattr(functional, "conv_bn_act", wrong)
    training, _ = equality.compare(SMALL)
    broken = {found.quantity for found in training.deviations if found.violated}
    assert ("output" if mistake == "lost" else "a ReLU's argument") in broken


@pytest.mark.usefixtures("small")
def test_statistics_that_are_forgotten_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = functional.conv_bn_act

    def forgetful(input: Tensor, weight: Tensor, mean: Tensor, var: Tensor, *args: Any, **options: Any) -> Tensor:
        return exact(input, weight, mean.clone(), var.clone(), *args, **options)

    monkeypatch.setattr(functional, "conv_bn_act", forgetful)
    training, _ = equality.compare(SMALL)
    assert {found.quantity for found in training.deviations if found.violated} == {"running_mean", "running_var"}


def test_signs_are_recorded_alike_fused_and_eager() -> None:
    eager = models.small_resnet().double()
    fused = models.small_resnet().double()
    fuse_(fused)
    input = models.random_input((2, 3, 32, 32)).double()
    found = []
    for model in (fused, eager):
        with signs.recorded() as recorded:
            model(input)
        found.append(recorded)
    assert len(found[0]) == 9
    assert signs.same(*found)
    found[1][3].view(-1)[5] ^= True
    assert not signs.same(*found)
    assert not signs.same(found[0][:-1], found[0])


def test_imposed_signs_decide_and_are_judged() -> None:
    argument = torch.tensor([2.0, -1e-6, 1e-7, -4.0], dtype=torch.float64, requires_grad=True)
    with signs.imposed([torch.tensor([True, True, False, False])]) as flips:
        output = nn.ReLU(inplace=True)(argument)
    output.sum().backward()
    assert output.tolist() == [2.0, -1e-6, 0.0, 0.0]
    assert argument.grad.tolist() == [1, 1, 0, 0]
    assert flips.count == 2
    assert flips.largest == 1e-6 / 4
    with pytest.raises(RuntimeError, match="less often"), signs.imposed([torch.ones(1)]):
        pass
    with pytest.raises(RuntimeError, match="more often"), signs.imposed([]):
        F.relu(argument)


@pytest.mark.usefixtures("small")
def test_table_and_csv(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    path = tmp_path / "results" / "models.csv"
    assert main(["verify", "--models", "--output", str(path)]) == 0
    text = capsys.readouterr().out
    assert "All 2 models keep the contract" in " ".join(text.split())
    assert max(len(line) for line in text.splitlines() if "tests/" in line) <= 100
    assert "tests/network (3)" in text and "tests/frozen (3)" in text
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["model"], row["mode"]) for row in rows} == {
        (model, mode) for model in ("network", "frozen") for mode in ("training", "inference")
    }
    assert all(0 <= float(row["used"]) <= 1 for row in rows)


@pytest.mark.usefixtures("small")
def test_only_what_is_asked_for_and_failures_are_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["verify", "--models", "nothing", "like this"]) == 1
    assert "no listed model has nothing or like this in its name" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(functional, "conv_bn_act", _raising)
    assert main(["verify", "--models", "tests/net"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "tests/network failed: RuntimeError: planted" in text
    assert "frozen" not in text


def _raising(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("planted")


def test_missing_packages_are_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "timm" else find(name))
    assert main(["verify", "--models"]) == 1
    assert "pip install timm" in capsys.readouterr().out


# One of each family that is quickly computed; the command compares them all.
LISTED = ("torchvision/regnet_x_400mf", "torchvision/resnet18_fpn_backbone, frozen BN", "timm/resnetv2_18")


@pytest.mark.slow
@pytest.mark.parametrize("name", LISTED)
def test_listed_model_keeps_the_contract(name: str) -> None:
    (entry,) = (entry for entry in catalogue.entries() if str(entry) == name)
    for comparison in equality.compare(entry):
        assert not comparison.worst.violated, str(comparison.worst)


def test_detectors_are_run_without_thresholds() -> None:
    """Every parameter gets a gradient from the outputs that are compared."""
    import torchvision

    model = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
    output = catalogue.detect_in_regions(model, torch.randn(2, 3, 32, 32))
    assert output.shape[0] == 2
    output.sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
