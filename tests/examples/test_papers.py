"""examples/papers: each experiment runs from its command line and writes its files; data and measurements are right."""

from __future__ import annotations

import csv
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

pytest.importorskip("rich")
pytest.importorskip("pandas")
from examples.papers import data, training
from examples.papers.__main__ import gradient_norms, main, responses
from resfuse import models as zoo
from tests import models

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("sklearn", "matplotlib"))), reason="needs scikit-learn and matplotlib"
    ),
]

EXPERIMENTS = {
    "degradation": {"plain-8", "plain-14", "resnet-8", "resnet-14"},
    "shortcuts": {"plain-8", "resnet-8 A", "resnet-8 B", "resnet-8 C"},
    "layer_responses": {"plain-8", "resnet-8"},
    "gradient_norms": {"plain-8", "resnet-8"},
    "preactivation": {"post-activation 8", "pre-activation 8"},
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    depths = ("8", "14") if name == "degradation" else ("8",)
    options = f"--epochs 1 --seeds 2 --width 2 --images 128 --device cpu --output {tmp_path} --depths".split()
    main([name, *options, *depths])
    assert f"{name}.csv" in capsys.readouterr().out.replace("\n", "")
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    with (tmp_path / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["network"] for row in rows} == EXPERIMENTS[name]
    assert {row["seed"] for row in rows} == {"0", "1"}
    losses = [float(row["value"]) for row in rows if row["quantity"] == "train_loss"]
    assert len(losses) == len(EXPERIMENTS[name]) * 2
    assert all(0 < loss < 10 for loss in losses)
    assert {row["data"] for row in rows} == {"digits"}
    if name == "layer_responses":
        assert sum(row["quantity"] == "response_std" for row in rows) == 7 * 4
    if name == "gradient_norms":
        assert sum(row["quantity"] == "initial_gradient_norm" for row in rows) == 7 * 4


def test_responses_and_gradient_norms() -> None:
    """The outputs of the batch norms, before the addition and the ReLU, which are in place; every weight's gradient."""
    model = models.seeded(lambda: zoo.cifar_resnet(8, width=4))
    input, labels = models.random_input((4, 3, 16, 16)), torch.arange(4)
    norms = gradient_norms(model, input, labels)
    nn.functional.cross_entropy(model(input), labels).backward()
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert norms == pytest.approx([weight.grad.norm().item() for weight in weights], rel=1e-4)
    found = responses(model.eval(), input)
    block = model.layer1[0]
    with torch.no_grad():
        stem = model.bn1(model.conv1(input))
        second = block.bn2(block.conv2(block.bn1(block.conv1(stem.relu())).relu()))
    assert len(found) == 7
    assert (found[0], found[2]) == pytest.approx((stem.std().item(), second.std().item()), rel=1e-5)
    assert not any(module._forward_hooks for module in model.modules())


def records(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3072), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (count, 1), dtype=torch.uint8, generator=generator)
    return torch.cat([labels, pixels], 1)


def test_cifar10(tmp_path: Path) -> None:
    batches = [records(3, seed) for seed in range(6)]
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for name, batch in zip(names, batches, strict=True):
        (tmp_path / name).write_bytes(bytes(batch.flatten().tolist()))
    images = data.load(tmp_path, torch.device("cpu"))
    assert images.name == "CIFAR-10" and images.augmented and images.channels == 3
    assert images.train_images.shape == (15, 3, 32, 32) and images.test_images.shape == (3, 3, 32, 32)
    assert torch.equal(images.train_labels[3:6], batches[1][:, 0].long())
    torch.testing.assert_close(images.train_images.std((0, 2, 3)), torch.ones(3), rtol=1e-3, atol=0)
    raw = batches[2][1, 1:].view(3, 32, 32)  # red, green, blue, row by row
    red = images.train_images[7, 0]
    assert red.argmax() == raw[0].float().argmax() and red.argmin() == raw[0].float().argmin()
    limited = images.limited(2)
    assert len(limited.train_labels) == len(limited.test_labels) == 2
    (tmp_path / "data_batch_4.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"data_batch_4.bin: expected records of 3073 bytes, got 5 bytes"):
        data.load(tmp_path, torch.device("cpu"))


def test_augmentation() -> None:
    images = torch.arange(1, 65.0).view(1, 1, 8, 8).repeat(64, 1, 1, 1)
    moved = data.shifted_and_mirrored(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    assert len({tuple(image.flatten().tolist()) for image in moved}) > 30
    for image in moved[:, 0]:
        inside = image[image > 0]
        assert len(inside) >= 16 and set(inside.tolist()) <= set(range(1, 65))


def test_a_run_repeats_and_diverged_ones_end() -> None:
    images = data.load(None, torch.device("cpu")).limited(128)
    losses = []
    for _ in range(2):
        run = training.Run("resnet-8", 3, lambda: zoo.cifar_resnet(8, in_channels=1, width=2))
        losses.append([epoch.train_loss for epoch in training.epochs(run, images, 2, 0.1)])
    assert losses[0] == losses[1]

    def broken() -> nn.Module:
        model = zoo.cifar_resnet(8, in_channels=1, width=2)
        nn.init.constant_(model.fc.bias, math.nan)
        return model

    run = training.Run("broken", 0, broken)
    training.train_all([run], images, 3, 0.1, Console(quiet=True))
    assert [math.isnan(epoch.train_loss) for epoch in run.epochs] == [True] * 3
