"""The one interface of everything that is compared."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

Mode = Literal["inference", "train"]
Level = Literal["op", "layer", "block", "model"]
Layout = Literal["nchw", "channels_last"]
Step = Callable[..., Any]
"""What is timed; it takes what `Provider.convert` made of the inputs.

- Inference: step(*inputs) -> output.
- Training a model: step(images, labels) -> loss, with the weights updated.
- Training an op, a layer or a block: step(*inputs, grad_output) -> (output, *gradients), forward and backward: the
  gradients of those inputs that require one, then of all parameters (`steps.differentiated`).
"""

MEMORY_FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def in_layout(model: nn.Module, layout: Layout) -> nn.Module:
    """The model itself, with the weights of its convolutions in that layout."""
    return model.to(memory_format=MEMORY_FORMATS[layout])  # type: ignore[call-overload]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all providers of a comparison have in common.

    In bfloat16 and float16, inference runs with parameters and inputs of that dtype, training under autocast with
    float32 parameters.
    """

    mode: Mode
    dtype: torch.dtype
    device: torch.device
    threads: int
    graph: bool = False
    """Calls are captured in CUDA graphs and replayed; the step itself is the same, but has to allow it: no
    synchronisation, the same addresses at every call."""
    level: Level = "model"

    @property
    def parameter_dtype(self) -> torch.dtype:
        """The dtype of the parameters, and of the images that a model is given."""
        return self.dtype if self.mode == "inference" else torch.float32

    def autocast(self) -> torch.autocast:
        """The context that a training step runs its forward pass in."""
        narrow = self.dtype != self.parameter_dtype
        return torch.autocast(self.device.type, self.dtype if narrow else torch.bfloat16, enabled=narrow)


class UnsuitableError(ValueError):
    """A provider has nothing to offer for a module that it was given; the message, a sentence, says why."""


class Provider(abc.ABC):
    """A way to run a module.

    `prepare` and `convert` are not timed, the step that `prepare` returns is.  Outputs are something that
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
    def prepare(self, module: nn.Module, examples: tuple[Tensor, ...], setting: Setting) -> Step:
        """Take over a module (of the setting's dtype, on its device) and return what is timed.

        In training the parameters stay the same objects, so that their gradients can be looked at.

        Args:
            module: a model, a block, a layer or an operator; never fused or compiled before.
            examples: arguments of its forward, NCHW, as the step will get them apart from `convert`: one for most,
                input and residual for some.  Labels and grad_output are not among them.
            setting: mode, dtype and so on.

        Raises:
            UnsuitableError: the provider could run here, but has nothing to offer for this module.
        """

    def convert(self, tensor: Tensor) -> Any:
        """An input, a residual or a grad_output (N, C, H, W) in the form that the step takes."""
        return tensor.contiguous(memory_format=MEMORY_FORMATS[self.layout])
