"""The shapes, layouts and values that every operator is tested on."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# (N, C, H, W)
ACTIVATIONS: dict[str, tuple[int, int, int, int]] = {
    "plain": (2, 64, 9, 7),
    "one channel": (3, 1, 5, 6),
    "three channels": (2, 3, 8, 8),
    "channels not of 8": (3, 13, 5, 5),
    "channels over 64, not of 16": (2, 70, 33, 31),
    "one pixel": (5, 24, 1, 1),
    "one pixel, odd channels": (4, 7, 1, 1),
    "one image": (1, 32, 6, 6),
    "one row": (1, 16, 1, 9),
    "many channels": (2, 1030, 4, 3),
    "several tiles and chunks": (3, 20, 41, 37),
}


class Convolution(NamedTuple):
    """A convolution's shapes and options."""

    input: tuple[int, int, int, int]
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups")}


CONVOLUTIONS: dict[str, Convolution] = {
    "1x1": Convolution((3, 16, 6, 5), 24, (1, 1)),
    "1x1 stride 2, odd size": Convolution((3, 16, 7, 5), 24, (1, 1), (2, 2)),
    "3x3": Convolution((2, 16, 9, 7), 24, (3, 3), padding=(1, 1)),
    "3x3 stride 2, odd size": Convolution((2, 16, 9, 7), 24, (3, 3), (2, 2), (1, 1)),
    "7x7 stem": Convolution((2, 3, 33, 31), 64, (7, 7), (2, 2), (3, 3)),
    "dilated": Convolution((2, 13, 9, 8), 7, (3, 3), (1, 1), (2, 2), (2, 2)),
    "grouped": Convolution((2, 32, 8, 8), 64, (3, 3), padding=(1, 1), groups=8),
    "depthwise": Convolution((2, 24, 8, 7), 24, (3, 3), padding=(1, 1), groups=24),
    "asymmetric options": Convolution((2, 8, 9, 12), 10, (3, 2), (1, 2), (0, 1), (2, 1)),
    "one channel each": Convolution((3, 1, 6, 6), 1, (3, 3), padding=(1, 1)),
    "one output pixel": Convolution((6, 16, 3, 3), 20, (3, 3)),
    "narrower than the stride": Convolution((6, 16, 6, 1), 8, (3, 3), (2, 3), (1, 1)),
    "one image": Convolution((1, 16, 7, 7), 32, (1, 1)),
}

LAYOUTS = ("nchw", "channels_last", "sliced", "misaligned")


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The values of an (N, C, H, W) tensor in memory of some other order."""
    if layout == "channels_last":
        return tensor.to(memory_format=torch.channels_last)
    if layout == "sliced":  # every other channel of an NHWC tensor, and not its first pixels
        n, c, h, w = tensor.shape
        whole = torch.zeros(n, 2 * c, h + 1, w, dtype=tensor.dtype, device=tensor.device)
        whole = whole.to(memory_format=torch.channels_last)
        view = whole[:, ::2, 1:]
        view.copy_(tensor)
        return view
    if layout == "misaligned":  # dense, but one element behind the allocator's alignment
        flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
        view = flat[1:].view(tensor.shape)
        view.copy_(tensor)
        return view
    return tensor.contiguous()
