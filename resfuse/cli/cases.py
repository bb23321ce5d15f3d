"""The problems `resfuse verify` runs: ops on shapes of residual networks, compared with eager PyTorch and float64."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import resfuse
from resfuse import contract
from resfuse.backends import dispatch
from resfuse.types import Convolution, Problem

KERNELS = {
    "add_relu": ("add_relu_forward", "add_relu_backward"),
    "bn_act": ("bn_act_forward", "bn_act_backward"),
    "conv_bn_act": ("conv_bn_act_forward", "conv_forward", "bn_act_backward", "conv_backward"),
}
"""The functions of the kernel API that each op needs."""
Tensors = dict[str, Tensor]


class Case(NamedTuple):
    """One op on one shape."""

    op: str
    name: str
    shape: tuple[int, int, int, int]
    activation: str = "relu"
    residual: bool = False
    conv_bias: bool = False
    weight_shape: tuple[int, int, int, int] | None = None
    convolution: Convolution | None = None

    @property
    def output_shape(self) -> torch.Size:
        if self.weight_shape is None or self.convolution is None:
            return torch.Size(self.shape)
        input, weight = (torch.empty(shape, device="meta") for shape in (self.shape, self.weight_shape))
        return F.conv2d(input, weight, None, *self.convolution).shape


def _conv(
    name: str,
    shape: tuple[int, int, int, int],
    channels_out: int,
    kernel_size: int = 1,
    stride: int = 1,
    groups: int = 1,
    **options: Any,
) -> Case:
    padding = kernel_size // 2
    convolution = Convolution((stride, stride), (padding, padding), (1, 1), groups)
    weight_shape = (channels_out, shape[1] // groups, kernel_size, kernel_size)
    return Case("conv_bn_act", name, shape, weight_shape=weight_shape, convolution=convolution, **options)


CASES = (
    Case("add_relu", "stage 1", (2, 256, 28, 28)),
    Case("add_relu", "odd sizes", (3, 17, 5, 7)),
    Case("bn_act", "stem", (2, 64, 56, 56)),
    Case("bn_act", "end of a block", (2, 256, 14, 14), residual=True),
    Case("bn_act", "shortcut", (2, 512, 7, 7), "identity"),
    Case("bn_act", "odd sizes", (3, 17, 5, 7), residual=True),
    _conv("stem 7x7 / 2", (2, 3, 64, 64), 64, kernel_size=7, stride=2),
    _conv("3x3", (2, 64, 28, 28), 64, kernel_size=3),
    _conv("3x3 + residual", (2, 64, 28, 28), 64, kernel_size=3, residual=True),
    _conv("3x3 / 2", (2, 128, 15, 15), 128, kernel_size=3, stride=2),
    _conv("1x1", (2, 256, 14, 14), 64),
    _conv("1x1 + residual", (2, 64, 14, 14), 256, residual=True),
    _conv("1x1 / 2 shortcut", (2, 256, 14, 14), 512, stride=2, activation="identity"),
    _conv("3x3 in 32 groups", (2, 128, 14, 14), 128, kernel_size=3, groups=32),
    _conv("odd sizes, biased", (3, 17, 9, 7), 19, kernel_size=3, residual=True, conv_bias=True),
)


class Run(NamedTuple):
    """A case on one backend, in one dtype, mode and memory format."""

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

    def unsupported_reasons(self) -> list[str]:
        """Why the backend cannot run this; empty if it can."""
        case, backend, reasons = self.case, dispatch.backend(self.backend), []
        for kernel in KERNELS[case.op]:
            if kernel not in backend.KERNELS:
                continue  # dispatch leaves it to `reference`
            if "conv" in kernel:
                weight_shape = torch.Size(case.weight_shape or ())
                problem = Problem(
                    kernel, self.device, self.dtype, torch.Size(case.shape), weight_shape, case.convolution
                )
            else:
                problem = Problem(kernel, self.device, self.dtype, case.output_shape)
            reasons += backend.unsupported_reasons(problem)
        return reasons

    def deviations(self) -> list[contract.Deviation]:
        """Run the backend and hold the output, all gradients and the running statistics against the contract."""
        expected = _expected(self.case, self.device, self.dtype, self.training)
        layout = _channels_last if self.channels_last else torch.Tensor.contiguous
        inputs = {name: layout(tensor) for name, tensor in expected.inputs.items()}
        with resfuse.use_backend(self.backend):
            fused = _evaluate(_fused, self.case, inputs, self.training, layout(expected.grad_output))
        floor = contract.floor_of(self.dtype, self.device, convolution=self.case.op == "conv_bn_act")
        found = []
        for name, exact in expected.exact.items():
            scale = None
            if name == "grad conv_bias" and self.training:
                # Batch statistics cancel a constant, so this gradient is zero but for rounding: it is measured
                # against the terms that cancel.
                scale = torch.linalg.vector_norm(expected.grad_output.double()).item()
            eager = [results[name] for results in expected.eager]
            found.append(contract.measure(name, fused[name], eager, exact, self.dtype, floor=floor, scale=scale))
        return found


def runs(backends: list[str], ops: list[str], dtypes: list[torch.dtype]) -> Iterator[Run]:
    """Every case in every mode and memory format, on the devices of each backend, by device and dtype."""
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    chosen = [case for case in CASES if case.op in ops]
    for device, dtype, case, training in itertools.product(devices, dtypes, chosen, (True, False)):
        if (device.type == "cpu" and dtype == torch.float16) or (case.op == "add_relu" and not training):
            continue  # float16 is for GPUs; add_relu has one mode
        for backend, channels_last in itertools.product(backends, (False, True)):
            if (device.type == "cpu") == (backend == "cpu") or backend == "reference":
                yield Run(case, backend, device, dtype, training, channels_last)


class _Expected(NamedTuple):
    """The inputs of a case, and its results in float64 and by eager PyTorch in both memory formats."""

    inputs: Tensors
    grad_output: Tensor
    exact: Tensors
    eager: list[Tensors]


@functools.lru_cache(maxsize=2)
def _expected(case: Case, device: torch.device, dtype: torch.dtype, training: bool) -> _Expected:
    inputs, grad_output = _inputs(case, device, dtype)
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    if case.activation == "relu":
        preactivation = _evaluate(_eager, case._replace(activation="identity"), wide, training)["output"]
        rounding = contract.rounding_of(dtype, device, convolution=case.op == "conv_bn_act")
        grad_output = grad_output.masked_fill(contract.decided_by_rounding(preactivation, rounding), 0)
    permuted = {name: _channels_last(tensor) for name, tensor in inputs.items()}
    return _Expected(
        inputs,
        grad_output,
        _evaluate(_eager, case, wide, training, grad_output.double()),
        [
            _evaluate(_eager, case, inputs, training, grad_output),
            _evaluate(_eager, case, permuted, training, _channels_last(grad_output)),
        ],
    )


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _inputs(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Tensors, Tensor]:
    """Tensor arguments by name, and grad_output; the same on every device."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype, scale: float = 1) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    inputs = {"input": normal(*case.shape)}
    if case.op == "add_relu" or case.residual:
        inputs["residual"] = normal(*case.output_shape)
    if case.weight_shape is not None:
        inputs["conv_weight"] = normal(*case.weight_shape, scale=(2 / math.prod(case.weight_shape[1:])) ** 0.5)
    channels = case.output_shape[1]
    if case.conv_bias:
        inputs["conv_bias"] = normal(channels)
    if case.op != "add_relu":
        vector = functools.partial(normal, channels, dtype=torch.float32)  # as under autocast
        # Scales of either sign with magnitudes from 0.5 to 1.5: a single huge one would decide every norm.
        inputs["weight"] = (0.5 + vector().abs().clamp(max=1)) * vector().sign()
        inputs["bias"], inputs["running_mean"] = vector(), vector()
        inputs["running_var"] = 0.5 + vector().abs()
    return inputs, normal(*case.output_shape)


def _evaluate(
    function: Callable[..., Tensor], case: Case, inputs: Tensors, training: bool, grad_output: Tensor | None = None
) -> Tensors:
    """Output, running statistics and, if `grad_output` is given, all gradients, by name."""
    tensors = {name: tensor.detach().clone() for name, tensor in inputs.items()}
    options: dict[str, Any] = {}
    if case.op != "add_relu":
        options = {"activation": case.activation, "training": training}
    if case.convolution is not None:
        options |= case.convolution._asdict()
    if grad_output is None:
        return {"output": function(case.op, **tensors, **options)}
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items() if not name.startswith("running")}
    output = function(case.op, **tensors, **options)
    grads = torch.autograd.grad(output, list(leaves.values()), grad_output)
    results = {"output": output.detach()}
    results |= {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return results | {name: tensor for name, tensor in tensors.items() if name.startswith("running")}


def _fused(op: str, **arguments: Any) -> Tensor:
    return getattr(resfuse, op)(**arguments)


def _eager(
    op: str, input: Tensor, residual: Tensor | None = None, activation: str = "relu", **arguments: Any
) -> Tensor:
    """The eager operations that the fused op replaces."""
    output = input
    if op == "conv_bn_act":
        weight, bias = arguments.pop("conv_weight"), arguments.pop("conv_bias", None)
        output = F.conv2d(output, weight, bias, *(arguments.pop(name) for name in Convolution._fields))
    if op != "add_relu":
        output = F.batch_norm(output, **arguments)
    if residual is not None:
        output = output + residual
    return torch.relu(output) if activation == "relu" else output
