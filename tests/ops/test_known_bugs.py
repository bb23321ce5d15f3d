"""Mistakes that others make in exactly this place, and faults of PyTorch that we must not pass on.

Each test fails on an implementation with the mistake that its name tells.  Those of modules are in tests/nn and
tests/fuse, stale weights in tests/backends.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import resfuse
from tests import contract, shapes
from tests.shapes import CONVOLUTIONS, Convolution, Values, bn_act_call, check_all, conv_bn_act_call, implementations

FLOAT32 = (torch.float32,)
BN = pytest.mark.parametrize(("backend", "device", "dtype"), implementations("bn_act", FLOAT32))
CONV = pytest.mark.parametrize(("backend", "device", "dtype"), implementations("conv_bn_act", FLOAT32))


def gradient(call: contract.Call, name: str, functions: contract.Functions = contract.FUSED) -> Tensor:
    """One gradient of sum(output^2)."""
    leaves = call.map(lambda tensor: tensor.clone())
    wanted = leaves.tensors[name]
    assert wanted is not None
    wanted.requires_grad_()
    return torch.autograd.grad(contract.forward(functions, leaves).square().sum(), wanted)[0]


# --- statistics ------------------------------------------------------------------------------------------------------


@BN
def test_eval_backward_does_not_use_the_training_formula(backend: str, device: str, dtype: torch.dtype) -> None:
    """With running statistics grad_input is weight s g: the gradients of a channel do not sum to zero."""
    call = bn_act_call((4, 6, 5, 5), dtype, device, layout="nhwc", activation="identity")
    with resfuse.use_backend(backend):
        grad = gradient(call, "input")
    torch.testing.assert_close(grad, gradient(call, "input", contract.EAGER))
    channels = (grad.sum((0, 2, 3)).abs() > 1e-2).tolist()
    assert channels == [True, True, True, True, False, True]  # the fifth weight is zero


def test_frozen_batch_norm_uses_eps() -> None:
    """Statistics near zero make eps the larger term, in forward, backward and inference."""
    call = conv_bn_act_call(CONVOLUTIONS["3x3"], layout="nhwc", eps=0.5)
    check_all(call.replace(running_var=torch.full_like(call.tensors["running_var"], 1e-3)))  # type: ignore[arg-type]


@CONV
def test_statistics_belong_to_the_call(backend: str, device: str, dtype: torch.dtype) -> None:
    """Two forwards of one layer, then two backwards, in either order: each uses the statistics of its own forward."""
    first = conv_bn_act_call(CONVOLUTIONS["3x3"], dtype, device, layout="nhwc", training=True)
    second = first.replace(input=first.input * 3 + 1)
    expected = [gradient(call, "conv_weight") for call in (first, second)]
    for order in ((0, 1), (1, 0)):
        with resfuse.use_backend(backend):
            weights = [first.tensors["conv_weight"].clone().requires_grad_() for _ in range(2)]  # type: ignore[union-attr]
            outputs = [
                contract.forward(contract.FUSED, call.replace(conv_weight=weight))
                for call, weight in zip((first, second), weights, strict=True)
            ]
            for i in order:
                (grad,) = torch.autograd.grad(outputs[i].square().sum(), weights[i])
                torch.testing.assert_close(grad, expected[i], rtol=1e-4, atol=1e-4)


@BN
def test_running_variance_is_unbiased_and_the_normalising_one_biased(
    backend: str, device: str, dtype: torch.dtype
) -> None:
    input = torch.tensor([1.0, 3.0], dtype=dtype, device=device).view(2, 1, 1, 1)
    mean, var = torch.zeros(1, device=device), torch.zeros(1, device=device)
    with resfuse.use_backend(backend):
        output = resfuse.bn_act(input, mean, var, training=True, momentum=1.0, eps=0.0001, activation="identity")
    assert mean.item() == 2
    assert var.item() == 2  # ((1 - 2)^2 + (3 - 2)^2) / (2 - 1)
    torch.testing.assert_close(output.flatten().cpu(), torch.tensor([-1.0, 1.0]) / 1.0001**0.5)  # variance 1


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_flow_to_a_frozen_layers_input_only(training: bool) -> None:
    """Fine-tuning behind a frozen backbone: no parameter has a gradient, the input does, also in training mode."""
    check_all(conv_bn_act_call(CONVOLUTIONS["3x3"], layout="nhwc", training=training), needs_grad=["input"])


# --- arguments -------------------------------------------------------------------------------------------------------


@CONV
@pytest.mark.parametrize("option", ["stride", "padding", "dilation"])
def test_keyword_geometry_is_not_dropped(option: str, backend: str, device: str, dtype: torch.dtype) -> None:
    input, weight = Values(dtype, device).normal(2, 8, 9, 9), Values(dtype, device).normal(8, 8, 3, 3)
    running = torch.zeros(8, device=device), torch.ones(8, device=device)
    for value in (2, [2, 2], (2, 1), (1, 2)):
        with resfuse.use_backend(backend):
            fused = resfuse.conv_bn_act(input, weight, *running, **{option: value})
        eager = torch.relu(F.batch_norm(F.conv2d(input, weight, **{option: value}), *running))
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-4)  # sums of 72 products of order one


# --- faults of PyTorch -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("backend", shapes.BACKENDS)
@pytest.mark.parametrize("size", [(5, 1), (1, 5), (1, 1), (6, 2)])
@pytest.mark.parametrize("stride", [(2, 2), (3, 3)])
def test_bfloat16_weight_gradient_of_narrow_inputs(
    size: tuple[int, int], stride: tuple[int, int], backend: str
) -> None:
    """oneDNN leaves parts of it unwritten where the input is narrower than the stride: 1e30, Inf or NaN."""
    if not shapes.supports(backend, "conv_bn_act", torch.bfloat16, "cpu"):
        pytest.skip(f"{backend} does not run this on the CPU")
    conv = Convolution((6, 16, *size), 17, (3, 3), stride, (1, 1))
    for layout in shapes.BOTH_FORMATS:
        call = conv_bn_act_call(conv, torch.bfloat16, layout=layout, activation="identity")
        grad_output = Values(torch.bfloat16).normal(*conv.output)
        with resfuse.use_backend(backend):
            found = contract.results(contract.FUSED, call, grad_output, ["conv_weight"])["grad_conv_weight"]
        truth = contract.results(contract.EAGER, call.truth(), grad_output.double(), ["conv_weight"])
        expected = truth["grad_conv_weight"]
        # What it is computed from, grad_z, is rounded to bfloat16: 2^-9 of each term, and once more at the end.
        assert (found.double() - expected).norm() <= 4e-3 * expected.norm()


@pytest.mark.parametrize("dtype", shapes.FAST_DTYPES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("groups", [1, 8])
def test_one_channel_per_group_and_unequal_strides(groups: int, training: bool, dtype: torch.dtype) -> None:
    """oneDNN's channels_last convolution leaves parts of the output unwritten where it is one pixel wide."""
    conv = Convolution((3, groups, 8, 2), 3 * groups, (3, 3), (1, 2), (1, 1), groups=groups)
    for _ in range(4):
        dirt = [torch.full((size,), 1e30) for size in range(16, 4096, 48)]
        del dirt
        call = conv_bn_act_call(
            conv, dtype, layout="nhwc", residual_layout=None, activation="identity", training=training
        )
        output = contract.forward(contract.FUSED, call).double()
        truth = contract.forward(contract.EAGER, call.truth())
        # Garbage is off by the size of the output or more; bfloat16 rounds z and the result by 2^-9 each.
        assert (output - truth).norm() <= 1e-2 * truth.norm()


@pytest.mark.skipif(sys.platform != "linux", reason="uses glibc's checks of the heap")
def test_weight_gradient_of_a_strided_1x1_convolution_stays_in_its_memory() -> None:
    """oneDNN's writes beyond it, in channels_last with fewer than 16 channels and two threads: the heap breaks."""
    code = """
        import itertools, torch, resfuse
        torch.set_num_threads(2)
        for dtype, stride, _ in itertools.product((torch.float32, torch.bfloat16), ((2, 2), (1, 2)), range(15)):
            input = torch.randn(3, 8, 16, 16, dtype=dtype).to(memory_format=torch.channels_last)
            weight = torch.randn(8, 8, 1, 1, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
            output = resfuse.conv_bn_act(input, weight, None, None, stride=stride, training=True)
            output.sum().backward()
            neighbours = [torch.randn(size) for size in range(1, 2000, 71)]
        print("survived")
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "165"},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "survived", f"exit code {run.returncode}\n{run.stderr}"
