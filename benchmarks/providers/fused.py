"""resfuse: its automatic choice, each backend by itself, and together with torch.compile."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from benchmarks.case import Setting
from benchmarks.providers.base import Provider
from benchmarks.providers.native import compile_module, compiler_reason
from benchmarks.steps import Step, make_step
from benchmarks.worker import UnsuitableError


class Resfuse(Provider):
    """A model after `resfuse.fuse_`, or an op as one call of `resfuse`.

    `resfuse` and `resfuse_nchw` let resfuse choose the backend for each call, as users do; `resfuse_<backend>` requests
    one backend in every call.  `resfuse_compiled` is the fused module under torch.compile's default mode,
    `resfuse_recompute` computes activations again in backward.
    """

    packages = ("resfuse",)

    def __init__(
        self,
        name: str,
        layout: str = "channels_last",
        *,
        backend: str | None = None,
        compiled: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__(name, layout)
        self._backend, self._compiled, self._recompute = backend, compiled, recompute

    def unavailable_reason(self, setting: Setting) -> str | None:
        import resfuse

        if self._backend is not None and self._backend not in resfuse.available_backends():
            return f"the {self._backend} backend is unavailable here: `python -m resfuse info` says why"
        return compiler_reason(setting) if self._compiled else None

    def prepare(self, module: nn.Module, examples: tuple[Tensor, ...], setting: Setting) -> Step:
        fused = fuse(self.in_layout(module).train(setting.trains), self._recompute)
        step = make_step(compile_module(fused) if self._compiled else fused, setting)
        return step if self._backend is None else _on_backend(step, self._backend)


class _FusedOp(nn.Module):
    """An op of `benchmarks` as resfuse's call, with the op's parameters."""

    def __init__(self, op: nn.Module) -> None:
        super().__init__()
        self.op = op

    def forward(self, *inputs: Tensor) -> Tensor:
        output: Tensor = self.op.fused(*inputs)  # type: ignore[operator]
        return output


def fuse(module: nn.Module, recompute: bool = False) -> nn.Module:
    """A model in channels_last fused in place, as the README does, or an op that makes resfuse's call."""
    if hasattr(module, "fused"):
        return _FusedOp(module).train(module.training)
    import torch

    import resfuse

    resfuse.fuse_(module.to(memory_format=torch.channels_last), recompute=recompute)  # type: ignore[call-overload]
    return module


def _on_backend(step: Step, backend: str) -> Step:
    import resfuse

    def run(*arguments: Any) -> Any:
        try:
            with resfuse.use_backend(backend):
                return step(*arguments)
        except RuntimeError as error:
            if "no backend can run" not in str(error):
                raise
            raise UnsuitableError(str(error)) from error

    return run
