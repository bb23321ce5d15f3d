"""The argument packs that travel whole from the public functions to the launchers and bindings."""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import torch
from torch import Tensor

Pair = tuple[int, int]
"""(vertical, horizontal)"""

Setting = int | tuple[int, ...] | list[int]
"""What PyTorch takes for a pair."""


class Convolution(NamedTuple):
    """The settings of a 2-D convolution, checked and normalised: what `F.conv2d` takes after the tensors."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    @classmethod
    def of(cls, stride: Setting, padding: Setting, dilation: Setting, groups: int) -> Convolution:
        """The settings as `F.conv2d` takes them; ValueError if one is out of range."""
        pairs = _pair("stride", stride, 1), _pair("padding", padding, 0), _pair("dilation", dilation, 1)
        return cls(*pairs, operator.index(groups))


class Pooling(NamedTuple):
    """The settings of a 2-D max pooling, normalised: what `F.max_pool2d` takes after the input."""

    kernel_size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    ceil_mode: bool

    def window(self) -> tuple[int, ...]:
        """Kernel size, stride, padding and dilation, each (vertical, horizontal), as bindings take them."""
        return *self.kernel_size, *self.stride, *self.padding, *self.dilation


class BatchNorm(NamedTuple):
    """State and settings of a batch norm, in the order of `F.batch_norm`.  Tensors are (C,) or None."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    momentum: float
    eps: float


InferenceCall = tuple[Tensor, Tensor | None, tuple[Setting, Setting, Setting, int], BatchNorm, bool]
"""A convolution in inference: weight, bias, settings as for `Convolution.of`, batch norm, and if a ReLU follows."""


class AbsentDevice(NamedTuple):
    """A GPU that need not be in this machine, in place of a `torch.device`, to ask what would run on it.

    The backends for GPUs then count as available.
    """

    capability: Pair
    """CUDA compute capability."""
    type: str = "cuda"
    name: str | None = None
    """As `torch.cuda.get_device_name` has it, by which tables of measurements are found."""

    def __str__(self) -> str:
        return f"{self.type} of compute capability {'.'.join(map(str, self.capability))}"


class Problem(NamedTuple):
    """A kernel, and the device, dtype and shapes that decide who can run it.  Hashable: choices are cached by it."""

    kernel: str
    """The function of the kernel API: "bn_act_forward"."""
    device: torch.device | AbsentDevice
    dtype: torch.dtype
    shape: torch.Size
    """Shape of the input."""
    weight_shape: torch.Size | None = None
    """(K, C / groups, R, S) where there is a convolution."""
    convolution: Convolution | None = None
    training: bool = False
    """This and the next two are of a forward convolution with batch norm, for which they decide what is fastest."""
    residual: bool = False
    tf32: bool = False
    """PyTorch's switch, where it has an effect."""

    @property
    def device_name(self) -> str | None:
        """The GPU's name, in this machine or not, where it is known."""
        if isinstance(self.device, AbsentDevice):
            return self.device.name
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None

    @property
    def capability(self) -> Pair:
        """CUDA compute capability of the device, in this machine or not."""
        return self.device.capability if isinstance(self.device, AbsentDevice) else _capability(self.device)


@functools.cache
def _capability(device: torch.device) -> Pair:
    return torch.cuda.get_device_capability(device)


def _pair(name: str, value: Setting, minimum: int) -> Pair:
    parts = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    try:
        pair = tuple(operator.index(part) for part in parts)  # NumPy's integers too
    except TypeError:
        pair = ()
    if len(pair) not in (1, 2) or min(pair) < minimum:
        raise ValueError(f"{name}: expected an int or a pair of ints, each at least {minimum}, got {value!r}")
    return pair[0], pair[-1]
