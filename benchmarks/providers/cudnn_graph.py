"""cuDNN's graph API by its Python frontend (`nvidia-cudnn-frontend`): conv + bias + add + ReLU as one graph."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.providers.base import Provider, Setting, Step, in_layout
from benchmarks.providers.cudnn_aten import cuda_reason
from benchmarks.providers.cudnn_plans import Execute, Planner
from benchmarks.providers.groups import Group, rewrite
from benchmarks.providers.steps import make_step


class GraphGroup(nn.Module):
    """A group as one execution of a cuDNN graph, whose output is a new tensor."""

    def __init__(self, group: Group, execute: Execute) -> None:
        super().__init__()
        nhwc = torch.channels_last
        self._weight = group.weight.contiguous(memory_format=nhwc)
        self._bias, self._shape, self._execute = group.bias, group.output_shape, execute

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        nhwc = torch.channels_last
        output = torch.empty(self._shape, dtype=input.dtype, device=input.device, memory_format=nhwc)
        tensors = {"x": input.contiguous(memory_format=nhwc), "w": self._weight, "b": self._bias, "y": output}
        if residual is not None:
            tensors["z"] = residual.contiguous(memory_format=nhwc)
        self._execute(tensors)
        return output


class CudnnGraph(Provider):
    """cuDNN's runtime fusion: conv + bias (+ residual) (+ ReLU) as one graph, its plan chosen by cuDNN; inference, GPU.

    Each group that `resfuse.fuse_` finds is one graph with batch norm folded into the weights once; what is left is
    eager PyTorch.  NHWC, for which cuDNN has its tensor-core kernels.  The heuristics (mode A, then the fallback) list
    the plans; of the first ones, as many as `torch.backends.cudnn.benchmark_limit`, the fastest by trial is taken,
    which is what `torch.backends.cudnn.benchmark` does for eager.  float32 follows eager's TF32 switch.  Graphs are
    described, validated and planned for an H200 by the tests; executing one needs a GPU, and no test has done it.
    """

    packages = ("nvidia-cudnn-frontend",)

    def __init__(self, name: str, executor: Callable[[Group], Execute] | None = None) -> None:
        """`executor` stands for what executes graphs in tests."""
        super().__init__(name, "channels_last")
        self._executor = executor

    def unavailable_reason(self, setting: Setting) -> str | None:
        if importlib.util.find_spec("cudnn") is None:
            return "not installed: nvidia-cudnn-frontend"
        return cuda_reason(setting)

    def prepare(self, module: nn.Module, examples: tuple[Tensor, ...], setting: Setting) -> Step:
        inputs = tuple(self.convert(example) for example in examples)
        executor = self._executor or Planner(setting.device)
        rewritten = rewrite(
            in_layout(module.eval(), self.layout), inputs, lambda group: GraphGroup(group, executor(group))
        )
        return make_step(rewritten, setting)
