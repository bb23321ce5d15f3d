"""Batch norms as in a trained network, for models that have random weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@torch.no_grad()
def calibrate_(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """Give the batch norms of a model random weights and biases, and the running statistics of these inputs, in place.

    Fresh batch norms (mean 0, variance 1, weight 1, bias 0) would hide a mistake in any of the four.

    Args:
        model: any; it is left in eval mode.
        inputs: what it is called with, once, in training mode.

    Returns:
        The model itself.
    """
    with _cumulative_statistics(model) as norms:
        for norm in norms:
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias, std=0.1)
        model.train()(*inputs)
    return model.eval()


@contextmanager
def _cumulative_statistics(model: nn.Module) -> Iterator[list[nn.BatchNorm2d]]:
    """Running statistics that are the mean over the batches seen, instead of mostly their initial values."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
    try:
        yield norms
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
