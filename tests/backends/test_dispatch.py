"""Dispatch: which backend runs what, that it can say why, and that a choice follows the request in force."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from unittest.mock import Mock

import pytest
import torch

import resfuse
from resfuse.backends import cuda, dispatch, reference, triton
from resfuse.types import AbsentDevice, Convolution, Problem
from tests.needs import imported_again
from tests.shapes import CONVOLUTIONS

needs_interpreter = pytest.mark.skipif(not triton.INTERPRETED, reason="TRITON_INTERPRET is not set")
needs_cpu = pytest.mark.skipif("cpu" not in resfuse.available_backends(), reason="the CPU library is not built")
CPU, HOPPER = torch.device("cpu"), AbsentDevice((9, 0))
CONVOLVING = ("conv_bn_act_forward", "conv_forward", "conv_backward")


def problem(
    kernel: str = "bn_act_forward",
    dtype: torch.dtype = torch.float32,
    device: torch.device | AbsentDevice = CPU,
    shape: tuple[int, ...] = (2, 16, 8, 8),
) -> Problem:
    conv = CONVOLUTIONS["3x3"]
    convolution = (torch.Size(conv.weight), conv.settings) if kernel in CONVOLVING else ()
    return Problem(kernel, device, dtype, torch.Size(shape), *convolution)


def test_every_backend_declares_the_kernel_api() -> None:
    for name in (*dispatch.PREFERENCE, "cuda_emulator"):
        module = dispatch.backend(name)
        assert set(module.KERNELS) <= set(reference.KERNELS)
        assert all(callable(getattr(module, kernel)) for kernel in module.KERNELS)
    assert resfuse.available_backends()[-1] == "reference"
    assert set(dispatch.unavailable_reasons()) == set(dispatch.PREFERENCE)


@needs_cpu
def test_automatic_choice_and_its_reasons() -> None:
    name, rejected = dispatch.explain_choice(problem())
    assert name == "cpu"
    assert "cuda" in rejected
    name, rejected = dispatch.explain_choice(problem(dtype=torch.float64))
    assert name == "reference"
    assert rejected["cpu"] == ["float32 and bfloat16 only, got torch.float64"]
    name, rejected = dispatch.explain_choice(problem(shape=(0, 8, 4, 4)))
    assert (name, rejected["cpu"]) == ("reference", ["an empty tensor"])


@needs_interpreter
def test_interpreted_kernels_run_only_on_request() -> None:
    _, rejected = dispatch.explain_choice(problem())
    assert rejected["triton"] == ["TRITON_INTERPRET=1 interprets the kernels, slowly: only on request"]
    if triton.unavailable_reason() is None:
        assert dispatch.choose(problem(), "triton")[:2] == ("triton", triton)


@pytest.mark.parametrize("kernel", cuda.KERNELS)
def test_problems_that_cuda_supports(kernel: str) -> None:
    for dtype in cuda.DTYPES:
        assert cuda.unsupported_reasons(problem(kernel, dtype, HOPPER)) == []
    wrong = "cuda computes in float32, bfloat16 and float16, not torch.float64"
    assert cuda.unsupported_reasons(problem(kernel, torch.float64, HOPPER)) == [wrong]


@pytest.mark.parametrize(
    ("shape", "weight", "reason"),
    [
        ((2, 0, 4, 5), (), "empty tensor"),
        ((2, 3, 4), (), "(N, C, H, W) tensors, not shape (2, 3, 4)"),
        ((1, 2, 2**15, 2**15), (), "up to 1073741823 channels and pixels"),
        ((1, 2**30, 1, 1), (), "up to 1073741823 channels and pixels"),
        ((1, 1, 1 << 16, 1 << 16), (1, 1, 1, 1), "31 bits"),
        ((1 << 30, 1, 1 << 10, 1 << 10), (64, 1, 1, 1), "tiles"),
        ((64, 256, 56), (64, 256, 1), "(N, C, H, W)"),
    ],
)
def test_shapes_that_cuda_has_no_kernel_for(
    shape: tuple[int, ...], weight: tuple[int, ...] | None, reason: str
) -> None:
    convolution = (torch.Size(weight), Convolution((1, 1), (0, 0), (1, 1), 1)) if weight else ()
    for kernel in cuda.BATCH_NORM_KERNELS if not weight else ("conv_forward",):
        (found,) = cuda.unsupported_reasons(Problem(kernel, HOPPER, torch.float32, torch.Size(shape), *convolution))
        assert reason in found


def test_no_gpu_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no CUDA GPU" in (cuda.unavailable_reason() or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda._extension, "load", lambda name: f"{name}: not built")
    assert cuda.unavailable_reason() == "_cuda: not built"


@needs_interpreter
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (problem(dtype=torch.float64), "float32, bfloat16 and float16 only, got torch.float64"),
        (problem(shape=(2, 8, 0, 4)), "an empty tensor"),
        (problem(device=torch.device("cuda:1")), "tensors on cpu only, got cuda:1"),
    ],
)
def test_problems_that_triton_does_not_support(wrong: Problem, reason: str) -> None:
    assert triton.unsupported_reasons(wrong) == [reason]


def test_triton_is_not_imported_where_it_cannot_run() -> None:
    code = """
import sys
from resfuse.backends import dispatch
print(dispatch.unavailable_reasons()["triton"])
assert "triton" not in sys.modules
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "torch sees no CUDA GPU" in found.stdout, found.stderr


# Requests


@needs_cpu
def test_explicit_request_that_cannot_be_met_raises_with_the_reason() -> None:
    with resfuse.use_backend("cpu"), pytest.raises(RuntimeError, match=r"cpu: float32 and bfloat16 only.*float64"):
        resfuse.add_relu(torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))


def test_unknown_and_unavailable_names() -> None:
    with pytest.raises(ValueError, match=r"backend: expected one of .*, got 'tpu'"), resfuse.use_backend("tpu"):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="'cuda' is not available"), resfuse.use_backend("cuda"):
            pass


def test_nesting_and_restoring() -> None:
    assert dispatch.requested_backend() is None
    with resfuse.use_backend("reference"):
        assert dispatch.requested_backend() == "reference"
        with resfuse.use_backend(None):
            assert dispatch.requested_backend() is None
        assert dispatch.requested_backend() == "reference"
    with pytest.raises(KeyError), resfuse.use_backend("reference"):
        raise KeyError
    assert dispatch.requested_backend() is None


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("reference", "reference"), ("", None)):
        monkeypatch.setenv("RESFUSE_BACKEND", value)
        assert imported_again(dispatch).requested_backend() == expected
    monkeypatch.setenv("RESFUSE_BACKEND", "tpu")
    with pytest.raises(ValueError, match="got 'tpu'"):
        imported_again(dispatch)


@needs_cpu
def test_backward_runs_where_its_forward_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither does a later request move it."""
    calls = Mock()
    for name in ("cpu", "reference"):
        for kernel in ("add_relu_forward", "add_relu_backward"):
            spy = Mock(wraps=getattr(dispatch.backend(name), kernel))
            calls.attach_mock(spy, f"{name}_{kernel}")
            monkeypatch.setattr(dispatch.backend(name), kernel, spy)
    input = torch.randn(2, 3, requires_grad=True)
    for forward, backward, ran in ((None, "reference", "cpu"), ("reference", None, "reference")):
        with resfuse.use_backend(forward):
            output = resfuse.add_relu(input, input.detach())
        with resfuse.use_backend(backward):
            output.sum().backward()
        assert [call[0] for call in calls.mock_calls] == [f"{ran}_add_relu_forward", f"{ran}_add_relu_backward"]
        calls.reset_mock()


def test_kernels_that_a_requested_backend_does_not_declare_are_left_to_the_reference() -> None:
    """The gradients of convolutions, which are cuDNN's on a GPU."""
    for name in ("cuda", "triton"):
        assert "conv_backward" not in dispatch.backend(name).KERNELS
        assert dispatch.choose(problem("conv_backward"), name)[:2] == ("reference", reference)


def test_registered_backends_run_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_registered", {})
    other = types.SimpleNamespace(
        KERNELS=("add_relu_forward",),
        unavailable_reason=lambda: None,
        only_on_request_reason=lambda: None,
        unsupported_reasons=lambda problem: [],
        add_relu_forward=lambda input, residual: input,
    )
    dispatch.register("other", other)
    dispatch.register("other", other)  # once more is no conflict
    input = torch.ones(3)
    with resfuse.use_backend("other"):
        assert resfuse.add_relu(input, input) is input
        assert dispatch.explain_choice(problem("add_relu_forward"), "other") == ("other", {})
    assert "other" not in resfuse.available_backends()
    assert resfuse.add_relu(input, input).tolist() == [2, 2, 2]
    for taken in ("other", "cuda"):
        with pytest.raises(ValueError, match=f"a backend named '{taken}' exists already"):
            dispatch.register(taken, types.SimpleNamespace())
    dispatch.choose.cache_clear()


def test_choices_are_made_once_per_problem() -> None:
    dispatch.choose.cache_clear()
    tensor = torch.ones(5, 7)
    for _ in range(3):
        resfuse.add_relu(tensor, tensor)
    assert dispatch.choose.cache_info().misses == 1


# The ranking of backends


@pytest.mark.parametrize(
    ("capability", "convolution", "other"),
    [
        ((7, 5), "reference", "reference"),
        ((8, 0), "cuda", "cuda"),
        ((9, 0), "triton", "cuda"),
        ((10, 0), "triton", "cuda"),
        ((12, 0), "cuda", "cuda"),  # has mma.sync alone
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_automatic_choice_on_a_gpu(
    dtype: torch.dtype, capability: tuple[int, int], convolution: str, other: str
) -> None:
    """By the backends' own reasons, whatever this machine has; the problem is too small for `sm90`."""
    device = AbsentDevice(capability)
    for kernel in cuda.KERNELS:
        name, rejected = dispatch.explain_choice(problem(kernel, dtype, device))
        assert name == (convolution if kernel in CONVOLVING else other), kernel
        if name == "triton":
            assert rejected["cuda"] == [
                "triton should be faster: it multiplies by wgmma or tcgen05, which are faster than the mma.sync of "
                "cuda (predicted, not measured)"
            ]
        if name == "reference":
            assert rejected["cuda"] == ["cuda needs compute capability 8.0 or newer, not 7.5"]
            if kernel in triton.KERNELS:
                assert rejected["triton"] == ["compute capability 8.0 or newer, got 7.5"]
            assert rejected["cpu"][0] == "runs on the CPU, the tensors are on cuda of compute capability 7.5"
    forward = problem("conv_bn_act_forward", dtype, device)
    for request in ("reference", *(("cuda",) if other == "cuda" else ())):
        assert dispatch.explain_choice(forward, request)[0] == request, "a request is met"
    with pytest.raises(RuntimeError, match="runs on the CPU"):
        dispatch.explain_choice(forward, "cpu")


@pytest.mark.parametrize("runs", ["cuda", "triton", "reference"])
def test_only_a_backend_that_can_run_the_problem_is_preferred(runs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((cuda, "cuda"), (triton, "triton")):
        if name != runs:
            monkeypatch.setattr(module, "unsupported_reasons", lambda problem: ["not this"])
    dispatch.choose.cache_clear()
    assert dispatch.explain_choice(problem("conv_forward", torch.bfloat16, HOPPER))[0] == runs
    dispatch.choose.cache_clear()


def test_the_ranking_is_consistent() -> None:
    for entry in dispatch.RANKING:
        order = [dispatch.PREFERENCE.index(name) for name in (entry.passed_over, entry.preferred)]
        assert order == sorted(order), "an exception moves a later backend up: no two can wait for each other"
        assert set(entry.kernels) <= set(reference.KERNELS)
