"""The convolutions of the cpu backend: every path, instruction set and way of multiplying bfloat16."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import resfuse
from resfuse.backends import cpu, cpu_conv, reference
from resfuse.backends.cpu_kernels import conv_settings, conv_weight_grad
from tests.backends.cpu.random_convolutions import check, fused, main, random_call
from tests.contract import EAGER, FUSED, RUNNING, Call, Oracle, forward
from tests.shapes import Convolution, conv_bn_act_call

pytestmark = pytest.mark.skipif("cpu" not in resfuse.available_backends(), reason="the CPU library is not built")

ROOT = Path(__file__).parents[3]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

# (N, C, H, W), filters, kernel, stride, padding, dilation, groups; the same along both axes
PATHS = {
    "in_place": ((2, 64, 9, 11), 96, 1, 1, 0, 1, 1),
    "in_place_by_rows": ((1, 24, 28, 28), 40, 1, 2, 0, 1, 1),
    "aliasing_channels": ((1, 1024, 7, 7), 64, 1, 1, 0, 1, 1),
    "aliasing_channels_by_rows": ((2, 1024, 15, 12), 192, 1, 2, 0, 1, 1),
    "aliasing_channels_few_filters": ((1, 1024, 9, 9), 40, 1, 1, 0, 1, 1),
    "few_pixels": ((1, 512, 7, 7), 512, 3, 1, 1, 1, 1),
    "few_pixels_1x1": ((1, 512, 7, 7), 2048, 1, 1, 0, 1, 1),
    "few_pixels_of_two_images": ((2, 128, 9, 9), 64, 3, 2, 1, 1, 1),
    "one_pixel": ((2, 256, 1, 1), 64, 3, 1, 1, 1, 1),
    "strided_1x1": ((2, 64, 15, 13), 128, 1, 2, 0, 1, 1),
    "stem": ((1, 3, 61, 59), 64, 7, 2, 3, 1, 1),
    "short_rows": ((3, 32, 7, 7), 48, 3, 2, 1, 1, 1),
    "winograd": ((1, 64, 28, 28), 64, 3, 1, 1, 1, 1),
    "winograd_odd": ((2, 32, 17, 21), 96, 3, 1, 0, 1, 1),
    "winograd_wide_padding": ((2, 16, 13, 18), 32, 3, 1, 2, 1, 1),
    "winograd_narrow_panels": ((4, 80, 16, 15), 48, 3, 1, 1, 1, 1),
    "dilated": ((1, 40, 20, 20), 33, 3, 1, 2, 2, 1),
    "depthwise": ((2, 72, 14, 15), 72, 3, 2, 1, 1, 72),
    "small_groups": ((2, 64, 12, 12), 128, 3, 1, 1, 1, 16),
    "groups_of_four": ((1, 128, 15, 14), 128, 3, 1, 1, 1, 32),
    "groups_of_eight": ((2, 64, 13, 9), 64, 3, 2, 1, 1, 8),
    "large_groups": ((1, 96, 10, 10), 96, 3, 1, 1, 1, 3),
    "many_filters": ((1, 48, 14, 14), 1000, 1, 1, 0, 1, 1),
}


def path_call(name: str, dtype: torch.dtype, *, residual: bool = True) -> Call:
    shape, filters, kernel, *settings, groups = PATHS[name]
    conv = Convolution(shape, filters, *((value, value) for value in (kernel, *settings)), groups=groups)
    return conv_bn_act_call(conv, dtype, layout="nhwc", residual_layout="nhwc" if residual else None, seed=len(name))


@DTYPES
@pytest.mark.parametrize("name", PATHS)
def test_paths(name: str, dtype: torch.dtype) -> None:
    for residual in (True, False):
        check(path_call(name, dtype, residual=residual))


@DTYPES
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", PATHS)
def test_not_finite(name: str, value: float, dtype: torch.dtype) -> None:
    """NaN and Inf reach the elements that they reach in eager, through the ReLU too."""
    call = path_call(name, dtype, residual=False)
    call.input[0, 0, 0, 0] = value
    call.input[-1, -1, -1, call.input.shape[3] // 2] = value
    found, expected = fused(call), forward(EAGER, call.truth())
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())


@DTYPES
@pytest.mark.parametrize("name", ["in_place", "few_pixels", "winograd", "winograd_odd", "dilated", "large_groups"])
def test_input_gradients(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the own kernels, which read the weight turned around; groups in bfloat16 are PyTorch's."""
    used = watch(monkeypatch, "_input_grad")
    Oracle(path_call(name, dtype, residual=False), {"input"}).check("cpu")
    assert bool(used) == (name != "large_groups" or dtype == torch.float32)


@DTYPES
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("name", ["in_place", "few_pixels", "winograd", "winograd_odd", "dilated", "short_rows"])
def test_what_is_carried_to_an_input_gradient(name: str, layout: str, dtype: torch.dtype) -> None:
    """It is added before the sum is rounded, in its own memory where that is NHWC."""
    call = path_call(name, dtype, residual=False)
    carried = torch.randn_like(call.input)
    if layout == "nchw":
        carried = carried.contiguous()
    arguments = (torch.randn_like(fused(call)), call.input, call.tensors["conv_weight"], call.convolution)
    needs_grad = (True, False, False)
    right = reference.conv_backward(*map(wide, arguments), needs_grad)[0]  # type: ignore[arg-type]
    assert right is not None
    expected, address = right + carried.double(), carried.data_ptr()
    found = cpu_conv.conv_backward(*arguments, needs_grad, carried)[0]
    assert found is not None and (found.data_ptr() == address or layout == "nchw")
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * 4)


def wide(argument: object) -> object:
    return argument.double() if isinstance(argument, Tensor) else argument


WEIGHT_GRADIENTS = ["winograd", "winograd_odd", "winograd_wide_padding", "winograd_narrow_panels"]


@DTYPES
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("name", [*WEIGHT_GRADIENTS, "few_pixels", "in_place", "dilated", "large_groups", "short_rows"])
def test_weight_gradients(name: str, layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the own kernel, in the layout of the weight, and PyTorch's where it has none."""
    used = watch(monkeypatch, "_weight_grad")
    call = path_call(name, dtype, residual=False)
    if layout == "nchw":
        call = call.replace(conv_weight=call.tensors["conv_weight"].contiguous())
    found = Oracle(call, {"conv_weight"}).check("cpu")["grad_conv_weight"]
    assert any(result is not None for result in used) == (name in WEIGHT_GRADIENTS)
    if name in WEIGHT_GRADIENTS:
        assert found.stride() == call.tensors["conv_weight"].stride()


@DTYPES
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", ["input", "grad_output"])
def test_weight_gradients_that_are_not_finite(where: str, value: float, dtype: torch.dtype) -> None:
    call = path_call("winograd_odd", dtype, residual=False)
    input, weight = call.input.clone(), call.tensors["conv_weight"]
    grad_output = torch.randn_like(fused(call))
    (input if where == "input" else grad_output)[0, 1, 0, 2] = value
    arguments = (grad_output, input, weight, call.convolution, (False, True, False))
    _, found, _ = cpu_conv.conv_backward(*arguments)
    _, expected, _ = reference.conv_backward(*arguments)
    assert found.isfinite().any()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())


def watch(monkeypatch: pytest.MonkeyPatch, kernel: str) -> list[Tensor | None]:
    """The results of a kernel from now on."""
    results: list[Tensor | None] = []
    own = getattr(cpu_conv, kernel)

    def watched(*arguments: object) -> Tensor | None:
        results.append(own(*arguments))
        return results[-1]

    monkeypatch.setattr(cpu_conv, kernel, watched)
    return results


@DTYPES
def test_random(dtype: torch.dtype) -> None:
    main(0, 150, dtype)


def random_problems(count: int, dtype: torch.dtype, **environment: str) -> None:
    """In a process of its own."""
    command = [sys.executable, "-m", "tests.backends.cpu.random_convolutions", "1", str(count), str(dtype)[6:]]
    environ = {**os.environ, **environment}
    result = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@DTYPES
@pytest.mark.parametrize("instruction_set", ["avx2", "baseline"])
def test_random_of_other_instruction_sets(instruction_set: str, dtype: torch.dtype) -> None:
    random_problems(100, dtype, RESFUSE_CPU_ISA=instruction_set)


@pytest.mark.parametrize("products", ["pairs", "widened"])
def test_random_of_both_ways_to_multiply(products: str) -> None:
    random_problems(100, torch.bfloat16, RESFUSE_CPU_BF16=products)


@DTYPES
@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", ["avx512", "avx2", "baseline"])
def test_many_random(instruction_set: str, dtype: torch.dtype) -> None:
    random_problems(2000, dtype, RESFUSE_CPU_ISA=instruction_set)


def test_the_ways_to_multiply_can_be_asked_for() -> None:
    code = "import resfuse; resfuse.available_backends(); print(resfuse.backends.cpu.bfloat16_products())"
    found = set()
    for asked in ("pairs", "widened"):
        environ = {**os.environ, "RESFUSE_CPU_BF16": asked}
        result = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, cwd=ROOT)
        found.add(result.stdout.strip())
    has_pairs = cpu.instruction_set() == "avx512" and "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    assert found == ({"pairs", "widened"} if has_pairs else {"widened"})


@DTYPES
@pytest.mark.parametrize("name", PATHS)
def test_bits_do_not_depend_on_the_number_of_threads(name: str, dtype: torch.dtype) -> None:
    call = path_call(name, dtype)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.no_grad():
                own = call.replace(**{name: call.tensors[name].clone() for name in RUNNING})
                trained = forward(FUSED, own.with_options(training=True))
            settings = conv_settings(call.convolution)
            gradient = conv_weight_grad(trained, call.input, call.tensors["conv_weight"], settings)
            gradients = () if gradient is None else (gradient,)
            results.append((fused(call), trained, *(own.tensors[name] for name in RUNNING), *gradients))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


@DTYPES
def test_float32_weight_with_another_input(dtype: torch.dtype) -> None:
    """Autocast leaves the weight as it is, and nothing rounds it."""
    call = path_call("winograd", dtype, residual=False)
    call = call.replace(conv_weight=torch.randn_like(call.tensors["conv_weight"], dtype=torch.float32) * 0.05)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = fused(call)
    truth = forward(EAGER, call.truth())
    assert found.dtype == dtype
    assert (found - truth).norm() / truth.norm() < (3e-3 if dtype == torch.bfloat16 else 1e-6)


def by_optimizer(weight: Tensor) -> None:
    weight.requires_grad_()
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()
    weight.requires_grad_(False)


ROUTES: dict[str, Callable[[Tensor], object]] = {
    "data": lambda weight: weight.data[3].zero_(),
    "numpy": lambda weight: weight.detach().numpy().__setitem__(3, 0),
    "one value": lambda weight: weight.data[3, 0, 0].fill_(9.0),
    "strides": lambda weight: setattr(weight, "data", weight.data.transpose(2, 3)),
    "optimizer": by_optimizer,
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["winograd", "stem", "depthwise", "few_pixels"])
def test_edited_weights_are_seen_at_once(name: str, route: str) -> None:
    call = path_call(name, torch.float32)
    before = fused(call)
    ROUTES[route](call.tensors["conv_weight"])
    check(call)
    assert not torch.equal(fused(call), before)


def test_loaded_weights_are_seen_at_once() -> None:
    model = nn.Sequential(nn.Conv2d(8, 32, 3), nn.BatchNorm2d(32), nn.ReLU()).eval()
    resfuse.fuse_(model)
    input = torch.randn(1, 8, 9, 9)
    with torch.no_grad():
        model(input)
        model.load_state_dict({name: torch.rand_like(value.float()) for name, value in model.state_dict().items()})
        torch.testing.assert_close(model(input), torch.relu(model[1](model[0](input))))


def test_results_can_be_resized() -> None:
    call = path_call("stem", torch.float32, residual=False)
    output = fused(call)
    output.resize_(2, *output.shape[1:])
    output.untyped_storage().resize_(0)


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_out_of_scratch_names_the_size() -> None:
    code = """
import resource, torch, resfuse
channels = 1 << 20
input, weight = torch.zeros(1, channels, 1, 1), torch.zeros(32, channels, 1, 1)
zeros, ones = torch.zeros(32), torch.ones(32)
def run(input, weight):
    with torch.no_grad(): return resfuse.conv_bn_act(input, weight, zeros, ones)
run(input[:, :8], weight[:, :8])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20),) * 2)
try: run(input, weight)
except RuntimeError as error: print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "could not allocate" in result.stdout, result.stdout + result.stderr
    assert "bytes of scratch" in result.stdout


def test_random_calls_differ() -> None:
    """The generator of problems reaches strides, groups and residuals of fewer channels."""
    calls = [random_call(random.Random(seed), torch.float32) for seed in range(60)]
    assert len({call.input.stride() for call in calls}) > 30
    assert any(call.options["pad_residual"] for call in calls)
    assert any(call.options["groups"] > 1 for call in calls)
