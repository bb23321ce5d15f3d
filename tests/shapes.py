"""The shapes, layouts and values that every operator is tested on, and the calls made of them.

One list for all: whoever finds a new odd case adds it here, and every operator, dtype and backend meets it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

from resfuse import types
from resfuse.backends import dispatch, triton
from resfuse.layout import conv_output_shape
from resfuse.types import Problem
from tests.contract import Call, Oracle, Results
from tests.emulator import backend as emulator

Shape4 = tuple[int, int, int, int]
Pair = tuple[int, int]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FAST_DTYPES = (torch.float32, torch.bfloat16)

# Activations (N, C, H, W): input of add_relu and bn_act.
ACTIVATIONS: dict[str, Shape4] = {
    "typical": (2, 16, 8, 8),
    "odd_channels": (3, 17, 5, 7),
    "five_channels": (4, 5, 6, 6),
    "one_channel": (3, 1, 7, 5),
    "one_pixel": (9, 24, 1, 1),
    "one_image": (1, 12, 9, 6),
    "one_column": (2, 9, 11, 1),
    "one_row": (2, 9, 1, 11),
    "two_values": (2, 10, 1, 1),  # per channel: the fewest that training allows
    "many_channels": (2, 520, 3, 3),
    "larger": (3, 48, 29, 31),  # several tiles and threads, none of them full
}


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution: (N, C, H, W) input, number of output channels, and the options."""

    input: Shape4
    channels: int
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @property
    def weight(self) -> Shape4:
        return self.channels, self.input[1] // self.groups, *self.kernel

    @property
    def output(self) -> Shape4:
        return conv_output_shape(torch.Size(self.input), torch.Size(self.weight), self.settings)

    @property
    def settings(self) -> types.Convolution:
        """As the kernels take them."""
        return types.Convolution(self.stride, self.padding, self.dilation, self.groups)

    @property
    def options(self) -> dict[str, Any]:
        """As the operators take them."""
        return self.settings._asdict()


CONVOLUTIONS: dict[str, Convolution] = {
    "1x1": Convolution((2, 24, 7, 7), 32, (1, 1)),
    "1x1_stride2": Convolution((2, 32, 8, 8), 16, (1, 1), (2, 2)),
    "1x1_stride2_odd": Convolution((2, 16, 7, 9), 24, (1, 1), (2, 2)),
    "3x3": Convolution((2, 16, 8, 8), 16, (3, 3), padding=(1, 1)),
    "3x3_stride2_odd": Convolution((2, 16, 9, 7), 24, (3, 3), (2, 2), (1, 1)),
    "3x3_odd_channels": Convolution((3, 7, 6, 6), 11, (3, 3), padding=(1, 1)),
    "3x3_no_padding": Convolution((2, 12, 6, 5), 8, (3, 3)),
    "stem": Convolution((2, 3, 23, 23), 16, (7, 7), (2, 2), (3, 3)),
    "dilated": Convolution((2, 10, 9, 9), 12, (3, 3), padding=(2, 2), dilation=(2, 2)),
    "grouped": Convolution((2, 32, 7, 7), 16, (3, 3), padding=(1, 1), groups=4),
    "depthwise": Convolution((2, 19, 8, 8), 19, (3, 3), (2, 2), (1, 1), groups=19),
    "depthwise_multiplied": Convolution((2, 6, 8, 8), 18, (3, 3), padding=(1, 1), groups=6),
    "asymmetric": Convolution((2, 16, 11, 9), 12, (3, 5), (2, 1), (0, 2)),
    "asymmetric_dilation": Convolution((2, 8, 12, 10), 8, (3, 3), (1, 2), (3, 1), (3, 1)),
    "one_input_channel": Convolution((4, 1, 9, 9), 8, (5, 5), (2, 2), (2, 2)),
    "one_output_channel": Convolution((4, 20, 6, 6), 1, (3, 3), padding=(1, 1)),
    "one_image": Convolution((1, 16, 8, 8), 24, (3, 3), padding=(1, 1)),
    "one_pixel": Convolution((19, 40, 1, 1), 24, (1, 1)),
    "to_one_pixel": Convolution((8, 9, 3, 3), 16, (3, 3)),
    "narrower_than_stride": Convolution((6, 16, 5, 1), 17, (3, 3), (2, 2), (1, 1)),
    "padding_beyond_kernel": Convolution((2, 6, 4, 4), 5, (1, 1), padding=(2, 1)),
    "larger": Convolution((2, 64, 20, 21), 72, (3, 3), padding=(1, 1)),
}


def _misaligned(tensor: Tensor) -> Tensor:
    """The same values one element into a larger allocation: no vector load of it is aligned."""
    room = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return torch.as_strided(room, tensor.shape, tensor.stride(), 1).copy_(tensor)


def _middle(tensor: Tensor, dim: int) -> Tensor:
    """The same values as the middle part, along `dim`, of a larger tensor of the same memory format."""
    wide = torch.cat([tensor.narrow(dim, 0, 1), tensor, tensor.narrow(dim, 0, 1)], dim)
    if not tensor.is_contiguous():
        wide = _nhwc(wide)
    return wide.narrow(dim, 1, tensor.shape[dim])


def _nhwc(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


# How a contiguous (N, C, H, W) tensor is laid out in memory; the values stay.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": Tensor.contiguous,
    "nhwc": _nhwc,
    "nchw_slice_of_channels": lambda tensor: _middle(tensor, 1),
    "nhwc_slice_of_channels": lambda tensor: _middle(_nhwc(tensor), 1),
    "nhwc_slice_of_columns": lambda tensor: _middle(_nhwc(tensor), 3),
    "nchw_slice_of_images": lambda tensor: _middle(tensor, 0),
    "nchw_misaligned": _misaligned,
    "nhwc_misaligned": lambda tensor: _misaligned(_nhwc(tensor)),
    "transposed": lambda tensor: tensor.transpose(2, 3).contiguous().transpose(2, 3),
    "channels_before_images": lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1),
}
BOTH_FORMATS = ("nchw", "nhwc")


class Values:
    """Random tensors from one seed: made in float32 on the CPU, so that all dtypes and devices get the same ones."""

    def __init__(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        tensor = torch.randn(shape, generator=self.generator) * scale + mean
        return tensor.to(self.device, dtype or self.dtype)

    def batch_norm(self, channels: int, dtype: torch.dtype | None = None, *, affine: bool = True) -> dict[str, Any]:
        """Statistics and parameters, in float32 or wider if `dtype` is None.

        Among the weights are negative ones and, of five or more, zeros.
        """
        dtype = dtype or (torch.float64 if self.dtype == torch.float64 else torch.float32)
        mean, var, weight, bias = (self.normal(channels, dtype=dtype) for _ in range(4))
        weight[4::5] = 0
        tensors = {"running_mean": mean, "running_var": var.abs() + 0.5}
        return tensors | ({"weight": weight, "bias": bias} if affine else {})


def add_relu_call(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    layout: str = "nchw",
    residual_layout: str | None = None,
    seed: int = 0,
) -> Call:
    """add_relu on random tensors; `residual_layout` is `layout` if None."""
    values = Values(dtype, device, seed)
    input, residual = values.normal(*shape), values.normal(*shape)
    return Call("add_relu", {"input": LAYOUTS[layout](input), "residual": LAYOUTS[residual_layout or layout](residual)})


def bn_act_call(
    shape: Shape4,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    layout: str = "nchw",
    residual_layout: str | None = "nchw",
    affine: bool = True,
    parameter_dtype: torch.dtype | None = None,
    mean: float = 0.5,
    scale: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> Call:
    """bn_act on random tensors; `residual_layout` None is no residual, `options` go to the operator."""
    values = Values(dtype, device, seed)
    tensors = {"input": LAYOUTS[layout](values.normal(*shape, scale=scale, mean=mean))}
    tensors |= values.batch_norm(shape[1], parameter_dtype, affine=affine)
    if residual_layout is not None:
        tensors["residual"] = LAYOUTS[residual_layout](values.normal(*shape))
    return Call("bn_act", tensors, options)


def conv_bn_act_call(
    conv: Convolution,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    layout: str = "nchw",
    weight_layout: str | None = None,
    residual_layout: str | None = "nchw",
    conv_bias: bool = False,
    affine: bool = True,
    parameter_dtype: torch.dtype | None = None,
    mean: float = 0.0,
    seed: int = 0,
    **options: Any,
) -> Call:
    """conv_bn_act on random tensors, scaled so that the convolution keeps the size of its input."""
    values = Values(dtype, device, seed)
    fan_in = conv.weight[1] * conv.weight[2] * conv.weight[3]
    tensors = {
        "input": LAYOUTS[layout](values.normal(*conv.input, mean=mean)),
        "conv_weight": LAYOUTS[weight_layout or layout](values.normal(*conv.weight, scale=fan_in**-0.5)),
    }
    tensors |= values.batch_norm(conv.channels, parameter_dtype, affine=affine)
    if conv_bias:
        tensors["conv_bias"] = values.normal(conv.channels)
    if residual_layout is not None:
        tensors["residual"] = LAYOUTS[residual_layout](values.normal(*conv.output))
    return Call("conv_bn_act", tensors, {**conv.options, **options})


# Those of this machine, and the CUDA kernels in their emulator; or those that TEST_BACKENDS="cpu cuda_emulator" names.
dispatch.register("cuda_emulator", emulator)
BACKENDS = [
    name
    for name in os.environ.get("TEST_BACKENDS", "cuda triton cpu cuda_emulator reference").split()
    if dispatch.backend(name).unavailable_reason() is None  # which loads the backend's library
]

KERNELS = {
    "add_relu": ("add_relu_forward", "add_relu_backward"),
    "bn_act": ("bn_act_forward", "bn_act_backward"),
    "conv_bn_act": ("conv_bn_act_forward", "conv_forward", "bn_act_backward"),
    "split": ("bn_statistics", "bn_apply", "bn_backward_reduce", "bn_backward_apply"),
}


def devices_of(backend: str) -> list[str]:
    """The devices on which a backend runs here; the reference runs on all."""
    if backend == "reference":
        return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if backend == "triton" and triton.INTERPRETED:
        return ["cpu"]
    return ["cpu" if backend == "cpu" or backend.endswith("_emulator") else "cuda"]


def supports(backend: str, op: str, dtype: torch.dtype, device: str) -> bool:
    """True if a backend runs an operator, forward and backward, on an ordinary problem."""
    conv, module = CONVOLUTIONS["3x3"], dispatch.backend(backend)
    for kernel in KERNELS[op]:
        convolution = (torch.Size(conv.weight), conv.settings) if kernel.startswith("conv") else ()
        problem = Problem(kernel, torch.device(device), dtype, torch.Size(conv.input), *convolution)
        if kernel not in module.KERNELS or module.unsupported_reasons(problem):
            return False
    return True


def running(op: str, dtype: torch.dtype) -> list[tuple[str, str]]:
    """(backend, device) of everything on this machine that runs an operator in a dtype, the reference last."""
    pairs = [(backend, device) for backend in BACKENDS for device in devices_of(backend)]
    pairs = [(backend, device) for backend, device in pairs if supports(backend, op, dtype, device)]
    return sorted(pairs, key=lambda pair: pair[0] == "reference")


def check_all(call: Call, needs_grad: Collection[str] | None = None, *, interpret: bool = True) -> dict[str, Results]:
    """Hold every backend that runs a call against the contract, by one oracle; returns {backend: its results}.

    The reference's forward is eager itself: it takes part where nothing else does (float64), and in test_differential.
    With `interpret` False, Triton's interpreter is left out, which takes a hundred times as long as the others.
    """
    oracle = Oracle(call, needs_grad)
    backends = running(call.op, oracle.dtype)
    if triton.INTERPRETED and not interpret:
        backends = [pair for pair in backends if pair[0] != "triton"]
    if len(backends) > 1:
        backends = [pair for pair in backends if pair[0] != "reference"]
    found = {}
    for backend, device in backends:
        try:
            found[backend] = oracle.check(backend, device)
        except AssertionError as error:
            raise AssertionError(f"{backend} on {device}: {error}") from error
    return found


def one_form_each(
    names: Iterable[str], dtypes: Iterable[torch.dtype], forms: Sequence[tuple[Any, ...]]
) -> list[ParameterSet]:
    """(name, dtype, form) of all; the default tier has one form of each problem, by turns."""
    problems = []
    for i, name in enumerate(names):
        for j, dtype in enumerate(dtypes):
            for k, form in enumerate(forms):
                marks = [] if (i + j + k) % len(forms) == 0 else [pytest.mark.slow]
                problems.append(pytest.param(name, dtype, form, id=f"{name}-{str(dtype)[6:]}-{k}", marks=marks))
    return problems


def partners(layout: str) -> tuple[str, str]:
    """Layouts for a second operand beside the first one's: another, and the same."""
    names = list(LAYOUTS)
    return names[(names.index(layout) + 3) % len(names)], layout


def implementations(op: str, dtypes: Iterable[torch.dtype] = DTYPES) -> list[ParameterSet]:
    """(backend, device, dtype) of everything on this machine that runs an operator."""
    return [
        pytest.param(backend, device, dtype, id="-".join([backend, device, str(dtype)[6:]]))
        for backend in BACKENDS
        for device in devices_of(backend)
        for dtype in dtypes
        if supports(backend, op, dtype, device)
    ]
