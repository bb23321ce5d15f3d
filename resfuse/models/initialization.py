"""Initialisation of a network: He initialisation, optionally with every block starting as the identity."""

from __future__ import annotations

from torch import nn


def initialize(model: nn.Module, zero_init_residual: bool = False) -> None:
    """Draw every convolution's weight from N(0, 2 / (out_channels * kernel area)); batch norms start as 1 and 0.

    Args:
        model: the network.
        zero_init_residual: call `zero_init_last` of every block that has one, so that each starts as the identity
            (Goyal et al. 2017, arXiv:1706.02677, section 5.1).

    Source: He et al. 2015 (arXiv:1502.01852), equation 14 (by the backward pass); as torchvision does.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)) and module.weight is not None:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    if zero_init_residual:
        for module in model.modules():
            zero_init_last = getattr(module, "zero_init_last", None)
            if zero_init_last is not None:
                zero_init_last()


def check_sizes(**sizes: int) -> None:
    """Raise ValueError for a number of channels or classes that is not positive."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
