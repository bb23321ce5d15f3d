"""ZeroPadShortcut: the shortcut without parameters, option A of the ResNet paper."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from resfuse.nn.lazy import evaluated, force, zero_padded


class ZeroPadShortcut(nn.Module):
    """The identity across a change of shape: every `stride`-th pixel, and zeros for the additional channels.

    As the `downsample` of a block of `resfuse.nn` it costs nothing: the block's last call adds `select(input)`, a view,
    to the first channels, and no padded tensor is made.  Called by itself it returns the padded tensor.

    Shapes: input (N, in_channels, H, W), output (N, out_channels, ceil(H / stride), ceil(W / stride)).

    Equivalent to::

        F.pad(input[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, out_channels - in_channels))

    Args:
        in_channels, out_channels: channels of input and output; the additional ones are zeros.
        stride: of the selected pixels, vertically and horizontally.

    Raises:
        ValueError: there are fewer output than input channels, or `stride` is less than 1; when called, if the input
            does not have `in_channels` channels.

    Source: He et al. 2016 (arXiv:1512.03385), section 3.3, option A, and section 4.2.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        if not 1 <= in_channels <= out_channels:
            raise ValueError(f"out_channels: expected at least in_channels, {in_channels}, got {out_channels}")
        if stride < 1:
            raise ValueError(f"stride: expected at least 1, got {stride}")
        self.in_channels, self.out_channels, self.stride = in_channels, out_channels, stride

    @evaluated
    def forward(self, input: Tensor) -> Any:
        selected = self.select(force(input))
        missing = self.out_channels - self.in_channels
        return zero_padded(selected, missing) if missing else selected

    def select(self, input: Tensor) -> Tensor:
        """The part that is not zeros, (N, in_channels, ceil(H / stride), ceil(W / stride)): a view of the input."""
        if isinstance(input, Tensor) and input.shape[1] != self.in_channels:  # torch.fx has no shapes to compare
            raise ValueError(f"input: expected {self.in_channels} channels, got shape {tuple(input.shape)}")
        return input if self.stride == 1 else input[:, :, :: self.stride, :: self.stride]

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"
