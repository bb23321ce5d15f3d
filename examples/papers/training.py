"""Training of the experiments: SGD as in the paper, with a progress bar."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from examples.papers.data import Images, shifted_and_mirrored

BATCH = 64


class Epoch(NamedTuple):
    """The results of an epoch; those of training are means over its batches."""

    train_loss: float
    train_error: float
    test_error: float


@dataclasses.dataclass
class Run:
    """One network, from one seed."""

    network: str
    seed: int
    build: Callable[[], nn.Module]
    model: nn.Module | None = None
    epochs: list[Epoch] = dataclasses.field(default_factory=list)

    def make(self, device: torch.device) -> nn.Module:
        """The network with its initial weights."""
        torch.manual_seed(self.seed)
        self.model = self.build().to(device, memory_format=torch.channels_last)
        return self.model


def epochs(run: Run, images: Images, count: int, learning_rate: float) -> Iterator[Epoch]:
    """Train, yielding after each epoch.

    SGD with momentum 0.9 and weight decay 1e-4; the learning rate rises over the first epoch and is divided by ten
    after a half and three quarters of the epochs (arXiv:1512.03385, section 4.2).
    """
    model = run.make(images.train_images.device)
    steps = max(1, len(images.train_labels) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9, weight_decay=1e-4)

    def factor(step: int) -> float:
        passed = step / (steps * count)
        return min(1.0, (step + 1) / steps) * (1.0 if passed < 0.5 else 0.1 if passed < 0.75 else 0.01)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for index in range(count):
        generator = torch.Generator().manual_seed(1000 * run.seed + index)
        order = torch.randperm(len(images.train_labels), generator=generator)
        model.train()
        losses, errors = [], []
        # A last, smaller batch is left out: its batch statistics would be unlike all others.
        for chosen in order[: steps * BATCH].split(BATCH):
            batch, labels = images.train_images[chosen], images.train_labels[chosen]
            batch = shifted_and_mirrored(batch, generator) if images.augmented else batch
            output = model(batch.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(output, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            errors.append((output.detach().argmax(1) != labels).float().mean())
        train_loss, train_error = (torch.stack(values).mean().item() for values in (losses, errors))
        yield Epoch(train_loss, train_error, test_error(model, images))


@torch.no_grad()
def test_error(model: nn.Module, images: Images) -> float:
    """The fraction of the test images that is misclassified."""
    model.eval()
    wrong = 0
    for batch, labels in zip(images.test_images.split(500), images.test_labels.split(500), strict=True):
        wrong += int((model(batch.contiguous(memory_format=torch.channels_last)).argmax(1) != labels).sum())
    return wrong / len(images.test_labels)


def train_all(runs: Sequence[Run], images: Images, count: int, learning_rate: float, console: Console) -> None:
    """Train every network in turn; one that diverges is stopped, and its remaining epochs are NaN."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  error {task.fields[train]:.1%} train, {task.fields[test]:.1%} test"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, expand=True) as progress:
        for run in runs:
            fields = {"loss": math.nan, "train": math.nan, "test": math.nan}
            task = progress.add_task(f"{run.network}, seed {run.seed}", total=count, **fields)
            for epoch in epochs(run, images, count, learning_rate):
                run.epochs.append(epoch)
                progress.update(task, advance=1, loss=epoch.train_loss, train=epoch.train_error, test=epoch.test_error)
                if not math.isfinite(epoch.train_loss):
                    run.epochs += [epoch] * (count - len(run.epochs))
                    break


def sample(images: Images, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` training images and labels, for measurements."""
    chosen = images.train_images[:count].contiguous(memory_format=torch.channels_last)
    return chosen, images.train_labels[:count]
