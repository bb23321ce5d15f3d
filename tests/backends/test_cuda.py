"""The cuda backend: checks of its bindings, and launches of its elementwise and batch norm kernels.

Its numbers are tested with those of every other backend.  Kernels run in the emulator, and on a GPU where there is one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from resfuse import _build
from resfuse.backends import cuda
from resfuse.types import BatchNorm
from tests import contract, shapes
from tests.backends.operands import TWO_PASSES, Operands
from tests.emulator import backend as emulator
from tests.shapes import LAYOUTS, Shape4, Values, bn_act_call

DEVICES = [
    *(["cpu"] if emulator.unavailable_reason() is None else []),
    *(["cuda"] if cuda.unavailable_reason() is None else []),
]
DEVICE = pytest.mark.parametrize("device", DEVICES)
EMULATED = pytest.mark.skipif("cpu" not in DEVICES, reason=str(emulator.unavailable_reason()))
DTYPE = pytest.mark.parametrize("dtype", cuda.DTYPES, ids=lambda dtype: str(dtype)[6:])
LAYOUT = pytest.mark.parametrize("layout", shapes.BOTH_FORMATS)
IGNORES = pytest.mark.usefixtures("poisoned_memory", "one_thread")
VECTORS, SCALARS = (3, 48, 14, 12), (3, 17, 5, 7)  # read 16 bytes at a time, and element by element


@pytest.fixture
def resident() -> Callable[[int], AbstractContextManager[None]]:
    """Run inside on a device that holds so many blocks at once; a GPU stays what it is."""
    return lambda blocks: emulator.device(resident_blocks=blocks) if "cpu" in DEVICES else nullcontext()


@EMULATED
@LAYOUT
@pytest.mark.parametrize("shape", [VECTORS, SCALARS, (2, 520, 3, 3)])
def test_every_kernel_is_one_launch(shape: Shape4, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, call in Operands(cuda, shape, torch.float32, "cpu", layout).calls().items():
        for launches in (0, 2):
            monkeypatch.setattr(cuda, "_launches", launches)
            with emulator.launches() as counted:
                call()
            assert counted.launches == (2 if launches and name in TWO_PASSES else 1), name


@EMULATED
def test_the_grid_fills_the_device(resident: Callable[[int], AbstractContextManager[None]]) -> None:
    """As many blocks as are resident at once, where there is work for them, and never more than share a channel."""
    operands = Operands(cuda, (4, 24, 13, 11), torch.float32, "cpu", "nhwc")
    for blocks in (1, 3, 6):
        with resident(blocks), emulator.launches() as counted:
            operands.forward(True)
        assert counted.blocks == blocks
    with resident(2), emulator.launches() as counted:  # more tiles of channels than resident blocks: they need not wait
        Operands(cuda, (2, 200, 2, 2), torch.float32, "cpu", "nhwc").forward(True)
    assert counted.blocks == 4


@EMULATED
def test_two_launches_where_a_cooperative_one_is_refused() -> None:
    """Under MPS or in a green context fewer blocks are resident than the device is said to hold."""
    operands = Operands(cuda, VECTORS, torch.float32, "cpu", "nhwc")
    for name in TWO_PASSES:
        expected = operands.calls()[name]()
        with emulator.device(cooperative=False), emulator.launches() as counted:
            operands.calls()[name]()
            found = operands.calls()[name]()
        assert counted.launches == 4 and counted.refusals == 1, f"{name}: a device is asked once"
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)), name


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
    operands = Operands(cuda, shape, dtype, device, layout)
    with resident(blocks):
        found = {}
        for launches in (1, 2):
            monkeypatch.setattr(cuda, "_launches", launches)
            found[launches] = [operands.calls()[name]() for name in TWO_PASSES]
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
    operands = Operands(cuda, VECTORS, dtype, device, layout)
    expected = operands.forward(True), operands.backward(True)
    operands.tensors[which] = LAYOUTS[f"{layout}_misaligned"](operands.tensors[which])
    torch.testing.assert_close((operands.forward(True), operands.backward(True)), expected)


@DEVICE
@DTYPE
@pytest.mark.parametrize("statistics", [torch.float32, torch.bfloat16, torch.float64])
def test_statistics_that_are_columns_of_a_table(statistics: torch.dtype, dtype: torch.dtype, device: str) -> None:
    """In the dtypes that the kernels write, or another."""
    input = Values(dtype, device).normal(5, 24, 6, 7, mean=3.0)
    table = torch.rand(24, 2, dtype=statistics, device=device) + 1
    wide = input.double()
    now = torch.stack([wide.mean((0, 2, 3)), wide.var((0, 2, 3))], 1)
    expected = (table.double() * 0.7 + now * 0.3).to(statistics)
    cuda.bn_act_forward(input, BatchNorm(table[:, 0], table[:, 1], None, None, True, 0.3, 1e-5), None, False)
    torch.testing.assert_close(table, expected, rtol=max(1e-6, torch.finfo(statistics).eps), atol=1e-6)


OPERATORS = ("bn_statistics", "bn_train_forward", "bn_apply", "bn_backward", "bn_backward_apply", "add_relu_forward",
             "add_relu_backward")  # fmt: skip
OPTIONS = {"relu": True, "momentum": 0.1, "eps": 1e-5, "launches": 0, "spread_is_variance": True, "count": 40.0,
           "batch_statistics": True, "known_part": 0}  # fmt: skip
ACTIVATIONS = ("input", "residual", "output", "grad_output", "grad_input", "grad_residual")
WRITTEN = {"bn_statistics": {"mean", "m2"}, "bn_train_forward": {"mean", "invstd"},
           "bn_backward": {"sum_g", "sum_g_xhat"}}  # fmt: skip
"""Vectors that an operator writes, always in float32."""


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


def mistakes(operator: str, names: Collection[str]) -> Iterator[tuple[str, Callable[[Any], Any], str]]:
    """The name of an argument, the change that makes it wrong, and the error's message."""
    first = "output" if operator == "add_relu_backward" else "input"
    if operator.startswith("bn"):
        yield "input", lambda x: x[0], "input must have 4 dimensions"
        yield "input", lambda x: x[:, ::2], "input must be dense, in NHWC or NCHW order"
        yield "input", lambda x: x[:0], "input must not be empty"
    if operator == "bn_train_forward":
        one = "input must have more than one value per channel"
        yield "input", lambda x: x[:1, :, :1, :1].contiguous(), one
        yield "known_part", lambda _: 3, "known_part takes NHWC memory"
    if first in names and operator != "add_relu_backward":
        yield "input", Tensor.double, "input must be float32, bfloat16 or float16"
    for name in names:
        if name == "workspace":
            yield name, lambda w: w[:7], "workspace must have at least"
            for change in (Tensor.double, lambda w: w[::2]):
                yield name, change, "workspace must be a contiguous float32 vector"
            yield "launches", lambda _: 3, "launches must be 1, 2 or 0"
        elif name in ACTIVATIONS and name != first:
            for change in (lambda t: t[:, :-1], lambda t: t[0]):
                yield name, change, f"{name} must have the shape of {first}"
            yield name, Tensor.half, f"{name} must have the dtype of {first}"
            yield name, LAYOUTS["nhwc"], f"{name} must have the strides of {first}"
        elif name not in ACTIVATIONS and name not in OPTIONS:
            for change in (lambda v: v[:-1], lambda v: v[:, None]):
                yield name, change, f"{name} must have one element per channel"
            yield name, lambda v: v.repeat_interleave(2)[::2], f"{name} must be contiguous"
            if name in WRITTEN.get(operator, ()):
                yield name, Tensor.bfloat16, f"{name} must be float32"
            else:
                yield name, Tensor.double, f"{name} must be float32, bfloat16 or float16"
                yield name, Tensor.half, f"{name} must be float32 or have the dtype of the activations"


@DEVICE
@pytest.mark.parametrize("operator", OPERATORS)
def test_bad_arguments_are_named_before_anything_is_written(operator: str, device: str) -> None:
    call = getattr(torch.ops.resfuse_cuda, operator).default
    right = arguments(operator, device)
    for name, change, message in mistakes(operator, right.keys()):
        wrong = {**right, name: change(right[name])}
        if name == "input":  # the others agree with it, so that only the input itself is wrong
            wrong |= {other: change(right[other]) for other in right.keys() & ACTIVATIONS}
        before = {other: value.clone() for other, value in wrong.items() if isinstance(value, Tensor)}
        with pytest.raises(RuntimeError, match=message):
            call(**wrong)
        for other, value in before.items():
            assert torch.equal(wrong[other], value), f"{message}: {other} was written"
    call(**right)


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU: with CPU tensors alone there is no wrong device")
@pytest.mark.parametrize("operator", OPERATORS)
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
