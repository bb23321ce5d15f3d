"""The cuda backend: problems it refuses, checks of its bindings, launches of its elementwise and batch norm kernels.

Its numbers are tested with those of every other backend.  Kernels run in the emulator, and on a GPU where there is one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import resfuse
from resfuse import _build
from resfuse.backends import cuda
from resfuse.types import BatchNorm, Convolution, Problem
from tests import contract, shapes
from tests.emulator import backend as emulator
from tests.shapes import LAYOUTS, Values, bn_act_call

DEVICES = [
    *(["cpu"] if emulator.unavailable_reason() is None else []),
    *(["cuda"] if cuda.unavailable_reason() is None else []),
]
DEVICE = pytest.mark.parametrize("device", DEVICES)
EMULATED = pytest.mark.skipif("cpu" not in DEVICES, reason=str(emulator.unavailable_reason()))
DTYPE = pytest.mark.parametrize("dtype", cuda.DTYPES, ids=lambda dtype: str(dtype)[6:])
LAYOUT = pytest.mark.parametrize("layout", shapes.BOTH_FORMATS)
IGNORES = pytest.mark.usefixtures("poisoned_memory", "one_thread")
Shape4 = tuple[int, int, int, int]

VECTORS, SCALARS = (3, 48, 14, 12), (3, 17, 5, 7)  # read 16 bytes at a time, and element by element


def problem(
    kernel: str = "add_relu_forward",
    device: str = "cuda",
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (2, 3, 4, 5),
) -> Problem:
    convolution = ()
    if kernel.startswith("conv"):
        convolution = torch.Size((7, shape[1], 1, 1)), Convolution((1, 1), (0, 0), (1, 1), 1)
    return Problem(kernel, torch.device(device), dtype, torch.Size(shape), *convolution)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resfuse.types, "_capability", lambda device: (9, 0))


@DTYPE
@pytest.mark.parametrize("kernel", cuda.KERNELS)
@pytest.mark.usefixtures("hopper")
def test_declared_kernels_are_supported(kernel: str, dtype: torch.dtype) -> None:
    assert cuda.unsupported_reasons(problem(kernel, dtype=dtype)) == []


@pytest.mark.usefixtures("hopper")
def test_each_obstacle_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = cuda.unsupported_reasons(problem("add_relu_forward", "cpu", torch.float64))
    assert len(reasons) == 2
    assert "not torch.float64" in reasons[0]
    assert "not on cpu" in reasons[1]
    monkeypatch.setattr(resfuse.types, "_capability", lambda device: (7, 5))
    assert cuda.unsupported_reasons(problem()) == ["cuda needs compute capability 8.0 or newer, not 7.5"]


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((2, 0, 4, 5), "empty tensor"),
        ((2, 3, 4), r"\(N, C, H, W\) tensors, not shape \(2, 3, 4\)"),
        ((1, 2, 2**15, 2**15), "up to 1073741823 channels and pixels"),
        ((1, 2**30, 1, 1), "up to 1073741823 channels and pixels"),
    ],
)
def test_shapes_that_batch_norm_has_no_kernel_for(shape: tuple[int, ...], reason: str) -> None:
    for kernel in cuda.BATCH_NORM_KERNELS:
        (found,) = cuda.unsupported_reasons(problem(kernel, shape=shape))
        assert re.search(reason, found)


def test_no_gpu_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no CUDA GPU" in (cuda.unavailable_reason() or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda._extension, "load", lambda name: f"{name}: not built")
    assert cuda.unavailable_reason() == "_cuda: not built"


class Operands:
    """Arguments of bn_act, in one layout."""

    def __init__(self, shape: Shape4, dtype: torch.dtype, device: str, layout: str) -> None:
        call = bn_act_call(shape, dtype, device, layout=layout, residual_layout=layout)
        self.tensors: dict[str, Any] = dict(call.tensors)
        self.grad_output = LAYOUTS[layout](Values(dtype, device, 1).normal(*shape))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def forward(self, training: bool) -> tuple[Tensor | None, ...]:
        """Output, mean, invstd, running_mean and running_var after the call."""
        running = self["running_mean"].clone(), self["running_var"].clone()
        bn = BatchNorm(*running, self["weight"], self["bias"], training, 0.1, 1e-5)
        return *cuda.bn_act_forward(self["input"], bn, self["residual"], True), *running

    def backward(self, training: bool) -> tuple[Tensor | None, ...]:
        """grad_input, grad_weight, grad_bias and grad_residual."""
        mean, invstd = self["running_mean"], (self["running_var"] + 1e-5).rsqrt()
        return cuda.bn_act_backward(
            self.grad_output, self["input"], self["residual"], self["weight"], mean, invstd, training, True, True
        )

    def kernels(self) -> dict[str, Callable[[], Any]]:
        """A call of every kernel but the convolutions, by name."""
        x, dy, y, mean, invstd, weight, bias = (
            self["input"], self.grad_output, self["residual"], self["running_mean"], self["running_var"],
            self["weight"], self["bias"],
        )  # fmt: skip
        return {
            "add_relu_forward": lambda: cuda.add_relu_forward(x, y),
            "add_relu_backward": lambda: cuda.add_relu_backward(dy, y),
            "bn_act_forward train": lambda: self.forward(True),
            "bn_act_forward eval": lambda: self.forward(False),
            "bn_act_backward train": lambda: self.backward(True),
            "bn_act_backward eval": lambda: self.backward(False),
            "bn_statistics": lambda: cuda.bn_statistics(x),
            "bn_apply": lambda: cuda.bn_apply(x, mean, invstd, weight, bias, y, True),
            "bn_backward_reduce": lambda: cuda.bn_backward_reduce(dy, x, y, mean, invstd),
            "bn_backward_apply": lambda: cuda.bn_backward_apply(dy, x, y, weight, mean, invstd, mean, bias, 99),
        }


TWO_PASSES = ("bn_act_forward train", "bn_act_backward train", "bn_act_backward eval", "bn_statistics",
              "bn_backward_reduce")  # fmt: skip


@pytest.fixture
def resident(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], AbstractContextManager[None]]:
    """Run inside on a device that holds so many blocks at once; a GPU stays what it is."""

    def enter(blocks: int) -> AbstractContextManager[None]:
        monkeypatch.setattr(cuda, "_workspace_sizes", {})
        return emulator.device(resident_blocks=blocks) if "cpu" in DEVICES else nullcontext()

    return enter


@EMULATED
@LAYOUT
@pytest.mark.parametrize("shape", [VECTORS, SCALARS, (2, 520, 3, 3)])
def test_every_kernel_is_one_launch(shape: Shape4, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Operands(shape, torch.float32, "cpu", layout).kernels()
    for name, call in kernels.items():
        with emulator.launches() as counted:
            call()
        assert counted.launches == 1, name
    monkeypatch.setattr(cuda, "_launches", 2)
    for name, call in kernels.items():
        with emulator.launches() as counted:
            call()
        assert counted.launches == (2 if name in TWO_PASSES else 1), name


@EMULATED
def test_the_grid_fills_the_device(resident: Callable[[int], AbstractContextManager[None]]) -> None:
    """As many blocks as are resident at once, where there is work for them, and never more than share a channel."""
    operands = Operands((4, 24, 13, 11), torch.float32, "cpu", "nhwc")
    for blocks in (1, 3, 6):
        with resident(blocks), emulator.launches() as counted:
            operands.forward(True)
        assert counted.blocks == blocks
    with resident(2), emulator.launches() as counted:  # more tiles of channels than resident blocks: they need not wait
        Operands((2, 200, 2, 2), torch.float32, "cpu", "nhwc").forward(True)
    assert counted.blocks == 4


@DEVICE
@DTYPE
@LAYOUT
@pytest.mark.parametrize(
    ("shape", "blocks"),
    [
        (VECTORS, 1),
        (VECTORS, 3),
        (SCALARS, 1),
        (SCALARS, 4),
        ((9, 24, 1, 1), 4),
        pytest.param((2, 64, 56, 56), 4, marks=pytest.mark.slow),
    ],
)
@IGNORES
def test_one_launch_and_two_give_the_same_bits(
    shape: Shape4,
    blocks: int,
    layout: str,
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    resident: Callable[[int], AbstractContextManager[None]],
) -> None:
    """In one launch a block keeps in shared memory what it read, not all of 64 x 56 x 56; in two it keeps nothing."""
    operands = Operands(shape, dtype, device, layout)
    with resident(blocks):
        found = {}
        for launches in (1, 2):
            monkeypatch.setattr(cuda, "_launches", launches)
            found[launches] = [operands.kernels()[name]() for name in TWO_PASSES]
    for name, one, two in zip(TWO_PASSES, found[1], found[2], strict=True):
        for number, (tensor, same) in enumerate(zip(one, two, strict=True)):
            assert torch.equal(tensor, same), f"{name}: result {number}"


@EMULATED
@DTYPE
@LAYOUT
@pytest.mark.parametrize("shape", [(4, 48, 11, 8), (5, 7, 9, 3), (40, 72, 1, 1), (3, 1, 9, 8), (2, 300, 4, 4)])
@IGNORES
def test_any_number_of_parts(
    shape: Shape4, layout: str, dtype: torch.dtype, resident: Callable[[int], AbstractContextManager[None]]
) -> None:
    oracle = contract.Oracle(bn_act_call(shape, dtype, layout=layout, residual_layout=layout, training=True))
    for blocks in (1, 2, 5, 16, 40):
        with resident(blocks):
            oracle.check("cuda_emulator")


@DEVICE
@DTYPE
@LAYOUT
@pytest.mark.parametrize("which", ["input", "residual", "grad_output"])
def test_one_misaligned_operand(which: str, layout: str, dtype: torch.dtype, device: str) -> None:
    """Then nothing is read 16 bytes at a time, and the numbers are those of aligned memory up to the order of sums."""
    operands = Operands(VECTORS, dtype, device, layout)
    expected = operands.forward(True), operands.backward(True)
    misaligned = LAYOUTS[f"{layout}_misaligned"]
    if which == "grad_output":
        operands.grad_output = misaligned(operands.grad_output)
    else:
        operands.tensors[which] = misaligned(operands[which])
    torch.testing.assert_close((operands.forward(True), operands.backward(True)), expected)


@DEVICE
@DTYPE
@pytest.mark.parametrize("statistics", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
def test_running_statistics(momentum: float, statistics: torch.dtype, dtype: torch.dtype, device: str) -> None:
    """In the dtypes that the kernels write, or another; in place, also where they are one column of a table."""
    input = Values(dtype, device).normal(5, 24, 6, 7, mean=3.0)
    table = torch.rand(24, 2, dtype=statistics, device=device) + 1
    before = table.clone()
    cuda.bn_act_forward(input, BatchNorm(table[:, 0], table[:, 1], None, None, True, momentum, 1e-5), None, False)
    wide = input.double()
    now = torch.stack([wide.mean((0, 2, 3)), wide.var((0, 2, 3))], 1)
    expected = before.double() * (1 - momentum) + now * momentum
    torch.testing.assert_close(table, expected.to(statistics), rtol=max(1e-6, torch.finfo(statistics).eps), atol=1e-6)
    if momentum == 0 and statistics != torch.float64:  # which goes through float32
        assert torch.equal(table, before)


@DEVICE
def test_only_one_running_statistic(device: str) -> None:
    operands = Operands(VECTORS, torch.float32, device, "nhwc")
    mean = operands["running_mean"].clone()
    bn = BatchNorm(mean, None, operands["weight"], operands["bias"], True, 0.1, 1e-5)
    output, *_ = cuda.bn_act_forward(operands["input"], bn, operands["residual"], True)
    expected = operands.forward(True)
    assert torch.equal(output, expected[0])  # type: ignore[arg-type]
    assert torch.equal(mean, expected[3])  # type: ignore[arg-type]


@DEVICE
def test_the_variance_of_a_constant_is_zero(device: str) -> None:
    """Exactly, in all parts and in what merges them."""
    input = torch.full((4, 24, 13, 11), 3.0, device=device)
    bn = BatchNorm(None, None, None, None, True, 0.1, 1e-5)
    _, mean, invstd = cuda.bn_act_forward(input, bn, None, False)
    assert mean is not None and invstd is not None
    assert (mean == 3).all()
    assert torch.equal(invstd, torch.full_like(invstd, 1e-5**-0.5))


Bad = tuple[str, Callable[[Any], Any], str]
"""The name of an argument, the change that makes it wrong, and the error's message."""


def _of_channels(name: str) -> list[Bad]:
    return [
        (name, lambda v: v[:-1], f"{name} must have one element per channel"),
        (name, lambda v: v[:, None], f"{name} must have one element per channel"),
        (name, lambda v: v.repeat_interleave(2)[::2], f"{name} must be contiguous"),
        (name, Tensor.double, f"{name} must be float32, bfloat16 or float16"),
        (name, Tensor.half, f"{name} must be float32 or have the dtype of the activations"),
    ]


def _of_elements(name: str, other: str = "input") -> list[Bad]:
    return [
        (name, lambda t: t[:, :-1], f"{name} must have the shape of {other}"),
        (name, lambda t: t[0], f"{name} must have the shape of {other}"),
        (name, Tensor.half, f"{name} must have the dtype of {other}"),
        (name, LAYOUTS["nhwc"], f"{name} must have the strides of {other}"),
    ]


WORKSPACE: list[Bad] = [
    ("workspace", lambda w: w[:7], "workspace must have at least"),
    ("workspace", Tensor.double, "workspace must be a contiguous float32 vector"),
    ("workspace", lambda w: w[::2], "workspace must be a contiguous float32 vector"),
    ("launches", lambda _: 3, "launches must be 1, 2 or 0"),
]
INPUT: list[Bad] = [
    ("input", lambda x: x[0], "input must have 4 dimensions"),
    ("input", lambda x: x[:, ::2], "input must be dense, in NHWC or NCHW order"),
    ("input", Tensor.double, "input must be float32, bfloat16 or float16"),
    ("input", lambda x: x[:0], "input must not be empty"),
]
RESULT: Bad = ("mean", Tensor.bfloat16, "mean must be float32")


def _elements(*names: str) -> list[Bad]:
    return [bad for name in names for bad in _of_elements(name)]


def _channels(*names: str) -> list[Bad]:
    return [bad for name in names for bad in _of_channels(name)]


BAD: dict[str, list[Bad]] = {
    "bn_statistics": [*INPUT, *_of_channels("mean")[:3], RESULT, *_of_channels("m2")[:3], *WORKSPACE],
    "bn_train_forward": [
        *INPUT, *_elements("residual", "output"), *_channels("weight", "bias", "running_mean", "running_var"), RESULT,
        *_of_channels("invstd")[:3], *WORKSPACE,
        ("input", lambda x: x[:1, :, :1, :1].contiguous(), "input must have more than one value per channel"),
    ],
    "bn_apply": [*INPUT, *_elements("residual", "output"), *_channels("mean", "spread", "weight", "bias")],
    "bn_backward": [
        *INPUT, *_elements("grad_output", "output", "grad_input", "grad_residual"),
        *_channels("weight", "mean", "invstd"), *_of_channels("sum_g")[:3], *_of_channels("sum_g_xhat")[:3], *WORKSPACE,
    ],
    "bn_backward_apply": [
        *INPUT, *_elements("grad_output", "output", "grad_input"),
        *_channels("weight", "mean", "invstd", "sum_g", "sum_g_xhat"),
    ],
    "add_relu_forward": [*_elements("residual", "output"), INPUT[2]],
    "add_relu_backward": [*_of_elements("grad_output", "output"), *_of_elements("grad_input", "output")],
}  # fmt: skip
OPTIONS = {"relu": True, "momentum": 0.1, "eps": 1e-5, "launches": 0, "spread_is_variance": True, "count": 40.0,
           "batch_statistics": True}  # fmt: skip
ACTIVATIONS = {"input", "residual", "output", "grad_output", "grad_input", "grad_residual"}


def arguments(operator: str, device: str) -> dict[str, Any]:
    """Right arguments of an operator, by name: bfloat16 activations, float32 vectors."""
    values, shape = Values(torch.bfloat16, device), (2, 6, 4, 5)
    found: dict[str, Any] = {}
    for argument in getattr(torch.ops.resfuse_cuda, operator).default._schema.arguments:
        if argument.name in OPTIONS:
            found[argument.name] = OPTIONS[argument.name]
        elif argument.name in ACTIVATIONS:
            found[argument.name] = values.normal(*shape)
        else:
            size = 100_000 if argument.name == "workspace" else shape[1]
            found[argument.name] = values.normal(size, dtype=torch.float32).abs()
    return found


@DEVICE
@pytest.mark.parametrize("operator", BAD)
def test_bad_arguments_are_named_before_anything_is_written(operator: str, device: str) -> None:
    call = getattr(torch.ops.resfuse_cuda, operator).default
    right = arguments(operator, device)
    for name, change, message in BAD[operator]:
        wrong = {**right, name: change(right[name])}
        if name == "input":  # the others agree with it, so that only the input itself is wrong
            wrong |= {other: change(right[other]) for other in ACTIVATIONS & right.keys()}
        before = {other: value.clone() for other, value in wrong.items() if isinstance(value, Tensor)}
        with pytest.raises(RuntimeError, match=message):
            call(**wrong)
        for other, value in before.items():
            assert torch.equal(wrong[other], value), f"{message}: {other} was written"
    call(**right)


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU: with CPU tensors alone there is no wrong device")
@pytest.mark.parametrize("operator", BAD)
def test_every_argument_is_on_the_device(operator: str) -> None:
    call = getattr(torch.ops.resfuse_cuda, operator).default
    right = arguments(operator, "cuda")
    for name, value in right.items():
        if isinstance(value, Tensor):
            with pytest.raises(RuntimeError, match=f"{name} must be a CUDA tensor"):
                call(**{**right, name: value.cpu()})


LAUNCH_ERROR = """
#include <cuda_runtime_api.h>
#include <cstdio>
#ifdef NO_DRIVER  // which alone knows a kernel's name: this is what it says
static cudaError_t name_of(const char** name, const void*) {
  *name = "_ZN7resfuse4cuda48_GLOBAL__N__2b1f8d1e_15_launch_error_cu_0b7a9c5617impossible_kernelIfLi4EEEvPT_";
  return cudaSuccess;
}
#define cudaFuncGetName name_of
#endif
#include "cuda/launch.cuh"

namespace resfuse::cuda {
namespace {
template <class T, int N> __global__ void impossible_kernel(T* to) { *to = N; }
void run() {
  float* to = nullptr;
  launch(impossible_kernel<float, 4>, dim3(1), dim3(4096), 0, nullptr, false, to);
}
}  // namespace
}  // namespace resfuse::cuda

int main() {
  try {
    resfuse::cuda::run();
  } catch (const std::exception& error) {
    std::puts(error.what());
  }
}
"""


def test_a_failed_launch_names_the_kernel(tmp_path: Path) -> None:
    """More threads than a block can have, or no GPU at all."""
    toolkit = _build.find_toolkit(os.environ, sys.path, torch.version.cuda or "no CUDA")
    if isinstance(toolkit, str):
        pytest.skip(toolkit)
    source, program = tmp_path / "launch_error.cu", tmp_path / "launch_error"
    source.write_text(LAUNCH_ERROR)
    options = [f"-I{_build.csrc_dir()}", *(f"-L{path}" for path in _build.cudart_bridge(toolkit, tmp_path))]
    if not torch.cuda.is_available():
        options.append("-DNO_DRIVER")
    nvcc = Path(toolkit.home) / "bin" / "nvcc"
    subprocess.run([nvcc, *options, source, "-o", program], check=True, capture_output=True)
    message = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert re.fullmatch(r"cudaLaunchKernelEx of resfuse::cuda::impossible_kernel<float, 4>: .+\n", message), message
