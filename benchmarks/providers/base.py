"""The interface of everything that is compared."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import Setting
from benchmarks.steps import Step

MEMORY_FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


class Provider(abc.ABC):
    """A way to run a module.

    `prepare` and `convert` are not timed, the step that `prepare` returns is.
    """

    packages: tuple[str, ...] = ()
    """Distributions, besides torch, whose versions belong to a result."""
    graphs = True
    """False where steps cannot be captured in a CUDA graph, or the provider captures graphs itself."""

    def __init__(self, name: str, layout: str = "nchw") -> None:
        self.name = name
        self.layout = layout

    def unavailable_reason(self, setting: Setting) -> str | None:
        """The reason that this cannot run here in this setting, None where it can."""
        return None

    @abc.abstractmethod
    def prepare(self, module: nn.Module, examples: tuple[Tensor, ...], setting: Setting) -> Step:
        """Take over a module, of the setting's dtype and on its device, and return what is timed.

        In training the parameters stay the same objects, so that their gradients can be checked.

        Args:
            module: a model or an op, never fused or compiled before.
            examples: arguments of its forward, NCHW.
            setting: mode, dtype, device, threads.

        Raises:
            UnsuitableError: the provider could run here, but has nothing to offer for this module.
        """

    def convert(self, tensor: Tensor) -> Any:
        """An input, a residual or a grad_output (N, C, H, W) in the form that the step takes."""
        return tensor.contiguous(memory_format=MEMORY_FORMATS[self.layout])

    def convert_leaf(self, tensor: Tensor) -> Any:
        """The same for any argument of a step; inputs remain leaves that require a gradient."""
        if tensor.dim() != 4:
            return tensor
        converted = self.convert(tensor.detach())
        return converted.requires_grad_() if tensor.requires_grad else converted

    def in_layout(self, module: nn.Module) -> nn.Module:
        """The module itself, its convolution weights in the provider's layout."""
        return module.to(memory_format=MEMORY_FORMATS[self.layout])  # type: ignore[call-overload]


def device_type(setting: Setting) -> str:
    """cpu or cuda."""
    return setting.device.partition(":")[0]
