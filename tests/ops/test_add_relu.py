"""add_relu against eager: numbers, layouts, special values."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import resfuse
from tests import contract, shapes
from tests.shapes import DTYPES, FAST_DTYPES, LAYOUTS, Values, add_relu_call, check_all, running

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

FAST = pytest.mark.parametrize("dtype", FAST_DTYPES)

SHAPES: dict[str, tuple[int, ...]] = {
    **shapes.ACTIVATIONS,
    "scalar": (),
    "one_number": (1,),
    "lanes_and_a_rest": (35,),
    "matrix": (5, 13),
    "rank_5": (2, 3, 4, 5, 6),
    "several_threads": (70_001,),
    "from_the_pool": (2, 64, 64, 65),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, dtype: torch.dtype) -> None:
    call = add_relu_call(SHAPES[shape], dtype)
    expected = contract.forward(contract.EAGER, call)
    # One addition and one rounding: there is one right answer.
    for backend, found in check_all(call, interpret=shape not in ("several_threads", "from_the_pool")).items():
        assert torch.equal(found["output"].cpu(), expected), backend


@FAST
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    for residual_layout in shapes.partners(layout):
        call = add_relu_call((3, 10, 4, 5), dtype, layout=layout, residual_layout=residual_layout)
        for found in check_all(call).values():
            assert found["output"].stride() == torch.empty_like(call.input).stride()


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype: torch.dtype) -> None:
    """NaN passes, -0 and negative numbers give 0, Inf - Inf is NaN: bit for bit what eager gives, backward too."""
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny]
    values = torch.tensor(special, dtype=dtype)
    input, residual = (tensor.contiguous() for tensor in torch.meshgrid(values, values, indexing="ij"))
    call = contract.Call("add_relu", {"input": input, "residual": residual})
    grad_output = Values(dtype).normal(*input.shape)
    eager = contract.results(contract.EAGER, call, grad_output)
    for backend, device in running("add_relu", dtype):
        with resfuse.use_backend(backend):
            fused = contract.results(contract.FUSED, call.map(lambda tensor: tensor.to(device)), grad_output)  # noqa: B023
        for name, tensor in fused.items():
            torch.testing.assert_close(tensor.cpu(), eager[name], rtol=0, atol=0, equal_nan=True, msg=backend)


@FAST
def test_the_two_arguments_may_be_one(dtype: torch.dtype) -> None:
    for backend, device in running("add_relu", dtype):
        input = Values(dtype, device).normal(4, 9, 3).requires_grad_()
        with resfuse.use_backend(backend):
            output = resfuse.add_relu(input, input)
            (grad,) = torch.autograd.grad(output, input, torch.ones_like(output))
        assert torch.equal(output, torch.relu(2 * input)), backend
        assert torch.equal(grad, 2 * (input > 0).to(dtype)), backend


@FAST
@pytest.mark.parametrize("which", ["input", "residual"])
def test_expanded_argument_and_gradient(which: str, dtype: torch.dtype) -> None:
    for backend, device in running("add_relu", dtype):
        values = Values(dtype, device)
        row, full = values.normal(1, 6, 1, 5), values.normal(3, 6, 4, 5).requires_grad_()
        arguments = (row.expand_as(full), full) if which == "input" else (full, row.expand_as(full))
        with resfuse.use_backend(backend):
            output = resfuse.add_relu(*arguments)
            output.sum().backward()  # whose gradient is one number with strides 0
        assert torch.equal(output, torch.relu(row + full)), backend
        assert full.grad is not None
        assert torch.equal(full.grad, (output > 0).to(dtype)), backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_promotes_as_eager_does(dtype: torch.dtype) -> None:
    def run(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        leaves = [Values(torch.bfloat16).normal(2, 5).requires_grad_(), Values(dtype).normal(2, 5).requires_grad_()]
        with torch.autocast("cpu", torch.bfloat16):
            output = function(*leaves)
        return output, *torch.autograd.grad(output.sum(), leaves)

    for fused, eager in zip(run(resfuse.add_relu), run(contract.eager_add_relu), strict=True):
        assert fused.dtype == eager.dtype
        assert torch.equal(fused, eager)
