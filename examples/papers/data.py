"""The images of the experiments: scikit-learn's digits, or CIFAR-10 from its binary files."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from examples import demo


class Images(NamedTuple):
    """Normalised images (N, C, H, W) and their classes (N,)."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    augmented: bool
    """Shifted and mirrored while training, as the paper does with CIFAR-10 (digits cannot be mirrored)."""

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]

    @property
    def device(self) -> torch.device:
        return self.train_images.device

    def limited(self, count: int | None) -> Images:
        """The first `count` images of each part."""
        parts = [tensor[:count] for tensor in self[1:5]]
        return Images(self.name, *parts, self.augmented)


def load(cifar10: Path | None, device: torch.device) -> Images:
    """1348 + 449 handwritten digits of 16x16 pixels; or CIFAR-10's 50000 + 10000 images of 32x32.

    Args:
        cifar10: None, or the folder of CIFAR-10's binary version with data_batch_1.bin to data_batch_5.bin and
            test_batch.bin (https://www.cs.toronto.edu/~kriz/cifar.html).
        device: of the images.

    Raises:
        FileNotFoundError: a file of CIFAR-10 is missing.
        ValueError: a file has an unexpected size.
    """
    if cifar10 is None:
        return Images("digits", *demo.load_digits(device), augmented=False)
    batches = [_read_batch(cifar10 / f"data_batch_{i}.bin") for i in range(1, 6)]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    test_images, test_labels = _read_batch(cifar10 / "test_batch.bin")
    mean, std = images.mean((0, 2, 3), keepdim=True), images.std((0, 2, 3), keepdim=True)
    parts = ((images - mean) / std, labels, (test_images - mean) / std, test_labels)
    return Images("CIFAR-10", *(part.to(device) for part in parts), augmented=True)


_RECORD = 1 + 3 * 32 * 32  # bytes: the class, then red, green and blue


def _read_batch(path: Path) -> tuple[Tensor, Tensor]:
    raw = bytearray(path.read_bytes())
    if not raw or len(raw) % _RECORD:
        raise ValueError(f"{path}: expected records of {_RECORD} bytes, got {len(raw)} bytes")
    records = torch.frombuffer(raw, dtype=torch.uint8).view(-1, _RECORD)
    return records[:, 1:].reshape(-1, 3, 32, 32).float() / 255, records[:, 0].long()


def shifted_and_mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to four pixels (zero padding) and mirrored with probability one half."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    corners = torch.randint(0, 9, (count, 2), generator=generator).tolist()
    mirrored = torch.rand(count, generator=generator) < 0.5
    moved = torch.stack(
        [padded[i, :, top : top + height, left : left + width] for i, (top, left) in enumerate(corners)]
    )
    return torch.where(mirrored.view(-1, 1, 1, 1).to(images.device), moved.flip(3), moved)
