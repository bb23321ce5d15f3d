"""The cuda backend's decisions, which need no GPU; its numbers are tested with those of every other backend."""

from __future__ import annotations

import pytest
import torch

from resfuse.backends import cuda
from resfuse.backends.registry import Problem


def problem(verb: str = "add_relu_forward", device: str = "cuda", dtype: torch.dtype = torch.float32) -> Problem:
    return Problem(verb, torch.device(device), dtype, torch.Size([2, 3]))


@pytest.fixture(autouse=True)
def _pretend_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_capability", lambda device: (9, 0))


@pytest.mark.parametrize("dtype", cuda.DTYPES)
@pytest.mark.parametrize("verb", cuda.VERBS)
def test_what_is_implemented_is_supported(verb: str, dtype: torch.dtype) -> None:
    assert cuda.unsupported_reasons(problem(verb, dtype=dtype)) == []


def test_each_obstacle_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = cuda.unsupported_reasons(problem("bn_act_forward", "cpu", torch.float64))
    assert len(reasons) == 3
    assert "not bn_act_forward" in reasons[0]
    assert "not torch.float64" in reasons[1]
    assert "not on cpu" in reasons[2]

    monkeypatch.setattr(cuda, "_capability", lambda device: (7, 5))
    assert cuda.unsupported_reasons(problem()) == ["cuda needs compute capability 8.0 or newer, not 7.5"]


def test_no_gpu_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no CUDA GPU" in (cuda.unavailable_reason() or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda._extension, "load", lambda name: f"{name}: not built")
    assert cuda.unavailable_reason() == "_cuda: not built"


@pytest.mark.parametrize(
    ("other", "copied"),
    [
        (torch.randn(2, 4, 3, 5), False),
        (torch.randn(2, 4, 3, 5).to(memory_format=torch.channels_last), True),
        (torch.randn(2, 4, 3, 10)[..., ::2], True),
        (torch.randn(2, 1, 1, 5).expand(2, 4, 3, 5), True),
    ],
)
def test_operands_get_the_layout_of_the_result(other: torch.Tensor, copied: bool) -> None:
    target = torch.empty(2, 4, 3, 5)
    matched = cuda._laid_out_as(target, other)
    assert (matched is not other) is copied
    assert matched.stride() == target.stride()
    assert torch.equal(matched, other)


def test_the_stride_of_a_single_element_does_not_matter() -> None:
    pooled = torch.randn(2, 4, 1, 1)
    same = torch.empty_strided((2, 4, 1, 1), (4, 1, 99, 7))
    assert cuda._laid_out_as(pooled, same) is same
