"""ConvBNAct2d: convolution, batch norm, residual and activation as one module."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from resfuse.nn.bn_act import make_activation
from resfuse.nn.lazy import add_, call, evaluated


class ConvBNAct2d(nn.Module):
    """2-D convolution, batch normalisation, an optional residual, and the activation; see `resfuse.conv_bn_act`.

    Its state is in the children `conv` (`torch.nn.Conv2d`) and `bn` (`torch.nn.BatchNorm2d`); the child `act` has none.
    Hooks, parametrizations or a replaced class on a child are honoured: the children are then called one by one.

    Shapes: input (N, in_channels, H, W); residual and output (N, out_channels, OH, OW); output channels_last if the
    input or the convolution's weight is.

    Equivalent to::

        output = bn(conv(input))
        if residual is not None:
            output += residual
        output = act(output)

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as for
            `torch.nn.Conv2d`, but without a bias by default, which batch statistics would cancel.
        eps, momentum, affine, track_running_stats: as for `torch.nn.BatchNorm2d`.
        activation: "relu" or "identity".
        device, dtype: of the parameters.

    Raises:
        ValueError: `activation` is unknown.  When called, whatever `resfuse.conv_bn_act` raises.

    Source: the documentation of `torch.nn.Conv2d` and `torch.nn.BatchNorm2d`; Ioffe & Szegedy 2015 (arXiv:1502.03167).

    Example:
        >>> layer = ConvBNAct2d(3, 8, kernel_size=3, stride=2, padding=1)
        >>> layer(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats, device, dtype)
        self.act = make_activation(activation)

    @evaluated
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Any:
        modules = self._modules
        output = call(modules["bn"], call(modules["conv"], input))
        return call(modules["act"], output if residual is None else add_(output, residual))
