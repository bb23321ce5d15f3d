"""The shortcut options A, B and C of the ResNet paper, for blocks that change the shape."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from resfuse.nn import Projection, ZeroPadShortcut

OPTIONS = ("A", "B", "C")


def check_shortcut(option: str) -> None:
    """Raise ValueError for an unknown option."""
    if option not in OPTIONS:
        raise ValueError(f'shortcut: expected "A", "B" or "C", got {option!r}')


def make_shortcut(
    option: str,
    in_channels: int,
    out_channels: int,
    stride: int,
    norm_layer: Callable[..., nn.Module] | None = None,
    projection: Callable[[int, int, int], nn.Module] | None = None,
) -> nn.Module | None:
    """The `downsample` of a block; None is the identity.

    Args:
        option: "A": where the shape changes, the identity with zeros for the additional channels, without parameters.
            "B": there a 1x1 convolution and batch norm.  "C": these in every block.
        in_channels, out_channels, stride: of the block.
        norm_layer: for the batch norm of a projection.
        projection: called with the channels and the stride, in place of `Projection`.

    Source: He et al. 2016 (arXiv:1512.03385), section 3.3, and "Identity vs. projection shortcuts" in section 4.1.
    """
    changes = stride != 1 or in_channels != out_channels
    if option != "C" and not changes:
        return None
    if option == "A":
        return ZeroPadShortcut(in_channels, out_channels, stride)
    if projection is not None:
        return projection(in_channels, out_channels, stride)
    return Projection(in_channels, out_channels, stride, norm_layer)
