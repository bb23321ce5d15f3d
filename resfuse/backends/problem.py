"""What a backend is asked: whether it can run a verb on tensors like these."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Problem(NamedTuple):
    """What a backend needs to know to say whether it can run a verb.  Hashable: choices are cached by it."""

    verb: str
    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    conv: tuple[torch.Size, tuple[int, int], tuple[int, int], tuple[int, int], int] | None = None
    """(weight shape, stride, padding, dilation, groups) of a convolution, None for the other verbs."""
