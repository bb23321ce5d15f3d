"""resfuse: its automatic choice, each backend by itself, and together with torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import resfuse
from benchmarks.providers.base import Layout, Provider, Setting, Step, UnsuitableError, in_layout
from benchmarks.providers.compiled import compile_module, compiler_reason
from benchmarks.providers.steps import make_step
from resfuse.backends import registry
from resfuse.backends.problem import Problem

BACKENDS = tuple(name for name in registry.PREFERENCE if name != "reference")
"""Those with kernels; `reference` is eager PyTorch."""
REFUSAL = "no backend can run"
"""How the registry's error begins where the requested backend does not support a call."""


class Resfuse(Provider):
    """The module after `resfuse.fuse_`: both modes, every level.

    `resfuse` and `resfuse_nchw` let resfuse choose the backend for each call, as users do, and differ in the layout of
    the images: the weights of fused convolutions are channels_last in both, because `fuse_` makes them so.
    `resfuse_<backend>` asks for one backend in every call, and fails, with the reason, where that one can not run some
    call.  `resfuse_compiled` is the fused module under torch.compile's default mode, which fuses what is left around
    resfuse's operators.
    """

    packages = ("resfuse",)

    def __init__(
        self, name: str, layout: Layout = "channels_last", *, backend: str | None = None, compiled: bool = False
    ) -> None:
        """`backend`: one of `BACKENDS`, None for the automatic choice."""
        super().__init__(name, layout)
        self._backend, self._compiled = backend, compiled

    def unavailable_reason(self, setting: Setting) -> str | None:
        reason = None if self._backend is None else backend_reason(self._backend, setting)
        return compiler_reason(setting) if reason is None and self._compiled else reason

    def prepare(self, module: nn.Module, examples: tuple[Tensor, ...], setting: Setting) -> Step:
        module = in_layout(module, self.layout)
        module.train(setting.mode == "train")
        resfuse.fuse_(module)
        step = make_step(compile_module(module) if self._compiled else module, setting)
        return step if self._backend is None else _on_backend(step, self._backend)


def backend_reason(name: str, setting: Setting) -> str | None:
    """Why a backend can run nothing in a setting, by the registry; None where it can run an ordinary convolution."""
    backend = registry.backend(name)
    on_request = getattr(backend, "only_on_request_reason", lambda: None)
    reason = backend.unavailable_reason() or on_request()
    if reason is not None:
        return reason
    pair = (1, 1)
    conv = (torch.Size((64, 64, 3, 3)), pair, pair, pair, 1)
    shape = torch.Size((1, 64, 8, 8))
    problem = Problem("conv_bn_act_forward", setting.device, setting.dtype, shape, conv)
    return "; ".join(backend.unsupported_reasons(problem)) or None


def _on_backend(step: Step, backend: str) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        try:
            with resfuse.use_backend(backend):
                return step(*arguments)
        except RuntimeError as error:
            if not str(error).startswith(REFUSAL):
                raise
            raise UnsuitableError(str(error)) from error

    return run
