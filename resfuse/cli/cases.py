"""What `verify` compares: the operators on shapes of real residual networks, fused, eager and in float64."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import resfuse
from resfuse import contract
from resfuse.backends import dispatch as registry
from resfuse.types import Problem
from resfuse.layout import conv_output_shape

VERBS = {
    "add_relu": ("add_relu_forward", "add_relu_backward"),
    "bn_act": ("bn_act_forward", "bn_act_backward"),
    "conv_bn_act": ("conv_bn_act_forward", "conv_forward", "bn_act_backward", "conv_backward"),
}
MOMENTUM, EPS = 0.1, 1e-5
Tensors = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """One operator on one shape; the convolution's fields are used by `conv_bn_act` alone."""

    op: str
    name: str
    shape: tuple[int, int, int, int]
    activation: str = "relu"
    residual: bool = False
    channels_out: int = 0
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    conv_bias: bool = False

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.channels_out, self.shape[1] // self.groups, self.kernel, self.kernel

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        if self.op != "conv_bn_act":
            return self.shape
        padding = self.kernel // 2
        return conv_output_shape(
            torch.Size(self.shape), torch.Size(self.weight_shape), (self.stride,) * 2, (padding,) * 2, (1, 1)
        )


_conv = functools.partial(Case, "conv_bn_act")
CASES = (
    Case("add_relu", "stage 1", (2, 256, 28, 28)),
    Case("add_relu", "odd sizes", (3, 17, 5, 7)),
    Case("bn_act", "stem", (2, 64, 56, 56)),
    Case("bn_act", "end of a block", (2, 256, 14, 14), residual=True),
    Case("bn_act", "shortcut", (2, 512, 7, 7), "identity"),
    Case("bn_act", "odd sizes", (3, 17, 5, 7), residual=True),
    _conv("stem 7x7 / 2", (2, 3, 64, 64), channels_out=64, kernel=7, stride=2),
    _conv("3x3", (2, 64, 28, 28), channels_out=64, kernel=3),
    _conv("3x3 + residual", (2, 64, 28, 28), channels_out=64, kernel=3, residual=True),
    _conv("3x3 / 2", (2, 128, 15, 15), channels_out=128, kernel=3, stride=2),
    _conv("1x1", (2, 256, 14, 14), channels_out=64),
    _conv("1x1 + residual", (2, 64, 14, 14), channels_out=256, residual=True),
    _conv("1x1 / 2 shortcut", (2, 256, 14, 14), "identity", channels_out=512, stride=2),
    _conv("3x3 in 32 groups", (2, 128, 14, 14), channels_out=128, kernel=3, groups=32),
    _conv("odd sizes, biased", (3, 17, 9, 7), channels_out=19, kernel=3, residual=True, conv_bias=True),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A case on one backend, with everything that can be varied about it."""

    case: Case
    backend: str
    device: torch.device
    dtype: torch.dtype
    training: bool
    channels_last: bool

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "NCHW"
        mode = "training" if self.training else "inference"
        return f"{self.case.op}, {self.case.name} {self.case.shape}, {mode}, {layout}"

    def reasons_against(self) -> list[str]:
        """Why the backend can not run this; empty where it can."""
        case, conv = self.case, None
        if case.op == "conv_bn_act":
            padding = case.kernel // 2
            conv = (torch.Size(case.weight_shape), (case.stride,) * 2, (padding,) * 2, (1, 1), case.groups)
        reasons = []
        for verb in VERBS[case.op]:
            conv_of_verb = conv if "conv" in verb else None
            problem = Problem(verb, self.device, self.dtype, torch.Size(case.shape), conv_of_verb)
            reasons += registry.backend(self.backend).unsupported_reasons(problem)
        return reasons

    def deviations(self) -> list[contract.Deviation]:
        """Run the backend and hold every quantity against the contract."""
        expected = _expect(self.case, self.device, self.dtype, self.training)
        inputs = {name: self._in_layout(tensor) for name, tensor in expected.inputs.items()}
        with resfuse.use_backend(self.backend):
            fused = _evaluate(_fused, self.case, inputs, self.training, self._in_layout(expected.grad_output))
        floor = contract.floor_of(self.dtype, self.device, convolution=self.case.op == "conv_bn_act")
        return [
            contract.measure(
                name,
                fused[name],
                [eager[name] for eager in expected.eager],
                expected.exact[name],
                self.dtype,
                floor=floor,
                scale=expected.scales.get(name),
            )
            for name in expected.exact
        ]

    def _in_layout(self, tensor: Tensor) -> Tensor:
        return _channels_last(tensor) if self.channels_last else tensor


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a run is compared with: results in float64, and of eager PyTorch in both memory formats."""

    inputs: Tensors
    grad_output: Tensor
    exact: Tensors
    eager: list[Tensors]
    scales: dict[str, float]


@functools.lru_cache(maxsize=2)
def _expect(case: Case, device: torch.device, dtype: torch.dtype, training: bool) -> Expected:
    inputs = _make_inputs(case, device, dtype)
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    grad_output = _normal(case.output_shape, device, dtype, seed=1)
    if case.activation == "relu":
        preactivation = _evaluate(_eager, dataclasses.replace(case, activation="identity"), wide, training)["output"]
        rounding = contract.rounding_of(dtype, device, convolution=case.op == "conv_bn_act")
        grad_output = grad_output.masked_fill(contract.decided_by_rounding(preactivation, rounding), 0)
    permuted = {name: _channels_last(tensor) for name, tensor in inputs.items()}
    scales = {}
    if training and case.conv_bias:
        # Batch statistics take any constant out again, so this gradient is zero: what counts is how large the terms
        # are that cancel.
        scales["grad conv_bias"] = torch.linalg.vector_norm(grad_output.double()).item()
    return Expected(
        inputs,
        grad_output,
        _evaluate(_eager, case, wide, training, grad_output.double()),
        [
            _evaluate(_eager, case, inputs, training, grad_output),
            _evaluate(_eager, case, permuted, training, _channels_last(grad_output)),
        ],
        scales,
    )


def runs(backends: list[str], ops: list[str], dtypes: list[torch.dtype]) -> Iterator[Run]:
    """Every case in every mode and layout, on the devices of each backend; equal expectations follow one another."""
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    chosen = [case for case in CASES if case.op in ops]
    for device, dtype, case, training in itertools.product(devices, dtypes, chosen, (True, False)):
        if (device.type == "cpu" and dtype == torch.float16) or (case.op == "add_relu" and not training):
            continue  # float16 is a GPU's dtype; add_relu has one mode
        for backend, channels_last in itertools.product(backends, (False, True)):
            if (device.type == "cpu") == (backend == "cpu") or backend == "reference":
                yield Run(case, backend, device, dtype, training, channels_last)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _normal(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    """Normally distributed values, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _make_inputs(case: Case, device: torch.device, dtype: torch.dtype) -> Tensors:
    """Arguments by name.  Those of batch norm are in float32, as under autocast."""
    channels = case.output_shape[1]
    inputs = {"input": _normal(case.shape, device, dtype, seed=2)}
    if case.op == "add_relu" or case.residual:
        inputs["residual"] = _normal(case.output_shape, device, dtype, seed=3)
    if case.op == "conv_bn_act":
        fan_in = case.weight_shape[1] * case.kernel**2
        inputs["conv_weight"] = _normal(case.weight_shape, device, dtype, seed=4) * (2 / fan_in) ** 0.5
    if case.conv_bias:
        inputs["conv_bias"] = _normal((channels,), device, dtype, seed=5)
    if case.op != "add_relu":
        normal = functools.partial(_normal, (channels,), device, torch.float32)
        # Scales between 0.5 and 1.5 of either sign: one channel with a huge one would decide every norm.
        inputs["weight"] = (0.5 + normal(seed=6).abs().clamp(max=1)) * normal(seed=7).sign()
        inputs["bias"], inputs["running_mean"] = normal(seed=8), normal(seed=9)
        inputs["running_var"] = 0.5 + normal(seed=10).abs()
    return inputs


def _evaluate(
    function: Callable[..., Tensor],
    case: Case,
    inputs: Tensors,
    training: bool,
    grad_output: Tensor | None = None,
) -> Tensors:
    """Output, running statistics and, where `grad_output` is given, all gradients, by name."""
    tensors = {name: tensor.detach().clone() for name, tensor in inputs.items()}
    leaves = {name: tensor for name, tensor in tensors.items() if not name.startswith("running")}
    options: dict[str, Any] = {}
    if case.op != "add_relu":
        options = {"activation": case.activation, "training": training, "momentum": MOMENTUM, "eps": EPS}
    if case.op == "conv_bn_act":
        options |= {"stride": case.stride, "padding": case.kernel // 2, "groups": case.groups}
    if grad_output is None:
        return {"output": function(case.op, **tensors, **options)}
    for leaf in leaves.values():
        leaf.requires_grad_()
    output = function(case.op, **tensors, **options)
    grads = torch.autograd.grad(output, list(leaves.values()), grad_output)
    results = {"output": output.detach()}
    results |= {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return results | {name: tensor for name, tensor in tensors.items() if name.startswith("running")}


def _fused(op: str, **arguments: Any) -> Tensor:
    return getattr(resfuse, op)(**arguments)


def _eager(
    op: str,
    input: Tensor,
    residual: Tensor | None = None,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    activation: str = "relu",
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    **batch_norm: Any,
) -> Tensor:
    """The PyTorch operations that the fused ones stand for, as a model would call them."""
    output = input
    if conv_weight is not None:
        output = F.conv2d(output, conv_weight, conv_bias, stride, padding, 1, groups)
    if op != "add_relu":
        output = F.batch_norm(output, **batch_norm)
    if residual is not None:
        output = output + residual
    return torch.relu(output) if activation == "relu" else output
