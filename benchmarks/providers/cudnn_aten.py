"""cuDNN's fused convolutions as PyTorch has them: `torch.cudnn_convolution_relu` and `..._add_relu`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.providers.base import Provider, Setting, Step, in_layout
from benchmarks.providers.groups import Group, rewrite
from benchmarks.providers.steps import make_step

Call = Callable[..., Tensor]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def cuda_reason(setting: Setting, dtypes: tuple[torch.dtype, ...] = DTYPES) -> str | None:
    """Why cuDNN can not fuse for inference here; None where it can."""
    if setting.mode != "inference":
        return "inference only: the batch norm is folded into the weights"
    if setting.device.type != "cuda":
        return "cuDNN needs a GPU"
    if not torch.backends.cudnn.is_available():
        return "torch was built without cuDNN"
    if setting.dtype not in dtypes:
        return f"no {str(setting.dtype).removeprefix('torch.')}"
    return None


class AtenGroup(nn.Module):
    """A group as one call of ATen: conv + bias + ReLU, conv + bias + residual + ReLU, or conv + bias.

    The operators compute `relu(conv2d(input, weight) + alpha * z + bias)`, the first of the two without `z`; they have
    no gradient, and no form without ReLU, so that a projection is an ordinary convolution, whose bias cuDNN or a kernel
    of PyTorch adds.
    """

    def __init__(self, group: Group, conv_relu: Call, conv_add_relu: Call) -> None:
        super().__init__()
        self._weight, self._bias = group.weight, group.bias
        self._geometry = (list(group.stride), list(group.padding), list(group.dilation), group.groups)
        self._relu, self._conv_relu, self._conv_add_relu = group.relu, conv_relu, conv_add_relu

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self._relu:
            output = F.conv2d(input, self._weight, self._bias, *self._geometry)
            return output if residual is None else output.add_(residual)
        if residual is None:
            return self._conv_relu(input, self._weight, self._bias, *self._geometry)
        return self._conv_add_relu(input, self._weight, residual, 1.0, self._bias, *self._geometry)


class AtenCudnn(Provider):
    """cuDNN's fused convolutions, by the two operators with which TorchScript fused frozen models; inference on a GPU.

    Each group that `resfuse.fuse_` finds is one such call with batch norm folded into the weights once; what is left is
    eager PyTorch.  channels_last, for which cuDNN has its tensor-core kernels, and the algorithm by trial
    (`torch.backends.cudnn.benchmark`, on for all providers); float32 follows the same TF32 switch as eager.  The two
    operators need a GPU and have been called by no test; what surrounds them is tested with others in their place.
    """

    def __init__(self, name: str, calls: tuple[Call, Call] | None = None) -> None:
        """`calls` stand for the two operators in tests."""
        super().__init__(name, "channels_last")
        self._calls = calls

    def unavailable_reason(self, setting: Setting) -> str | None:
        return cuda_reason(setting)

    def prepare(self, module: nn.Module, examples: tuple[Tensor, ...], setting: Setting) -> Step:
        inputs = tuple(self.convert(example) for example in examples)
        calls = self._calls or _operators()
        rewritten = rewrite(in_layout(module.eval(), self.layout), inputs, lambda group: AtenGroup(group, *calls))
        return make_step(rewritten, setting)


def _operators() -> tuple[Any, Any]:
    return torch.cudnn_convolution_relu, torch.cudnn_convolution_add_relu
