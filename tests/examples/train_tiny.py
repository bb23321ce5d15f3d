"""examples/train_imagenet.py with small models, started as a process by test_train_imagenet.py.

With RESFUSE_TEST_KILL=rank:epoch:step the process of that rank kills itself after that step, the first time.
"""

from __future__ import annotations

import os
import signal

from torch import Tensor, nn
from torchvision.models._api import register_model
from torchvision.models.resnet import BasicBlock

from examples import train_imagenet
from tests import models


@register_model()
def tiny_resnet(num_classes: int, weights: None = None, dropout: float = 0.1) -> nn.Module:
    """Its dropout depends on the process's random numbers."""
    stem = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    blocks = [BasicBlock(8, 8), BasicBlock(8, 16, 2, models.projection(8, 16, 2))]
    return nn.Sequential(
        *stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(16, num_classes)
    )


@register_model()
def tiny_resnet_without_dropout(num_classes: int, weights: None = None) -> nn.Module:
    return tiny_resnet(num_classes, dropout=0.0)


class KilledTraining(train_imagenet.Training):
    def step(self, images: Tensor, targets: Tensor) -> Tensor:
        loss = super().step(images, targets)
        moment = f"{self.processes.rank}:{self.epoch}:{self.step_in_epoch}"
        marker = self.options.output / "killed"
        if os.environ.get("RESFUSE_TEST_KILL") == moment and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return loss


if __name__ == "__main__":
    train_imagenet.Training = KilledTraining  # type: ignore[misc]
    train_imagenet.main()
