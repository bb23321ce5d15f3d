"""examples/train_imagenet.py on generated images: it learns, and a killed and resumed run ends with the same bits."""

from __future__ import annotations

import csv
import itertools
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

pytest.importorskip("PIL")
pytest.importorskip("rich")
pytest.importorskip("torchvision")
from PIL import Image

from examples import train_imagenet
from tests import needs
from tests.examples import train_tiny
from tests.needs import ROOT

CLASSES, TRAIN, VAL = 3, 9, 3  # images per class
two_processes = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder of noise in which each class has its colour."""
    folder = tmp_path_factory.mktemp("images")
    numbers = random.Random(0)
    for part, count in (("train", TRAIN), ("val", VAL)):
        for label in range(CLASSES):
            directory = folder / part / f"class{label}"
            directory.mkdir(parents=True)
            for index in range(count):
                pixels = bytearray(numbers.randrange(128) for _ in range(40 * 36 * 3))
                pixels[label::3] = bytes(value + 128 for value in pixels[label::3])
                Image.frombytes("RGB", (40, 36), bytes(pixels)).save(directory / f"{index}.png")
    return folder


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, as in the processes, and no variables of a torchrun around the tests."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def command(data: Path, output: Path, *more: str, batch_size: int = 4) -> list[str]:
    return [
        str(data), f"--output={output}", "--model=tiny_resnet", "--image-size=32", f"--batch-size={batch_size}",
        "--lr=2", "--epochs=2", "--warmup-epochs=0.5", "--ema-decay=0.9", "--workers=0", "--save-every=2", *more,
    ]  # fmt: skip


def process(argv: list[str], *, processes: int = 0, kill: str = "") -> subprocess.CompletedProcess[str]:
    """Run the example in a process of its own, or in several by torchrun, which restarts all when one dies."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        launcher += ["--max-restarts=3", "--monitor-interval=0.1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": needs.python_path(), "RESFUSE_TEST_KILL": kill}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # or a restart may get old addresses
    script = [train_tiny.__file__, *argv]
    return subprocess.run([*launcher, *script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def checkpoint(output: Path) -> dict[str, Any]:
    return torch.load(output / "checkpoint.pt", weights_only=True)


def assert_identical(found: Any, expected: Any, name: str = "") -> None:
    """Equal bit for bit, except the measured "seconds"."""
    found, expected = (tree_flatten_with_path(tree)[0] for tree in (found, expected))
    assert [path for path, _ in found] == [path for path, _ in expected], name
    for (path, one), (_, other) in zip(found, expected, strict=True):
        if "seconds" not in keystr(path):
            same = torch.equal(one, other) if isinstance(other, Tensor) else one == other
            assert same, f"{name}{keystr(path)}"


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an undisturbed run."""
    output, threads = tmp_path_factory.mktemp("uninterrupted"), torch.get_num_threads()
    torch.set_num_threads(1)
    train_imagenet.main(command(data, output))
    torch.set_num_threads(threads)
    return output


def test_learns_and_writes(uninterrupted: Path) -> None:
    with open(uninterrupted / "log.csv", newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[1]["train_loss"] < rows[0]["train_loss"]
    assert rows[1]["top1"] > 0.6  # of three classes
    assert rows[1]["top5"] == 1
    assert rows[1]["lr"] == pytest.approx(0, abs=1e-9)
    assert all(0 < row["ema_loss"] < 5 for row in rows)
    weights, average = (torch.load(uninterrupted / f"{name}.pt", weights_only=True) for name in ("model", "ema"))
    eager = train_tiny.tiny_resnet(CLASSES)
    eager.load_state_dict(average)
    eager.load_state_dict(weights)
    assert not torch.equal(weights["0.weight"], average["0.weight"])
    assert torch.equal(weights["1.running_var"], average["1.running_var"])
    assert not list(uninterrupted.glob("*.partial"))


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """Killed in the second epoch, between two checkpoints, and resumed with another number of workers."""
    killed = process(command(data, tmp_path), kill="0:1:3")
    assert killed.returncode == -signal.SIGKILL
    state = checkpoint(tmp_path)
    assert (state["epoch"], state["step_in_epoch"]) == (1, 2)
    assert not (tmp_path / "model.pt").exists()
    resumed = process(command(data, tmp_path, "--workers=2"), kill="0:1:3")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming epoch 2 after step 2" in resumed.stdout
    assert_identical(checkpoint(tmp_path), checkpoint(uninterrupted))
    for name in ("model", "ema"):
        found, expected = (torch.load(folder / f"{name}.pt", weights_only=True) for folder in (tmp_path, uninterrupted))
        assert_identical(found, expected, name)


@pytest.mark.slow
@two_processes
def test_two_processes_of_which_one_is_killed(data: Path, tmp_path: Path) -> None:
    """torchrun restarts both; they end like two undisturbed ones, and those like one process with both batches.

    The latter because batch statistics are synchronised and random transformations depend on the sample alone.
    """
    options = ("--sync-bn", "--model=tiny_resnet_without_dropout")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run = process(command(data, whole, *options, batch_size=2), processes=2)
    assert run.returncode == 0, run.stderr
    run = process(command(data, killed, *options, batch_size=2), processes=2, kill="1:1:3")
    assert run.returncode == 0, run.stderr
    assert (killed / "killed").exists()
    assert "resuming epoch 2 after step 2" in run.stdout
    assert_identical(checkpoint(killed), checkpoint(whole))
    alone = tmp_path / "alone"
    train_imagenet.main(command(data, alone, "--model=tiny_resnet_without_dropout"))
    found, expected = (torch.load(folder / "model.pt", weights_only=True) for folder in (whole, alone))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(amp: str, data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """It learns about the same; stopped and resumed, exactly the same, the loss scale included."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train_imagenet.main(command(data, whole, f"--amp={amp}"))
    state, plain = checkpoint(whole), checkpoint(uninterrupted)
    assert state["history"][-1]["train_loss"] == pytest.approx(plain["history"][-1]["train_loss"], abs=0.2)
    assert bool(state["scaler"]) is (amp == "fp16")
    if amp == "fp16":
        assert state["scaler"]["scale"] > 0
    step, steps = train_imagenet.Training.step, itertools.count(1)

    def interrupted(*args: Any) -> Tensor:
        if next(steps) > 5:
            raise KeyboardInterrupt
        return step(*args)

    with patch.object(train_imagenet.Training, "step", interrupted), pytest.raises(KeyboardInterrupt):
        train_imagenet.main(command(data, stopped, f"--amp={amp}"))
    assert checkpoint(stopped)["step_in_epoch"] == 4
    train_imagenet.main(command(data, stopped, f"--amp={amp}"))
    assert_identical(checkpoint(stopped), state)


@pytest.mark.slow
def test_without_fusing_it_is_the_same_training(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    train_imagenet.main(command(data, tmp_path, "--no-fuse"))
    found, expected = (torch.load(folder / "model.pt", weights_only=True) for folder in (uninterrupted, tmp_path))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_checkpoint_of_another_run_is_refused(data: Path, uninterrupted: Path) -> None:
    with pytest.raises(SystemExit, match="is of a run with batch_size 4, not 3; choose another --output"):
        train_imagenet.main(command(data, uninterrupted, batch_size=3))


def test_bad_options(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, options, message in (
        (data, ["--model=resnet1"], "--model: expected the name of a model of torchvision, got 'resnet1'"),
        (data, ["--epochs=0"], "--epochs: expected at least 1, got 0"),
        (data, ["--save-every=-1"], "--save-every: expected at least 1, got -1"),
        (data, ["--batch-size=28"], "--batch-size: expected at most 27, the images per process, got 28"),
        (tmp_path, [], f"expected a folder {tmp_path / 'train'}"),
    ):
        with pytest.raises(SystemExit) as raised:
            train_imagenet.main(command(folder, tmp_path, *options))
        assert message in capsys.readouterr().err + str(raised.value)


def test_divergence_stops_the_run(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="the loss is nan in step"):
        train_imagenet.main(command(data, tmp_path, "--lr=1e30"))


def test_learning_rate() -> None:
    rates = [train_imagenet.learning_rate(step, 4, 24) for step in range(25)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[14] == pytest.approx(0.5)
    assert rates[24] == pytest.approx(0, abs=1e-12)
    assert all(one > other for one, other in itertools.pairwise(rates[4:]))
    assert train_imagenet.learning_rate(0, 0, 10) == 1


def test_weight_decay_spares_biases_and_norms() -> None:
    model = train_tiny.tiny_resnet(CLASSES)
    decayed, others = train_imagenet.parameter_groups(model, 0.1)
    assert {parameter.dim() for parameter in decayed["params"]} == {2, 4}
    assert {parameter.dim() for parameter in others["params"]} == {1}
    assert len(decayed["params"]) + len(others["params"]) == len([*model.parameters()])
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0)


class Indices(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(2), index


def test_random_transformations_depend_on_the_sample() -> None:
    state = torch.get_rng_state()
    dataset = train_imagenet.SampleSeeded(Indices(), seed=3)
    sample, label = dataset[1, 5]
    assert label == 5
    assert torch.equal(dataset[1, 5][0], sample)
    other_seed = train_imagenet.SampleSeeded(Indices(), seed=4)
    assert not any(torch.equal(other, sample) for other in (dataset[2, 5][0], dataset[1, 6][0], other_seed[1, 5][0]))
    assert torch.equal(torch.get_rng_state(), state)


def test_sampler_resumes() -> None:
    samplers = [train_imagenet.ResumableSampler(Indices(), 2, rank, seed=1, drop_last=True) for rank in range(2)]
    epochs = []
    for epoch in (0, 1):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        parts = [list(sampler) for sampler in samplers]
        assert all(key[0] == epoch for part in parts for key in part)
        assert len({index for part in parts for _, index in part}) == 10  # each sample once; drop_last leaves one out
        epochs.append(parts)
    assert epochs[0][0] != [(0, index) for _, index in epochs[1][0]]
    samplers[0].start = 3
    assert list(samplers[0]) == epochs[1][0][3:]
    assert len(samplers[0]) == 2


def test_evaluation_counts_every_image_once(data: Path, tmp_path: Path) -> None:
    """Also with unequal parts: those of the processes are disjoint and complete."""
    options = train_imagenet.arguments(command(data, tmp_path))
    parts = []
    for rank in range(2):
        processes = train_imagenet.Processes()
        processes.rank, processes.count = rank, 2
        parts.append(train_imagenet.val_loader(options, processes).dataset.indices)  # type: ignore[attr-defined]
    assert sorted([*parts[0], *parts[1]]) == list(range(CLASSES * VAL))
    assert abs(len(parts[0]) - len(parts[1])) == 1
