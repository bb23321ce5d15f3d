"""A convolution with max pooling behind it in one call, as the kernel and as fused networks use it."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resfuse
from resfuse import functional
from resfuse.backends import cpu_conv
from resfuse.types import BatchNorm, Pooling

pytestmark = pytest.mark.skipif("cpu" not in resfuse.available_backends(), reason="the CPU library is not built")


def draw(rng: random.Random, dtype: torch.dtype) -> tuple[list[Tensor], tuple[int, int, int], BatchNorm]:
    """Input, weight, (kernel, stride, padding) and batch norm of a stem."""
    batch, channels, filters = rng.choice([1, 2, 5]), rng.choice([1, 3, 4, 32]), rng.choice([1, 5, 16, 24, 32, 64])
    kernel = rng.choice([3, 5, 7])
    settings = kernel, rng.choice([1, 2]), rng.randint(0, kernel // 2)
    size = rng.randint(9, 70), rng.randint(9, 70)
    tensors = [torch.randn(batch, channels, *size), torch.randn(filters, channels, kernel, kernel) / kernel]
    if rng.random() < 0.5:
        tensors = [tensor.contiguous(memory_format=torch.channels_last) for tensor in tensors]
    vectors = torch.randn(filters), torch.rand(filters) + 0.5, torch.randn(filters), torch.randn(filters)
    return [tensor.to(dtype) for tensor in tensors], settings, BatchNorm(*vectors, False, 0.1, 1e-5)


def check_pooling(dtype: torch.dtype, count: int) -> int:
    """Draw so many stems, and return how many were one call.

    They equal pooling afterwards but for sums of products in another order; NaN reaches the windows that it reaches in
    eager.
    """
    rng, taken = random.Random(0), 0
    torch.manual_seed(0)
    for _ in range(count):
        (input, weight), (_, stride, padding), bn = draw(rng, dtype)
        high, wide = rng.choice([1, 2, 3, 5]), rng.choice([2, 3])
        steps, edges = (rng.choice([1, 2, 3, 6]), rng.choice([1, 2])), (rng.randint(0, high // 2), rng.randint(0, 1))
        pooling = Pooling((high, wide), steps, edges, rng.choice([(1, 1), (1, 1), (2, 3)]), False)
        if rng.random() < 0.2:
            input[0, 0, 4, 5] = torch.nan
        arguments = input, [(weight, None, (stride, padding, 1, 1), bn, rng.random() < 0.7)], None
        with torch.no_grad():
            one, alone = cpu_conv.checked_inference(*arguments, pooling=pooling), cpu_conv.checked_inference(*arguments)
            if one is None:
                continue
            assert alone is not None
            two = F.max_pool2d(alone, *pooling[:4])
        taken += 1
        assert one.stride() == two.stride()
        rtol = 1e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(one, two, rtol=rtol, atol=1e-5, equal_nan=True)
    return taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_pooling_afterwards(dtype: torch.dtype) -> None:
    assert check_pooling(dtype, 150) > 100


def test_a_faster_path_is_not_given_up() -> None:
    """Winograd's convolution, as in the stem of a ResNet-D, is pooled afterwards."""
    input, weight = (
        torch.randn(shape).to(memory_format=torch.channels_last) for shape in ((1, 32, 56, 56), (64, 32, 3, 3))
    )
    vectors = torch.zeros(64), torch.ones(64), torch.ones(64), torch.zeros(64)
    bn, pooling = BatchNorm(*vectors, False, 0.1, 1e-5), Pooling((3, 3), (2, 2), (1, 1), (1, 1), False)

    def one_call(stride: int) -> bool:
        calls = [(weight, None, (stride, 1, 1, 1), bn, True)]
        return cpu_conv.checked_inference(input, calls, None, pooling=pooling) is not None

    with torch.no_grad():
        assert not one_call(stride=1)
        assert one_call(stride=2)


class Stem(nn.Module):
    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        self.maxpool = pool

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x)))
        return self.maxpool(x)


class Kept(Stem):
    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x)))
        return self.maxpool(x) + F.interpolate(x, scale_factor=0.5)


class OwnPool(nn.MaxPool2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def trained(stem: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(fused, eager) in inference, with statistics."""
    with torch.no_grad():
        stem(torch.randn(4, 3, 32, 32))
    fused = copy.deepcopy(stem.eval())
    resfuse.fuse_(fused)
    return fused, stem


def hooked(stem: nn.Module) -> None:
    def double(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return inputs[0] * 2

    stem.maxpool.register_forward_pre_hook(double)


@pytest.mark.parametrize(
    ("make", "change", "pooled"),
    [
        (lambda: Stem(nn.MaxPool2d(3, 2, 1)), None, True),
        (lambda: Stem(nn.MaxPool2d((3, 2), 2, (1, 0))), None, True),
        (lambda: Stem(nn.MaxPool2d(2)), None, True),
        (lambda: Stem(nn.MaxPool2d(3, 2, 1)), hooked, False),
        (lambda: Stem(nn.MaxPool2d(3, 2, 1, ceil_mode=True)), None, False),
        (lambda: Stem(nn.MaxPool2d(3, 2, 1, dilation=2)), None, True),
        (lambda: Stem(OwnPool(3, 2, 1)), None, False),
        (lambda: Stem(nn.AvgPool2d(3, 2, 1)), None, False),
        (lambda: Kept(nn.MaxPool2d(2)), None, False),
    ],
    ids=["resnet", "pairs", "no_overlap", "hook", "ceil_mode", "dilation", "subclass", "average", "read_again"],
)
def test_network(make: Callable[[], nn.Module], change: Callable[[nn.Module], None] | None, pooled: bool) -> None:
    torch.manual_seed(0)
    fused, eager = trained(make())
    for model in (fused, eager):
        if change is not None:
            change(model)
    input = torch.randn(2, 3, 37, 41)
    exact, results = functional.inference, []

    def watched(*arguments: Any) -> Tensor | None:
        output = exact(*arguments)
        results.append(None if arguments[-1] is None else output)  # the last one is the pooling
        return output

    with torch.no_grad(), mock.patch.object(functional, "inference", watched):
        found, expected = fused(input), eager(input)
    assert any(result is not None for result in results) == pooled
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_keeps_it_from_pooling() -> None:
    """Gradients, autocast and another backend: the convolution is then called without pooling, and is right."""
    torch.manual_seed(0)
    fused, eager = trained(Stem(nn.MaxPool2d(3, 2, 1)))
    input = torch.randn(2, 3, 37, 41)
    torch.testing.assert_close(fused(input), eager(input), rtol=1e-4, atol=1e-5)
    assert fused(input).requires_grad
    with torch.no_grad(), resfuse.use_backend("reference"):
        torch.testing.assert_close(fused(input), eager(input), rtol=1e-4, atol=1e-5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = fused(input), eager(input)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)
    with torch.no_grad(), pytest.raises(ValueError, match="channels"):
        fused(torch.randn(2, 4, 37, 41))


def test_what_the_operator_does_not_take() -> None:
    """It returns None, writes nothing, and leaves the words to the checks in Python."""
    input, weight = torch.randn(1, 8, 6, 6), torch.randn(4, 8, 3, 3)
    vectors = [torch.zeros(4), torch.ones(4), torch.ones(4), torch.zeros(4)]
    good: tuple[Any, ...] = (input, weight, None, (1, 1, 1, 1), BatchNorm(*vectors, False, 0.1, 1e-5), None)

    def take(input: Any, weight: Any, bias: Any, settings: Any, bn: Any, residual: Any, *flags: bool) -> Tensor | None:
        return cpu_conv.checked_inference(input, [(weight, bias, settings, bn, True)], residual, *flags)

    assert take(*good) is not None
    residual = torch.randn(1, 4, 6, 6)
    before = residual.clone()
    other_bn = [BatchNorm(*(value if i == at else v for i, v in enumerate(vectors)), False, 0.1, 1e-5)
                for at in range(4) for value in (torch.zeros(5), torch.zeros(4, dtype=torch.float64))]  # fmt: skip
    bad = [
        {0: torch.randn(1, 7, 6, 6)},
        {0: torch.randn(8, 6, 6)},
        {0: torch.randn(0, 8, 6, 6)},
        {0: torch.randn(1, 8, 6, 6, dtype=torch.float64), 1: weight.double()},
        {0: torch.randn(1, 8, 6, 6, device="meta")},
        {0: torch.randn(1, 8, 6, 6).to_sparse()},
        {1: weight.bfloat16()},
        {2: torch.zeros(3)},
        {2: torch.zeros(4, dtype=torch.bfloat16)},
        {3: ([1, 1], 1, 1, 1)},
        {3: (1, 1, 1, 3)},
        {3: (1, 0, 4, 1)},
        {3: (1, 1, 1, 0)},
        {5: torch.randn(1, 4, 6, 5)},
        {5: residual.double()},
        {5: torch.randn(1, 3, 6, 6)},
        *({4: bn} for bn in other_bn),
        {4: BatchNorm(None, None, None, None, False, 0.1, 1e-5)},
    ]
    for change in bad:
        arguments = [change.get(i, value) for i, value in enumerate(good)]
        if 5 not in change:
            arguments[5] = residual
        assert take(*arguments, True, False) is None, change
    assert torch.equal(residual, before)
    # What may share memory with the input is not written to; fewer channels only where they were asked for.
    base = torch.randn(1, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    wide = torch.randn(8, 8, 3, 3)
    doubled = BatchNorm(*(torch.cat([v, v]) for v in vectors), False, 0.1, 1e-5)
    kept = base.clone()
    take(base, wide, None, (1, 1, 1, 1), doubled, base, True, False)
    assert torch.equal(base, kept)
    narrow = torch.randn(1, 3, 6, 6)
    assert take(*good[:5], narrow, False, True) is not None
