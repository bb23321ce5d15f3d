"""The demo's first half: a small residual network learns scikit-learn's handwritten digits, eager and fused."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from torch import Tensor, nn

from resfuse.cli.models import versions
from resfuse.cli.timing import synchronize

BATCH = 64


@dataclasses.dataclass(frozen=True)
class Digits:
    """1797 real images of ten digits, (N, 1, 16, 16), a quarter of them held back for the test."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def batches(self) -> int:
        """Whole batches per epoch."""
        return len(self.train_labels) // BATCH


def load(device: torch.device) -> Digits:
    """The images that come with scikit-learn, 8x8 enlarged to 16x16 so that three stages have something to shrink."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1)
    images = F.interpolate(images, size=16, mode="bilinear", align_corners=False)
    images = ((images - images.mean()) / images.std()).to(device)
    labels = torch.from_numpy(data.target).long().to(device)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(device)
    test, train = order[: len(order) // 4], order[len(order) // 4 :]
    return Digits(images[train], labels[train], images[test], labels[test])


def network(blocks: int, widths: Sequence[int] = (16, 32, 64)) -> nn.Sequential:
    """A CIFAR ResNet of 6 blocks + 2 layers (He et al. 2016, section 4.2) out of torchvision's own blocks."""
    from torchvision.models.resnet import BasicBlock

    channels = widths[0]
    layers: list[nn.Module] = [
        nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
    ]  # fmt: skip
    for width in widths:
        for _ in range(blocks):
            shortcut = None
            if channels != width:
                shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride=2, bias=False), nn.BatchNorm2d(width))
            layers.append(BasicBlock(channels, width, stride=1 if shortcut is None else 2, downsample=shortcut))
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


@dataclasses.dataclass
class Training:
    """One network's training, an epoch at a time, and what came of it."""

    name: str
    model: nn.Module
    digits: Digits
    epochs: int
    seconds: float = 0.0
    images: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        steps = self.epochs * self.digits.batches
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=0.2, total_steps=steps)

    def epoch(self, index: int) -> Iterator[float]:
        """Train for one epoch; yields after each batch with the mean loss so far."""
        self.model.train()
        count, device = 0, self.digits.train_labels.device
        total = torch.zeros((), device=device)
        # The order depends on the epoch alone, so that every network sees the same batches.  A last batch of a few
        # images would have batch statistics unlike all others and is left out.
        order = torch.randperm(len(self.digits.train_labels), generator=torch.Generator().manual_seed(index))
        for chosen in order[: self.digits.batches * BATCH].to(device).split(BATCH):
            started = time.perf_counter()
            loss = F.cross_entropy(self.model(self.digits.train_images[chosen]), self.digits.train_labels[chosen])
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            synchronize(device)
            self.seconds += time.perf_counter() - started
            total += loss.detach()
            count += 1
            self.images += len(chosen)
            yield total.item() / count
        self.losses.append(total.item() / count)

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    @torch.no_grad()
    def predictions(self) -> Tensor:
        """The class of every test image."""
        self.model.eval()
        return self.model(self.digits.test_images).argmax(1)

    def accuracy(self) -> float:
        """Part of the test images that are classified correctly."""
        return (self.predictions() == self.digits.test_labels).float().mean().item()


def training_step(device: torch.device, blocks: int) -> Callable[[], None]:
    """What one step of training costs, to be timed: on a network and images of its own."""
    model, images = network(blocks).to(device), torch.rand(BATCH, 1, 16, 16, device=device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(images).square().mean().backward()

    return step


def train(device: torch.device, epochs: int, blocks: int, console: Console) -> list[Training]:
    """Train the same network in all versions, from the same weights on the same batches, in turns."""
    digits = load(device)
    torch.manual_seed(0)
    eager = network(blocks).to(device)
    models, report = versions(eager)
    console.print(report)
    trainings = [Training(name, model, digits, epochs) for name, model in models.items()]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("epoch {task.fields[epoch]:2d}  loss {task.fields[loss]:.4f}  {task.fields[speed]:5.0f} images/s"),
    )
    with Progress(*columns, console=console, expand=True) as progress:
        steps = epochs * digits.batches
        tasks = [progress.add_task(t.name, total=steps, epoch=0, loss=float("nan"), speed=0.0) for t in trainings]
        for epoch in range(epochs):
            for task, training in zip(tasks, trainings, strict=True):
                _run_epoch(training, epoch, progress, task)
    return trainings


def _run_epoch(training: Training, epoch: int, progress: Progress, task: TaskID) -> None:
    for loss in training.epoch(epoch):
        progress.update(task, advance=1, epoch=epoch + 1, loss=loss, speed=training.images_per_second)
