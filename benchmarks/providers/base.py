"""The one interface of everything that is compared."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

Mode = Literal["inference", "train"]
Layout = Literal["nchw", "channels_last"]
Step = Callable[..., Any]
"""Inference: step(input) -> output.  Training: step(input, labels) -> loss, with the weights updated."""

MEMORY_FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def in_layout(model: nn.Module, layout: Layout) -> nn.Module:
    """The model itself, with the weights of its convolutions in that layout."""
    return model.to(memory_format=MEMORY_FORMATS[layout])  # type: ignore[call-overload]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all providers of a comparison have in common.

    In bfloat16, inference runs with parameters and images of that dtype, training under autocast with float32 ones.
    """

    mode: Mode
    dtype: torch.dtype
    device: torch.device
    threads: int

    @property
    def parameter_dtype(self) -> torch.dtype:
        """The dtype of the model and of the images."""
        return self.dtype if self.mode == "inference" else torch.float32

    def autocast(self) -> torch.autocast:
        """The context that a training step runs its forward pass in."""
        narrow = self.dtype != self.parameter_dtype
        return torch.autocast(self.device.type, self.dtype if narrow else torch.bfloat16, enabled=narrow)


class Provider(abc.ABC):
    """A way to run a model.

    `prepare` and `convert` are not timed, the step that `prepare` returns is.  A step's output is something that
    `torch.as_tensor` takes.
    """

    packages: tuple[str, ...] = ()
    """Distributions, besides torch, whose versions belong to a result."""

    def __init__(self, name: str, layout: Layout = "nchw") -> None:
        self.name = name
        self.layout = layout

    def unavailable_reason(self, setting: Setting) -> str | None:
        """Why this can not run here, in this setting; None where it can."""
        return None

    @abc.abstractmethod
    def prepare(self, model: nn.Module, example: Tensor, setting: Setting) -> Step:
        """Take over a model (of the setting's dtype, on its device) and return what is timed.

        In training the parameters stay the same objects, so that their gradients can be looked at.
        """

    def convert(self, input: Tensor) -> Any:
        """A batch of images in the form that the step takes."""
        return input.contiguous(memory_format=MEMORY_FORMATS[self.layout])
