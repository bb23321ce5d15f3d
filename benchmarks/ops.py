"""Single operators: what is called, fused and as eager PyTorch would, for the benchmarks of operators."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import resfuse
from benchmarks.providers.base import MEMORY_FORMATS, Layout
from resfuse import contract
from resfuse.cli.cases import Case

MODES = ("inference", "train_forward", "train")
"""Running statistics without gradients; batch statistics with what backward needs saved; and with that backward."""
EPS, MOMENTUM = 1e-5, 0.1
AGREEMENT = {torch.float32: 5e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative difference, by the norm, that rounding may cause: TF32's for float32, and of ReLUs that it switches."""

_conv = functools.partial(Case, "conv_bn_act")


def layers(batch: int) -> tuple[Case, ...]:
    """The kinds of layers that ResNet-50 consists of."""
    return (
        _conv("1x1 reduce", (batch, 256, 56, 56), channels_out=64),
        _conv("3x3", (batch, 64, 56, 56), channels_out=64, kernel=3),
        _conv("1x1 expand + residual", (batch, 64, 56, 56), channels_out=256, residual=True),
        _conv("3x3 stride 2", (batch, 128, 56, 56), channels_out=128, kernel=3, stride=2),
        _conv("3x3 deep", (batch, 512, 7, 7), channels_out=512, kernel=3),
        Case("bn_act", "stage 1", (batch, 64, 56, 56)),
        Case("bn_act", "stage 1 + residual", (batch, 256, 56, 56), residual=True),
        Case("add_relu", "stage 1", (batch, 256, 56, 56)),
        Case("add_relu", "stage 4", (batch, 2048, 7, 7)),
    )


TINY = (
    # Batches for which eager's convolution on the CPU takes oneDNN as large ones do: with one thread 2, and 16 for 1x1.
    _conv("1x1", (16, 32, 2, 2), channels_out=32),
    _conv("3x3", (2, 32, 7, 7), channels_out=32, kernel=3),
    _conv("3x3 + residual", (2, 32, 7, 7), channels_out=32, kernel=3, residual=True),
    Case("bn_act", "", (2, 32, 7, 7)),
    Case("bn_act", "+ residual", (2, 32, 7, 7), residual=True),
    Case("add_relu", "", (2, 32, 7, 7)),
)
"""So small that a call costs what its surroundings cost."""


def title(case: Case) -> str:
    """conv_bn_act 3x3."""
    return f"{case.op} {case.name}".strip()


def eager(op: str, input: Tensor, **arguments: Any) -> Tensor:
    """What `getattr(resfuse, op)` replaces, in place wherever torchvision's blocks are."""
    residual: Any = arguments.get("residual")
    if op == "add_relu":
        return F.relu(input + residual, inplace=True)
    if op == "conv_bn_act":
        input = F.conv2d(input, arguments["conv_weight"], None, arguments["stride"], arguments["padding"])
    mean, var, weight, bias = (arguments[name] for name in ("running_mean", "running_var", "weight", "bias"))
    output = F.batch_norm(input, mean, var, weight, bias, arguments["training"], MOMENTUM, EPS)
    if residual is not None:
        output += residual
    return F.relu(output, inplace=True)


@dataclasses.dataclass(frozen=True)
class OpCall:
    """A call of one operator in one setting, ready to be made any number of times."""

    case: Case
    mode: str
    dtype: torch.dtype
    device: torch.device
    layout: Layout = "channels_last"
    backend: str | None = None
    """The backend that runs the fused operator; None for automatic choice."""

    @contextmanager
    def context(self) -> Iterator[None]:
        """What the calls are made in; entered once for many, so that it costs them nothing."""
        with torch.set_grad_enabled(self.mode != "inference"), resfuse.use_backend(self.backend):
            yield

    def fused(self) -> Callable[[], object]:
        """The call of resfuse's operator."""
        return self._call(getattr(resfuse, self.case.op))

    def eager(self) -> Callable[[], object]:
        """The call of PyTorch's operators that resfuse's replaces."""
        return self._call(functools.partial(eager, self.case.op))

    def _call(self, function: Callable[..., Tensor]) -> Callable[[], object]:
        training = self.mode != "inference"
        tensors = self._tensors()
        call = functools.partial(function, **tensors, **self._options(training))
        if not training:
            return call
        leaves = [tensor for name, tensor in tensors.items() if not name.startswith("running")]
        for leaf in leaves:
            leaf.requires_grad_()
        if self.mode == "train_forward":
            return call
        grad_output = self._images(self.case.output_shape, torch.Generator().manual_seed(1))
        return lambda: torch.autograd.grad(call(), leaves, grad_output)

    def _options(self, training: bool) -> dict[str, Any]:
        options: dict[str, Any] = {} if self.case.op == "add_relu" else {"training": training}
        if self.case.op == "conv_bn_act":
            options |= {"stride": self.case.stride, "padding": self.case.kernel // 2}
        return options

    def _tensors(self) -> dict[str, Tensor]:
        """The same values each time."""
        case, generator = self.case, torch.Generator().manual_seed(0)
        tensors = {"input": self._images(case.shape, generator)}
        if case.op == "conv_bn_act":
            fan_in = case.weight_shape[1] * case.kernel**2
            tensors["conv_weight"] = self._images(case.weight_shape, generator) * fan_in**-0.5
        if case.op == "add_relu" or case.residual:
            tensors["residual"] = self._images(case.output_shape, generator)
        if case.op != "add_relu":
            for name in ("running_mean", "running_var", "weight", "bias"):
                tensors[name] = (torch.rand(case.output_shape[1], generator=generator) + 0.5).to(self.device)
        return tensors

    def _images(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        tensor = torch.randn(shape, generator=generator).to(self.device, self.dtype)
        return tensor.contiguous(memory_format=MEMORY_FORMATS[self.layout])


def check(call: OpCall) -> None:
    """Compare what both sides compute, before they are timed; within the call's context.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    expected, found = _flat(call.eager()()), _flat(call.fused()())
    for quantity, (tensor, reference) in enumerate(zip(found, expected, strict=True)):
        error = contract.relative_error(tensor, reference.detach().double())
        if not error <= AGREEMENT[call.dtype]:
            raise AssertionError(f"{title(call.case)}, {call.mode}: result {quantity} is off by {error:.1e}")


def _flat(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
