"""The contract's arithmetic: what it passes, what it must not let pass."""

from __future__ import annotations

import math

import pytest
import torch

from resfuse import contract

REFERENCE = torch.linspace(-1, 1, 101, dtype=torch.float64)


def measure(fused: torch.Tensor, eager: torch.Tensor | list[torch.Tensor] = REFERENCE, **options: float):
    return contract.measure("output", fused, eager, REFERENCE, torch.float32, **options)


@pytest.mark.parametrize(
    ("fused", "eager", "violated"),
    [
        (1 + 1.4e-4, [1 + 1e-4], False),
        (1 + 1.6e-4, [1 + 1e-4], True),
        (1 + 0.9e-7, [1], False),  # the floor
        (1 + 2e-7, [1], True),
        (1 + 1e-4, [1, 1 + 1e-4], False),  # the least accurate eager counts
        (1 + 1e-4, [1], True),
        (1.01, [1e30], True),  # garbage of eager excuses nothing
        (1.01, [math.nan], True),
        (1 + 1e-7, [math.nan], False),
    ],
)
def test_bound_of_the_norm(fused: float, eager: list[float], violated: bool) -> None:
    """By what the truth is multiplied with."""
    assert measure(REFERENCE * fused, [REFERENCE * factor for factor in eager]).violated is violated
    assert not measure(REFERENCE * fused, floor=1.0).violated


def test_bound_of_the_worst_element() -> None:
    spread = REFERENCE + 1e-4 * torch.tensor([1.0, -1.0]).repeat(51)[:101]
    one = REFERENCE.clone()
    one[7] += 5e-4
    deviation = measure(one, spread)
    assert deviation.fused < deviation.limit
    assert deviation.violated


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_is_a_violation(value: float) -> None:
    fused = REFERENCE.clone()
    fused[0] = value
    assert measure(fused).violated
    assert measure(fused, fused).violated  # whatever eager does


def test_zero_but_for_cancellation() -> None:
    zero = torch.zeros(8, dtype=torch.float64)
    noise = torch.full((8,), 1e-6, dtype=torch.float64)
    assert contract.measure("bias", noise, zero, zero, torch.float32).violated
    assert not contract.measure("bias", noise, zero, zero, torch.float32, scale=1e3).violated


def test_empty() -> None:
    empty = torch.empty(0, dtype=torch.float64)
    assert contract.measure("output", empty, empty, empty, torch.float32).used == 0


def test_a_deviation_names_the_quantity_and_shapes_must_match() -> None:
    assert str(measure(REFERENCE * 1.01)).startswith("output: E(fused) 1.00e-02")
    with pytest.raises(contract.ContractError, match="shape"):
        measure(REFERENCE[:5])


def test_floors() -> None:
    assert contract.floor_of(torch.bfloat16) == 1e-3
    assert contract.floor_of(torch.float32, "cpu", convolution=True) == 1e-7
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = True
        assert contract.floor_of(torch.float32, "cuda", convolution=True) == contract.TF32_FLOOR
        assert contract.rounding_of(torch.float32, "cuda", convolution=True) == torch.float16
        assert contract.rounding_of(torch.float32, "cuda") == contract.rounding_of(torch.float32) == torch.float32
        assert contract.rounding_of(torch.bfloat16, "cuda", convolution=True) == torch.bfloat16
        torch.backends.cudnn.allow_tf32 = False
        assert contract.floor_of(torch.float32, "cuda", convolution=True) == 1e-7
        assert contract.rounding_of(torch.float32, "cuda", convolution=True) == torch.float32
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_decided_by_rounding() -> None:
    mask = contract.decided_by_rounding(torch.tensor([1.0, 0.0, 1e-8, -1e-8, -0.1]), torch.float32)
    assert mask.tolist() == [False, True, True, True, False]
