"""Max pooling that keeps bytes: PyTorch's numbers, bit for bit, and PyTorch's own wherever it can be noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resfuse
from resfuse.backends import dispatch
from resfuse.nn.max_pool import _pooling, pooled
from resfuse.types import Pooling, Problem
from tests.shapes import BACKENDS, Values

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

SETTINGS = {
    "3x3_stride2": (3, 2, 1),
    "2x2": (2,),
    "ceil": (3, 2, 0, 1, True),
    "ceil_in_padding": (2, 3, 1, 1, True),
    "overlapping": (3, 1, 1),
    "gaps": (2, 3),
    "dilated": (3, 2, 1, 2),
    "unequal": ((3, 5), (2, 1), (1, 2)),
    "all_positions": (16, 8, 8),
}
SHAPES = ((2, 16, 17, 16), (1, 33, 16, 19), (3, 5, 18, 17))
OWN = [name for name in BACKENDS if "max_pool_forward" in dispatch.backend(name).KERNELS]


def settings(name: str) -> Pooling:
    found = _pooling(*SETTINGS[name])
    assert found is not None
    return found


def awkward(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Ties, several NaN in a window, windows of -inf alone."""
    input = torch.randint(-3, 4, shape).to(dtype)
    input[torch.rand(shape) < 0.05] = torch.nan
    input[0, :2] = -torch.inf
    input[0, 2, :8, :8] = torch.inf
    return input.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", OWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_pytorch(name: str, shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    kernels, pooling = dispatch.backend(backend), settings(name)
    problem = Problem("max_pool_forward", torch.device("cpu"), dtype, torch.Size(shape))
    if reasons := kernels.unsupported_reasons(problem):
        pytest.skip("; ".join(reasons))
    input = awkward(dtype, shape).requires_grad_()
    expected, pixels = F.max_pool2d(input, *pooling, return_indices=True)
    output, positions = kernels.max_pool_forward(input.detach(), pooling)
    assert output.stride() == expected.stride() and positions.dtype == torch.uint8
    torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)
    grad_output = Values(dtype, seed=1).normal(*expected.shape).contiguous(memory_format=torch.channels_last)
    grad_input = kernels.max_pool_backward(grad_output, positions, input.shape, pooling)
    assert backend == "reference" or grad_input.stride() == input.stride()
    if dtype == torch.float32:
        assert torch.equal(grad_input, torch.autograd.grad(expected, input, grad_output)[0])
    else:  # where PyTorch rounds after every addition
        images = torch.zeros(*shape[:2], shape[2] * shape[3])
        wide = images.scatter_add(2, pixels.flatten(2), grad_output.float().flatten(2)).view(shape)
        torch.testing.assert_close(grad_input.float(), wide, rtol=0.02, atol=0.05)


@pytest.mark.skipif("cpu" not in OWN, reason="no backend has kernels of its own")
class TestFused:
    """In a fused forward."""

    pool = nn.MaxPool2d(3, 2, 1)

    def input(self, **options: Any) -> Tensor:
        return torch.randn(2, 16, 9, 11, **options).contiguous(memory_format=torch.channels_last).requires_grad_()

    @pytest.mark.parametrize(
        "f",
        [pool, lambda x: pooled(F.max_pool2d, x, kernel_size=3, stride=2, padding=1)],
        ids=["module", "function"],
    )
    def test_saves_a_byte_per_output(self, f: Callable[[Tensor], Tensor]) -> None:
        input, kept = self.input(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            output = pooled(f, input) if f is self.pool else f(input)
        assert [(tensor.dtype, tensor.numel()) for tensor in kept] == [(torch.uint8, output.numel())]
        expected = self.pool(input)
        assert torch.equal(output, expected)
        grad_output = torch.randn_like(output)
        assert torch.equal(
            *(torch.autograd.grad(y, input, grad_output, retain_graph=True)[0] for y in (output, expected))
        )
        assert torch.equal(  # NCHW gradients arrive, too
            *(torch.autograd.grad(y, input, grad_output.contiguous())[0] for y in (output, expected))
        )

    def test_double_backward(self) -> None:
        input = self.input(dtype=torch.float32)
        grad_output = torch.randn(2, 16, 5, 6, requires_grad=True)
        found = []
        for f in (lambda x: pooled(self.pool, x), self.pool):
            (grad,) = torch.autograd.grad(f(input), input, grad_output, create_graph=True)
            found.append(torch.autograd.grad(grad.square().sum(), grad_output)[0])
        torch.testing.assert_close(*found)
        batch = torch.randn(3, 2, 16, 5, 6)
        batched = [
            torch.autograd.grad(f(input), input, batch, is_grads_batched=True)[0]
            for f in (lambda x: pooled(self.pool, x), self.pool)
        ]
        torch.testing.assert_close(*batched)

    @pytest.mark.parametrize(
        ("pool", "prepare"),
        [
            (pool, lambda x: x.detach()),
            (pool, lambda x: x.contiguous()),
            (pool, lambda x: x.double()),
            (pool, lambda x: x[0]),
            (nn.MaxPool2d(17, 1, 8), lambda x: x),
            (type("Subclass", (nn.MaxPool2d,), {})(3, 2, 1), lambda x: x),
        ],
        ids=["inference", "nchw", "float64", "one_image", "large_window", "subclass"],
    )
    def test_pytorchs_own_where_it_has_to_be(self, pool: nn.Module, prepare: Callable[[Tensor], Tensor]) -> None:
        input = prepare(self.input())
        output = pooled(pool, input)
        assert torch.equal(output, pool(input))
        assert type(output.grad_fn).__name__ != "MaxPoolFunctionBackward"

    def test_hooks_run(self) -> None:
        pool, seen = nn.MaxPool2d(3, 2, 1), []
        pool.register_forward_hook(lambda module, args, output: seen.append(1))
        pooled(pool, self.input())
        assert seen == [1]

    @pytest.mark.parametrize(
        "options", [{"kernel_size": 3, "padding": 2}, {"kernel_size": 3, "stride": -1}, {"kernel_size": 12}, {}]
    )
    def test_pytorch_reports_errors(self, options: dict[str, Any]) -> None:
        errors = []
        for f in (pooled, lambda function, *args, **options: function(*args, **options)):
            with pytest.raises((RuntimeError, TypeError)) as error:
                f(F.max_pool2d, self.input(), **options)
            errors.append(str(error.value))
        assert errors[0] == errors[1]

    def test_in_a_network(self) -> None:
        """A whole step has the gradients, bit for bit, of one with PyTorch's pooling."""
        model = resfuse.models.resnet18(num_classes=3).to(memory_format=torch.channels_last)
        images = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        found = []
        for observed in (False, True):
            handle = model.maxpool.register_forward_hook(lambda module, args, output: None) if observed else None
            model.zero_grad()
            model(images).square().sum().backward()
            found.append([parameter.grad for parameter in model.parameters()])
            if handle is not None:
                handle.remove()
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
