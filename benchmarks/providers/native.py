"""PyTorch itself: eager, and torch.compile in its modes."""

from __future__ import annotations

import contextlib
import shutil
from typing import cast

import torch
from torch import Tensor, nn

from benchmarks.case import Setting
from benchmarks.providers.base import Provider, device_type
from benchmarks.steps import Step, make_step


class Eager(Provider):
    """PyTorch as it is: one operator after the other, the weights in the provider's layout.

    NCHW is how most models are run; channels_last is PyTorch's own advice for convolutional networks.
    """

    def prepare(self, module: nn.Module, examples: tuple[Tensor, ...], setting: Setting) -> Step:
        return make_step(self.in_layout(module), setting)


class Inductor(Provider):
    """torch.compile with Inductor in one of its modes; channels_last unless the name says nchw.

    `default` fuses what is pointwise, statistics included, around the convolutions of cuDNN or oneDNN.
    `reduce-overhead` adds CUDA graphs, `max-autotune` also measures Triton's templates against cuDNN's kernels: both on
    a GPU only, with graphs of their own.  With freezing, inference only, weights are constants: batch norm is folded
    into them, and on a CPU they are packed for oneDNN.
    """

    def __init__(self, name: str, layout: str = "channels_last", mode: str = "default", freezing: bool = False) -> None:
        super().__init__(name, layout)
        self._mode, self._freezing = mode, freezing
        self.graphs = mode == "default"

    def unavailable_reason(self, setting: Setting) -> str | None:
        if self._freezing and setting.trains:
            return "weights can be frozen for inference only"
        if self._mode == "reduce-overhead" and device_type(setting) != "cuda":
            return "its CUDA graphs need a GPU"
        if self._mode == "max-autotune" and device_type(setting) != "cuda":
            return "on a CPU it tries templates for matrix products only: convolutions are as in the default mode"
        return compiler_reason(setting)

    def prepare(self, module: nn.Module, examples: tuple[Tensor, ...], setting: Setting) -> Step:
        step = make_step(compile_module(self.in_layout(module), self._mode), setting)
        if setting.mode == "inference":
            frozen = torch._inductor.config.patch(freezing=True) if self._freezing else contextlib.nullcontext()
            with frozen:  # read at the first call, which compiles
                step(*(self.convert(example) for example in examples))
        return step


def compiler_reason(setting: Setting) -> str | None:
    """The reason that Inductor cannot compile for a device, None where it can."""
    if device_type(setting) == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "Inductor needs a C++ compiler on PATH"
    return None


def compile_module(module: nn.Module, mode: str = "default") -> nn.Module:
    """`torch.compile(module)` for one shape; forgets what was compiled before.

    torch.compile keeps its code by the forward function, which many modules share: it would use that of another module
    again, compiled without freezing, and after eight recompilations run the function in eager.
    """
    torch.compiler.reset()
    torch._functorch.config.donated_buffer = False  # the mode "backward" runs one graph many times
    return cast(nn.Module, torch.compile(module, mode=mode, dynamic=False))
