"""One convolution problem on real tensors: run it with a configuration, hold the result against float64, time it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from resfuse.backends.triton import configs
from resfuse.backends.triton.problems import ConvConfig, ConvProblem

EPS, MOMENTUM = 1e-5, 0.1
Measure = Callable[[Callable[[], None]], float]
"""Microseconds that a call takes."""


class Trial:
    """Random operands of a problem, its result in float64, and room for a configuration's result."""

    def __init__(self, problem: ConvProblem, device: torch.device) -> None:
        self.problem = problem
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            tensor = torch.randn(shape, generator=generator, device=device) * scale
            tensor = tensor.to(problem.dtype)
            return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

        p = problem
        self.x = random(p.n, p.c, p.h, p.w)
        self.w = random(p.k, p.group_in, p.r, p.s, scale=(p.group_in * p.taps) ** -0.5)
        self.dz = random(p.n, p.k, p.oh, p.ow)
        self.weight, self.bias, self.running_mean = (random(p.k).float() for _ in range(3))
        self.running_var = random(p.k).float().abs() + 0.5
        self.mean, self.invstd = (torch.empty(p.k, device=device) for _ in range(2))
        self.z = torch.empty_like(self.dz)
        self.result = torch.empty_like({"dgrad": self.x, "wgrad": self.w}.get(p.kind, self.dz))
        self.exact = self._exact()

    @property
    def _geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
        return self.problem.stride, self.problem.padding, self.problem.dilation, self.problem.groups

    def run(self, config: ConvConfig) -> None:
        """Launch the kernels with a configuration; the result is in `self.result`."""
        from resfuse.backends.triton import conv_bn_act, conv_bn_act_train, dgrad, wgrad

        kind = self.problem.kind
        rest = (self.weight, self.bias, None, None, True, *self._geometry)
        with configs.forced(kind, config):
            if kind == "forward":
                conv_bn_act.eval_forward(self.x, self.w, self.running_mean, self.running_var, *rest, EPS, self.result)
            elif kind == "train":
                saved = (self.z, self.result, self.mean, self.invstd)
                conv_bn_act_train.train_forward(self.x, self.w, None, None, *rest, MOMENTUM, EPS, *saved)
            elif kind == "dgrad":
                dgrad.dgrad(self.dz, self.w, *self._geometry, self.result)
            else:
                wgrad.wgrad(self.dz, self.x, *self._geometry, self.result)

    def deviation(self) -> float:
        """The worst element's distance from float64, relative to it or to the root mean square; infinite for NaN."""
        scale = self.exact.abs() + self.exact.square().mean().sqrt()
        worst = ((self.result.double() - self.exact).abs() / scale).max().item()
        return math.inf if math.isnan(worst) else worst

    def tolerance(self) -> float:
        """What rounding explains; a tile that is wrong is orders of magnitude beyond it."""
        if self.problem.dtype == torch.float32:
            return 2.0**-7 if self.problem.precision == "tf32" else 2.0**-12
        return {torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}[self.problem.dtype]

    def attempt(self, config: ConvConfig, measure: Measure) -> float:
        """Microseconds of a configuration.

        Raises:
            ArithmeticError: its result is wrong.
        """
        self.result.fill_(math.nan)
        self.run(config)
        if (deviation := self.deviation()) > self.tolerance():
            raise ArithmeticError(f"{config} is wrong by {deviation:.1e} on {self.problem}")
        return measure(lambda: self.run(config))

    def _exact(self) -> Tensor:
        x, w, dz = (tensor.double() for tensor in (self.x, self.w, self.dz))
        if self.problem.kind in ("dgrad", "wgrad"):
            wanted = [self.problem.kind == "dgrad", self.problem.kind == "wgrad", False]
            stride, padding, dilation, groups = self._geometry
            gradients = torch.ops.aten.convolution_backward(
                dz, x, w, None, stride, padding, dilation, False, (0, 0), groups, wanted
            )
            return gradients[0 if wanted[0] else 1]
        z = F.conv2d(x, w, None, *self._geometry)
        mean, var, weight, bias = (t.double() for t in (self.running_mean, self.running_var, self.weight, self.bias))
        return F.relu(F.batch_norm(z, mean, var, weight, bias, training=self.problem.kind == "train", eps=EPS))


def gpu_time(call: Callable[[], None]) -> float:
    """Median microseconds of a call by CUDA events, warmed up, with a cold L2 cache before every run."""
    from triton.testing import do_bench

    return 1e3 * float(do_bench(call, warmup=10, rep=40, return_mode="median"))
