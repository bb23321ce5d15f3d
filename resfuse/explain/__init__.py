"""`explain`: what runs where in a model, what it costs at least, and how far from that it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from resfuse.costs import Device
from resfuse.explain.explanation import Explanation, Layer, Totals

__all__ = ["Explanation", "Layer", "Totals", "explain"]


def explain(
    model: nn.Module,
    *inputs: Tensor | Sequence[int],
    device: str | Device | torch.device | None = None,
    backward: bool | None = None,
    measure: bool = False,
) -> Explanation:
    """Per operator call of a model: shape, backend and why, launches, FLOPs, bytes, roofline time; and the totals."""
    raise NotImplementedError
