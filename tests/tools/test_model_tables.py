"""tools/model_tables.py: docs/models.md is up to date, and comparisons of whole models find mistakes."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("timm")
pytest.importorskip("torchvision")
from torchvision.models.resnet import BasicBlock
from torchvision.ops.misc import Conv2dNormActivation, FrozenBatchNorm2d

from resfuse import functional, fuse_, use_backend
from resfuse.backends import reference
from resfuse.types import BatchNorm
from tests import models
from tools import model_equality, model_tables
from tools.model_equality import compare, imposed
from tools.model_tables import Entry

QUANTITIES = ["a ReLU's argument", "output", "gradient of the input", "gradients of parameters"]
STATISTICS = ["running_mean", "running_var", "num_batches_tracked"]


def network(norm: Callable[..., nn.Module] = nn.BatchNorm2d) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), norm(8), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout(0.5),
        BasicBlock(8, 8, norm_layer=norm), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setattr(model_equality, "IMAGES", (4, 3, 32, 32))


@pytest.fixture
def two_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small models in place of all others."""
    plain = Entry("tests", "network", network, model_tables.flat)
    frozen = Entry("tests", "frozen", lambda: network(FrozenBatchNorm2d), model_tables.flat)
    monkeypatch.setattr(model_tables, "entries", lambda: iter([plain, frozen]))
    monkeypatch.setattr(model_tables, "fused_entries", lambda: iter([plain[:3], frozen[:3]]))
    monkeypatch.setattr(model_tables, "PACKAGES", ("torchvision",))  # not all of them are needed to run the tests


# What is fused


def test_page_lists_every_model() -> None:
    rows = re.findall(r"^\| ([^|]+) \| \d+ of \d+ \|", model_tables.PAGE.read_text(), re.MULTILINE)
    assert {entry.name for entry in model_tables.entries()} - {"resnet50_gn", "resnetv2_50x1_bit"} <= set(rows)


@pytest.mark.slow
def test_page_is_up_to_date() -> None:
    text = model_tables.PAGE.read_text()
    for package in model_tables.PACKAGES:
        pytest.importorskip(package)
    for package in model_tables.PACKAGES:
        if f"{package} {version(package)}" not in text:
            pytest.skip(f"the page was written with another version of {package} than {version(package)}")
    assert model_tables.page() == text, "run python -m tools.model_tables fused"


def test_row_counts_layers_and_gives_reasons() -> None:
    model = nn.Sequential(
        Conv2dNormActivation(3, 4), nn.Conv2d(4, 4, 1), Conv2dNormActivation(4, 4), models.projection(4, 4, 1)
    )
    model[3][1].register_forward_hook(lambda *_: None)
    row = model_tables.row("three of four", model, fuse_(model))
    assert row == "| three of four | 2 of 3 | 2 | none | 2 | BatchNorm2d has hooks |"


@pytest.mark.usefixtures("two_entries")
def test_page_is_written_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "docs" / "page.md"
    assert model_tables.main(["fused", "--output", str(path)]) == 0
    assert "| network | 3 of 3 | 3 | 1 of 1 | 3 | nothing |" in path.read_text()


# The numerical contract


def test_every_quantity_is_compared() -> None:
    training, inference = compare(network, model_tables.flat)
    assert (training.mode, inference.mode) == ("training", "inference")
    assert [found.quantity for found in training.deviations] == QUANTITIES + STATISTICS
    assert [found.quantity for found in inference.deviations] == QUANTITIES
    for comparison in (training, inference):
        assert comparison.calls == 3
        assert not comparison.worst.violated
        assert all(found.eager > 0 for found in comparison.deviations if found.quantity in QUANTITIES[1:])


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_norms_are_calibrated(norm: Callable[..., nn.Module]) -> None:
    """The output of every norm has the mean and deviation of its bias and weight: in float64, exactly."""
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    model = model_equality.calibrate(network(norm).double(), model_tables.flat, images)
    assert model[4].p == 0
    outputs: dict[nn.Module, Tensor] = {}
    norms = (model[1], model[5].bn1, model[5].bn2)
    for module in norms:
        assert not module._forward_pre_hooks
        module.register_forward_hook(lambda module, _, output: outputs.update({module: output.clone()}))
    model(images)
    assert set(outputs) == set(norms)
    for module, output in outputs.items():
        torch.testing.assert_close(output.mean((0, 2, 3)), module.bias.detach())
        torch.testing.assert_close(output.std((0, 2, 3)), module.weight.detach(), rtol=1e-3, atol=0)
        assert 0.5 <= module.weight.min() < module.weight.max() <= 1.5


@pytest.mark.parametrize(
    ("kernel", "call", "quantity"),
    [
        ("conv_bn_act_forward", 2, "output"),
        ("conv_backward", 1, "gradient of the input"),
        ("conv_backward", 1, "gradients of parameters"),
        ("bn_act_backward", 0, "gradients of parameters"),
    ],
)
def test_a_planted_mistake_is_found(kernel: str, call: int, quantity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One part in a thousand, in one of the three calls of a step."""
    exact = getattr(reference, kernel)
    calls = itertools.count()

    def wrong(*args: Any, **options: Any) -> Any:
        found = exact(*args, **options)
        if next(calls) % 3 == call:
            found[0].mul_(1 + 1e-3)
        return found

    monkeypatch.setattr(reference, kernel, wrong)
    with use_backend("reference"):
        assert quantity in violated()


@pytest.mark.parametrize(
    ("mistake", "broken"),
    [
        ("the ReLU is lost", {"output"}),
        ("the ReLU passes too little", {"a ReLU's argument"}),
        ("statistics are forgotten", {"running_mean", "running_var"}),
    ],
)
def test_a_wrong_call_is_found(mistake: str, broken: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    exact = functional.packed_conv_bn_act

    def wrong(input: Tensor, weight: Tensor, bias: Any, settings: Any, bn: BatchNorm, *args: Any) -> Tensor:
        residual, relu, *rest = args
        if mistake == "the ReLU is lost":
            relu = False
        if mistake == "statistics are forgotten":
            bn = bn._replace(running_mean=bn.running_mean.clone(), running_var=bn.running_var.clone())
        output = exact(input, weight, bias, settings, bn, residual, relu, *rest)
        return output * (output < 1) if mistake == "the ReLU passes too little" else output

    monkeypatch.setattr(functional, "packed_conv_bn_act", wrong)
    monkeypatch.setattr(functional, "inference", lambda *_: None)
    assert broken <= violated()


def violated() -> set[str]:
    """Quantities of a training step that break the contract."""
    return {found.quantity for found in next(compare(network, model_tables.flat)).deviations if found.violated}


def test_imposed_signs_decide_and_are_judged() -> None:
    argument = torch.tensor([2.0, -1e-6, 1e-7, -4.0], dtype=torch.float64, requires_grad=True)
    with imposed([torch.tensor([True, True, False, False])]) as flips:
        output = nn.ReLU(inplace=True)(argument)
    output.sum().backward()
    assert output.tolist() == [2.0, -1e-6, 0.0, 0.0]
    assert argument.grad is not None and argument.grad.tolist() == [1, 1, 0, 0]
    assert (flips.count, flips.largest) == (2, 1e-6 / 4)
    with pytest.raises(RuntimeError, match="fewer ReLUs"), imposed([torch.ones(1)]):
        pass
    with pytest.raises(RuntimeError, match="more ReLUs"), imposed([]):
        F.relu(argument)


@pytest.mark.usefixtures("two_entries")
def test_lines_and_csv(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "results" / "models.csv"
    assert model_tables.main(["equality", "--output", str(path)]) == 0
    text = capsys.readouterr().out
    assert "tests/frozen (3 fused calls), inference" in text
    assert "2 models compared in" in text and "All keep the contract." in text
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (model_tables.PAGE.parent / "models-equality.csv").open(newline="") as file:
        assert next(csv.reader(file)) == list(rows[0])
    found = {(row["model"], row["mode"]) for row in rows}
    assert found == {(model, mode) for model in ("network", "frozen") for mode in ("training", "inference")}
    assert all(0 <= float(row["used"]) <= 1 for row in rows)


@pytest.mark.usefixtures("two_entries")
def test_patterns_and_failures(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_tables.main(["equality", "nothing", "like this"]) == 1
    assert "no model has nothing or like this in its name" in capsys.readouterr().out

    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("planted")

    monkeypatch.setattr(functional, "packed_conv_bn_act", broken)
    monkeypatch.setattr(functional, "inference", broken)
    assert model_tables.main(["equality", "tests/net"]) == 1
    text = capsys.readouterr().out
    assert "tests/network failed: RuntimeError: planted" in text and "frozen" not in text


# One of each kind that is quickly computed; the command compares all.
QUICK = ("torchvision/regnet_x_400mf", "torchvision/resnet18_fpn_backbone, frozen BN", "timm/resnetv2_18")


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_listed_model_keeps_the_contract(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_equality, "IMAGES", (4, 3, 64, 64))
    (entry,) = (entry for entry in model_tables.entries() if str(entry) == name)
    for comparison in compare(entry.build, entry.evaluate):
        assert not comparison.worst.violated, str(comparison.worst)


@pytest.mark.slow
def test_detectors_are_run_without_thresholds() -> None:
    """Every parameter gets a gradient from the outputs that are compared."""
    import torchvision

    model = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
    output = model_tables.detect_in_regions(model, torch.randn(2, 3, 32, 32))
    assert output.shape[0] == 2
    output.sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
