"""The same bits twice, and with any number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import resfuse
from tests import shapes

pytestmark = pytest.mark.usefixtures("deterministic_cudnn")

COMPLETE = [
    name for name in shapes.BACKENDS if shapes.supports(name, "conv_bn_act", torch.float32, shapes.devices_of(name)[0])
]


def run(dtype: torch.dtype, memory_format: torch.memory_format, backend: str) -> list[Tensor]:
    torch.manual_seed(0)
    (device, *_) = shapes.devices_of(backend)
    # Large enough for several chunks and threads, and no multiple of a tile; kernels that are interpreted get less.
    shape = (5, 70, 37, 41) if device == "cuda" or backend in ("cpu", "reference") else (2, 70, 13, 11)
    input = torch.randn(shape).to(device, dtype).to(memory_format=memory_format).requires_grad_()
    residual = torch.randn(shape).to(device, dtype).to(memory_format=memory_format).requires_grad_()
    conv_weight = torch.randn(70, 70, 1, 1).to(device, dtype).requires_grad_()
    weight, bias = (torch.randn(70, device=device).requires_grad_() for _ in range(2))
    mean, var = torch.zeros(70, device=device), torch.ones(70, device=device)
    with resfuse.use_backend(backend):
        output = resfuse.bn_act(input, mean, var, weight, bias, residual=residual, training=True)
        deep = resfuse.conv_bn_act(output, conv_weight, mean, var, weight, bias, residual=residual, training=True)
    grads = torch.autograd.grad(deep.square().sum(), [input, residual, weight, bias, conv_weight])
    return [output.detach(), deep.detach(), mean, var, *grads]


@pytest.mark.parametrize("backend", COMPLETE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_two_runs(dtype: torch.dtype, memory_format: torch.memory_format, backend: str) -> None:
    for first, second in zip(run(dtype, memory_format, backend), run(dtype, memory_format, backend), strict=True):
        assert torch.equal(first, second)


@pytest.mark.skipif("cpu" not in COMPLETE, reason="a promise of the cpu backend")
@pytest.mark.usefixtures("one_thread")  # which restores the number
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_any_number_of_threads(memory_format: torch.memory_format) -> None:
    """Our kernels partition by shape alone; oneDNN's convolutions make no such promise."""
    kernels = torch.ops.resfuse_cpu
    input = torch.randn(5, 70, 37, 41).to(memory_format=memory_format)
    grad = torch.randn_like(input)
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        output, mean, invstd = kernels.bn_train_forward(input, *[None] * 6, 0.1, 1e-5, True, False)
        gradients = kernels.bn_backward(grad, input, None, None, None, mean, invstd, True, True, True, True)
        results.append([output, mean, invstd, *gradients])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
