"""Eager PyTorch."""

from __future__ import annotations

from torch import Tensor, nn

from benchmarks.providers.base import Provider, Setting, Step, in_layout
from benchmarks.providers.steps import make_step


class Eager(Provider):
    """PyTorch as it is: one operator after the other, the weights in the provider's layout.

    NCHW is how most models are run; channels_last is PyTorch's own advice for convolutional networks, and what cuDNN's
    tensor-core kernels and oneDNN want.  Both modes, every level.  As for all providers that PyTorch runs,
    `torch.backends.cudnn.benchmark` is on and the TF32 switch is whatever it is in the process.
    """

    def prepare(self, module: nn.Module, examples: tuple[Tensor, ...], setting: Setting) -> Step:
        return make_step(in_layout(module, self.layout), setting)
