"""torch.compile in its modes."""

from __future__ import annotations

import contextlib
import shutil
from contextlib import AbstractContextManager
from typing import Literal, cast

import torch
from torch import Tensor, nn

from benchmarks.providers.base import Layout, Provider, Setting, Step, in_layout
from benchmarks.providers.steps import make_step

CompileMode = Literal["default", "reduce-overhead", "max-autotune"]


class Inductor(Provider):
    """torch.compile with its default backend, Inductor, in one of its modes; channels_last unless the name says nchw.

    `default` fuses what is pointwise, statistics included, around the convolutions of cuDNN or oneDNN.
    `reduce-overhead` adds CUDA graphs: a GPU only, and not where the calls of all providers are replayed from CUDA
    graphs anyway (`Setting.graph`), as it would then be the default mode.  `max-autotune`, GPU only too, also measures
    Triton's templates against cuDNN's kernels and has CUDA graphs of its own, which it leaves off under
    `Setting.graph`.  With freezing, inference only, weights are constants: batch norm is folded into them, and on a CPU
    they are packed for oneDNN; it is the best that torch.compile offers there, as max-autotune with freezing is on a
    GPU.
    """

    def __init__(
        self, name: str, layout: Layout = "channels_last", mode: CompileMode = "default", freezing: bool = False
    ) -> None:
        super().__init__(name, layout)
        self._mode, self._freezing = mode, freezing

    def unavailable_reason(self, setting: Setting) -> str | None:
        if self._freezing and setting.mode != "inference":
            return "weights can be frozen for inference only"
        if self._mode == "reduce-overhead" and setting.device.type != "cuda":
            return "its CUDA graphs need a GPU"
        if self._mode == "max-autotune" and setting.device.type != "cuda":
            return "on a CPU it tries templates for matrix products only: convolutions are as in the default mode"
        if self._mode == "reduce-overhead" and setting.graph:
            return "where all are replayed from CUDA graphs it is torch.compile's default mode"
        return compiler_reason(setting)

    def prepare(self, module: nn.Module, examples: tuple[Tensor, ...], setting: Setting) -> Step:
        compiled = compile_module(in_layout(module, self.layout), self.compile_mode(setting))
        step = make_step(compiled, setting)
        if setting.mode == "inference":
            with self._frozen():  # read while compiling: at the first call
                step(*(self.convert(example) for example in examples))
        return step

    def compile_mode(self, setting: Setting) -> str:
        """The `mode` argument of torch.compile."""
        return "max-autotune-no-cudagraphs" if self._mode == "max-autotune" and setting.graph else self._mode

    def _frozen(self) -> AbstractContextManager[object]:
        return torch._inductor.config.patch(freezing=True) if self._freezing else contextlib.nullcontext()


def compiler_reason(setting: Setting) -> str | None:
    """Why Inductor can not compile for a device; None where it can."""
    if setting.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "Inductor needs a C++ compiler on PATH"
    return None


def compile_module(module: nn.Module, mode: str = "default") -> nn.Module:
    """`torch.compile(module)` without symbolic shapes, each workload having one; forgets what was compiled before.

    torch.compile keeps its code by the forward function, which many modules share: it would use that of another module
    again, compiled without freezing, and after eight recompilations run the function in eager.
    """
    torch.compiler.reset()
    return cast(nn.Module, torch.compile(module, mode=mode, dynamic=False))
