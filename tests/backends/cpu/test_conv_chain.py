"""Convolutions one behind the other in one call: as the kernels compute them, and where fused networks make them."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

import resfuse
from resfuse import functional
from resfuse.backends import cpu_conv
from resfuse.types import BatchNorm, InferenceCall
from tests import models

pytestmark = pytest.mark.skipif("cpu" not in resfuse.available_backends(), reason="the CPU library is not built")

EPS = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def batch_norm(filters: int) -> BatchNorm:
    vectors = torch.randn(filters), torch.rand(filters) + 0.5, torch.randn(filters), torch.randn(filters)
    return BatchNorm(*vectors, False, 0.1, 1e-5)


def exact(input: Tensor, calls: list[InferenceCall], residual: Tensor | None) -> Tensor:
    output = input.double()
    for i, (weight, bias, settings, bn, relu) in enumerate(calls):
        output = F.conv2d(output, weight.double(), None if bias is None else bias.double(), *settings)
        output = F.batch_norm(output, *(None if v is None else v.double() for v in bn[:4]), False, 0.1, bn.eps)
        if residual is not None and i == len(calls) - 1:
            output[:, : residual.shape[1]] += residual.double()
        output = output.relu() if relu else output
    return output


def draw(rng: random.Random, dtype: torch.dtype) -> tuple[Tensor, list[InferenceCall], Tensor | None]:
    """An input, one to four convolutions behind each other, and a residual, perhaps of fewer channels."""
    channels = rng.choice([3, 16, 20, 32])
    shape = rng.choice([1, 2, 5]), channels, rng.randint(6, 30), rng.randint(6, 30)
    input, calls = torch.randn(shape), []
    size = shape[2:]
    for _ in range(rng.randint(1, 4)):
        kernel, stride = rng.choice([1, 1, 3, 5]), rng.choice([1, 1, 2])
        filters, groups = rng.choice([16, 24, 32, 64]), rng.choice([1, 1, 1, 4]) if channels % 4 == 0 else 1
        weight = torch.randn(filters, channels // groups, kernel, kernel) / (channels // groups * kernel**2) ** 0.5
        bias = torch.randn(filters).to(dtype) if rng.random() < 0.3 else None
        if rng.random() < 0.5:
            weight = weight.to(memory_format=torch.channels_last)
        settings = stride, kernel // 2, 1, groups
        calls.append((weight.to(dtype), bias, settings, batch_norm(filters), rng.random() < 0.8))
        channels, size = filters, tuple((n - 1) // stride + 1 for n in size)
    residual = torch.randn(shape[0], rng.choice([channels, channels // 2]), *size) if rng.random() < 0.6 else None
    tensors = [None if t is None else t.to(dtype) for t in (input, residual)]
    if rng.random() < 0.7:
        tensors = [None if t is None else t.to(memory_format=torch.channels_last) for t in tensors]
    assert tensors[0] is not None
    return tensors[0], calls, tensors[1]


def check_chains(dtype: torch.dtype, count: int) -> None:
    """Draw so many: they equal float64 but for rounding, in the layout of one call after another."""
    rng = random.Random(0)
    torch.manual_seed(0)
    for _ in range(count):
        input, calls, residual = draw(rng, dtype)
        overwrite, given = rng.random() < 0.5, None if residual is None else residual.clone()
        expected = exact(input, calls, residual)
        found = cpu_conv.checked_inference(input, calls, residual, overwrite, True)
        assert found is not None
        assert (found.double() - expected).norm() <= EPS[dtype] * expected.norm()
        last = input
        for i, call in enumerate(calls):
            one = cpu_conv.checked_inference(last, [call], given if i == len(calls) - 1 else None, False, True)
            assert one is not None
            last = one
        assert found.stride() == last.stride()
        assert overwrite or residual is None or given is None or torch.equal(residual, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_one_after_another(dtype: torch.dtype) -> None:
    check_chains(dtype, 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_parts_over_its_input(dtype: torch.dtype) -> None:
    """The images are more than scratch takes at once, and the output is written over the input, its residual."""
    torch.manual_seed(0)
    input = torch.randn(23, 32, 56, 56).to(dtype, memory_format=torch.channels_last)
    shapes = (64, 32, 1), (64, 64, 3), (32, 64, 1)
    calls: list[InferenceCall] = [
        (torch.randn(k, c, r, r).div_((c * r * r) ** 0.5).to(dtype), None, (1, r // 2, 1, 1), batch_norm(k), True)
        for k, c, r in shapes
    ]
    expected, address = exact(input, calls, input), input.data_ptr()
    found = cpu_conv.checked_inference(input, calls, input, True, False)
    assert found is not None
    assert found.data_ptr() == address
    assert (found.double() - expected).norm() <= EPS[dtype] * expected.norm()


def test_a_residual_that_an_input_still_needs_is_kept() -> None:
    """Memory that later images are read from: the input begins there, but its images are of another size."""
    torch.manual_seed(0)
    memory = torch.randn(4 * 16 * 64)
    input = memory.view(4, 8, 8, 16).permute(0, 3, 1, 2)
    residual = memory[: 4 * 32 * 16].view(4, 4, 4, 32).permute(0, 3, 1, 2)
    calls: list[InferenceCall] = [
        (torch.randn(k, c, 1, 1), None, (stride, 0, 1, 1), batch_norm(k), True)
        for k, c, stride in ((16, 16, 2), (32, 16, 1))
    ]
    expected, kept = exact(input, calls, residual), memory.clone()
    found = cpu_conv.checked_inference(input, calls, residual, True, False)
    assert found is not None
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(memory, kept)


def test_what_does_not_fit_is_found_before_anything_is_written() -> None:
    input = torch.randn(1, 8, 6, 6).to(memory_format=torch.channels_last)
    good: InferenceCall = torch.randn(8, 8, 3, 3), None, (1, 1, 1, 1), batch_norm(8), True
    residual = torch.randn(1, 8, 6, 6).to(memory_format=torch.channels_last)
    kept = residual.clone()
    assert cpu_conv.checked_inference(input, [good, good], residual.clone(), True, False) is not None
    for bad in (
        (torch.randn(8, 7, 3, 3), *good[1:]),
        (torch.randn(8, 8, 9, 9), *good[1:]),
        (torch.randn(8, 8, 3, 3).bfloat16(), *good[1:]),
        (torch.randn(8, 8, 3, 3), torch.zeros(7), *good[2:]),
        (torch.randn(8, 8, 3, 3), None, (2, 1, 1, 1), *good[3:]),  # the residual is too large
        (torch.randn(8, 8, 3, 3), None, (1, 1, 1, 3), *good[3:]),
    ):
        assert cpu_conv.checked_inference(input, [good, bad], residual, True, False) is None  # type: ignore[list-item]
    assert torch.equal(residual, kept)


# --- networks --------------------------------------------------------------------------------------------------------


@contextmanager
def lengths_of_calls() -> Iterator[list[int]]:
    """How many convolutions each call of the backend computes."""
    inference, lengths = functional.inference, list[int]()

    def watched(input: Tensor, calls: Any, *args: Any) -> Tensor | None:
        output = inference(input, calls, *args)
        lengths.extend([] if output is None else [len(calls)])
        return output

    with mock.patch.object(functional, "inference", watched), torch.no_grad():
        yield lengths


class Block(nn.Module):
    """Two convolutions, and the sum with the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.bn1, self.bn2, self.relu = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class ReadAgain(Block):
    def forward(self, x: Tensor) -> Tensor:
        first = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(first)) + first)


class Deep(Block):
    """Longer than a call."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.relu(self.bn1(self.conv1(x)))
            x = self.relu(self.bn2(self.conv2(x)))
        return x


class Halving(nn.Module):
    """Writes to its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(0.5)


class Halved(Block):
    def __init__(self) -> None:
        super().__init__()
        self.shortcut = Halving()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """(fused, eager) in inference, with statistics."""
    torch.manual_seed(0)
    eager = make()
    eager(torch.randn(4, 8, 9, 9))
    fused = copy.deepcopy(eager.eval())
    resfuse.fuse_(fused)
    return fused, eager


def check_same(fused: nn.Module, eager: nn.Module) -> list[int]:
    input = torch.randn(2, 8, 7, 9)
    with lengths_of_calls() as lengths:
        found = fused(input.clone())
        torch.testing.assert_close(found, eager(input.clone()), rtol=1e-4, atol=1e-5)
    return lengths


def test_blocks_are_one_call() -> None:
    assert check_same(*pair(Block)) == [2]
    assert check_same(*pair(lambda: Bottleneck(8, 2))) == [3]
    projection = models.seeded(lambda: nn.Sequential(nn.Conv2d(8, 16, 1, 2), nn.BatchNorm2d(16)))
    # While the projection runs, which could write to the input, the rest of the block must not read it any more.
    assert check_same(*pair(lambda: Bottleneck(8, 4, 2, projection))) == [2, 1, 1]
    assert check_same(*pair(Deep)) == [4, 2]


def test_what_is_read_again_is_a_result() -> None:
    assert check_same(*pair(ReadAgain)) == [1, 1]


def test_an_input_that_is_written_to_was_read_before() -> None:
    assert check_same(*pair(Halved)) == [1, 1]


@pytest.mark.parametrize("name", ["conv1", "bn1", "conv2", "bn2", "relu"])
def test_hooks_split_a_call(name: str) -> None:
    fused, eager = pair(Block)
    for model in (fused, eager):
        model.get_submodule(name).register_forward_hook(lambda module, args, output: output * 2)
    assert 2 not in check_same(fused, eager)


@pytest.mark.parametrize("name", ["bn1", "bn2"])
def test_a_norm_in_training_is_none_of_a_call(name: str) -> None:
    fused, eager = pair(Block)
    for model in (fused, eager):
        model.get_submodule(name).train()
    assert 2 not in check_same(fused, eager)
    torch.testing.assert_close(fused.state_dict(), eager.state_dict(), rtol=1e-4, atol=1e-5)


def test_other_backends_and_autocast() -> None:
    fused, eager = pair(Block)
    input = torch.randn(2, 8, 7, 9)
    with lengths_of_calls() as lengths, resfuse.use_backend("reference"):
        torch.testing.assert_close(fused(input), eager(input), rtol=1e-4, atol=1e-5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), lengths_of_calls() as more:
        torch.testing.assert_close(fused(input), eager(input), rtol=5e-2, atol=5e-2)
    assert lengths == more == []


def test_errors_are_the_modules() -> None:
    fused, _ = pair(Block)
    fused.conv2.weight = nn.Parameter(torch.randn(8, 4, 3, 3))
    with torch.no_grad(), pytest.raises(ValueError, match="channels"):
        fused(torch.randn(2, 8, 7, 9))


def test_images_too_large_for_scratch_are_computed_one_after_another() -> None:
    """Scratch is kept for as long as the thread lives."""
    call: InferenceCall = torch.randn(8, 8, 1, 1), None, (1, 0, 1, 1), batch_norm(8), True
    for size, fits in ((512, True), (520, False)):
        input = torch.randn(1, 8, size, size).to(memory_format=torch.channels_last)
        assert (cpu_conv.checked_inference(input, [call, call], None, False, False) is not None) == fits
