"""Bad input: an error that names the argument, what came and what was expected, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import resfuse


def arguments(op: str) -> dict[str, Any]:
    """A valid call."""
    input = torch.randn(2, 8, 5, 5)
    if op == "add_relu":
        return {"input": input, "residual": torch.randn(2, 8, 5, 5)}
    channels = 12 if op == "conv_bn_act" else 8
    call: dict[str, Any] = {"input": input, "running_mean": torch.zeros(channels), "running_var": torch.ones(channels)}
    call |= {"weight": torch.ones(channels), "bias": torch.zeros(channels), "training": True}
    if op == "conv_bn_act":
        call |= {"conv_weight": torch.randn(12, 8, 3, 3), "conv_bias": torch.zeros(12), "padding": 1}
    return call | {"residual": torch.randn(2, channels, 5, 5)}


def sparse() -> Tensor:
    return torch.ones(2, 8, 5, 5).to_sparse()


ALL = ("add_relu", "bn_act", "conv_bn_act")
NORMS = ("bn_act", "conv_bn_act")
CONV = ("conv_bn_act",)
CASES: list[tuple[tuple[str, ...], dict[str, Callable[[], Any]], type[Exception], str]] = [
    (ALL, {"input": lambda: torch.ones(2, 8, 5, 5, dtype=torch.int32)}, TypeError, r"input: .*floating-point.*int32"),
    (ALL, {"input": lambda: [1.0]}, TypeError, r"input: expected a Tensor, got list"),
    (ALL, {"input": sparse}, ValueError, r"input: expected a strided \(dense\) tensor, got layout torch.sparse_coo"),
    (NORMS, {"input": lambda: torch.ones(8, 5, 5)}, ValueError, r"input: expected 4 dimensions, got 3 .*\(8, 5, 5\)"),
    (ALL, {"residual": lambda: torch.ones(2, 3, 5, 5)}, ValueError, r"residual: expected shape .*got \(2, 3, 5, 5\)"),
    (ALL, {"residual": lambda: torch.ones(8, 5, 5)}, ValueError, r"residual: expected shape .*got \(8, 5, 5\)"),
    (ALL, {"residual": lambda: "x"}, TypeError, r"residual: expected a Tensor, got str"),
    (NORMS, {"running_mean": lambda: torch.zeros(7)}, ValueError, r"running_mean: expected shape \(\d+,\), got \(7,\)"),
    (NORMS, {"weight": lambda: torch.zeros(1, 8)}, ValueError, r"weight: expected shape \(\d+,\), got \(1, 8\)"),
    (NORMS, {"bias": lambda: torch.zeros(8).double()}, (TypeError, ValueError), r"bias: expected"),
    (NORMS, {"running_var": lambda: None}, ValueError, r"running_var: expected a tensor.*got None"),
    (NORMS, {"running_mean": lambda: None, "running_var": lambda: None, "training": lambda: False}, ValueError,
     r"running_mean: expected a tensor, because training is False"),
    (NORMS, {"activation": lambda: "gelu"}, ValueError, r'activation: expected "relu" or "identity", got \'gelu\''),
    (NORMS, {"eps": lambda: 0.0}, ValueError, r"eps: expected a positive number, got 0\.0"),
    (CONV, {"conv_weight": lambda: torch.ones(12, 7, 3, 3)}, ValueError, r"input: expected 7 channels .*got 8"),
    (CONV, {"conv_weight": lambda: torch.ones(12, 8, 3)}, ValueError, r"conv_weight: expected 4 dimensions, got 3"),
    (CONV, {"conv_weight": lambda: torch.ones(12, 8, 3, 3).double()}, TypeError, r"conv_weight: .*float32.*float64"),
    (CONV, {"conv_bias": lambda: torch.ones(5)}, ValueError, r"conv_bias: expected shape \(12,\), got \(5,\)"),
    (CONV, {"stride": lambda: 0}, ValueError, r"stride: .*at least 1, got 0"),
    (CONV, {"stride": lambda: (1, 2, 3)}, ValueError, r"stride: expected an int or a pair of ints.*got \(1, 2, 3\)"),
    (CONV, {"padding": lambda: -1}, ValueError, r"padding: .*at least 0, got -1"),
    (CONV, {"dilation": lambda: (1, 1.5)}, ValueError, r"dilation: expected an int or a pair of ints.*got \(1, 1.5\)"),
    (CONV, {"groups": lambda: 5}, ValueError, r"groups: expected a divisor of the 12 output channels, got 5"),
    (CONV, {"input": lambda: torch.ones(2, 8, 1, 1), "padding": lambda: 0}, ValueError,
     r"input: expected at least the size of the .*kernel \(3, 3\), got \(1, 1\)"),
]  # fmt: skip


@pytest.mark.parametrize(("ops", "changes", "error", "message"), CASES, ids=[case[-1] for case in CASES])
def test_error_before_anything_is_written(
    ops: tuple[str, ...], changes: dict[str, Callable[[], Any]], error: type[Exception], message: str
) -> None:
    for op in ops:
        call = arguments(op) | {name: make() for name, make in changes.items()}
        kept = {
            name: call[name].clone() for name in ("running_mean", "running_var") if isinstance(call.get(name), Tensor)
        }
        with pytest.raises(error, match=message):
            getattr(resfuse, op)(**call)
        for name, tensor in kept.items():
            assert torch.equal(call[name], tensor), f"{op} changed {name}"


@pytest.mark.parametrize("op", ALL)
def test_another_dtype_or_device(op: str) -> None:
    call = arguments(op)
    with pytest.raises(TypeError, match=r"residual: expected dtype torch.float32 .*got torch.bfloat16"):
        getattr(resfuse, op)(**call | {"residual": call["residual"].bfloat16()})
    for name in call.keys() & {"residual", "running_mean", "weight", "bias"}:
        with pytest.raises(ValueError, match=rf"{name}: expected device cpu .*got meta"):
            getattr(resfuse, op)(**call | {name: call[name].to("meta")})


def test_a_call_like_an_earlier_one_is_checked_too() -> None:
    call = arguments("conv_bn_act") | {"training": False}
    with torch.no_grad():
        resfuse.conv_bn_act(**call)
        for name, wrong in (("residual", torch.ones(2, 12, 5, 4)), ("conv_bias", torch.zeros(11)), ("stride", 0)):
            with pytest.raises(ValueError, match=f"{name}: expected|{name}: .*at least 1"):
                resfuse.conv_bn_act(**call | {name: wrong})


def test_one_value_per_channel_in_training() -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        resfuse.bn_act(torch.ones(1, 8, 1, 1), None, None, training=True)
    call = arguments("conv_bn_act") | {"input": torch.ones(1, 8, 3, 3), "padding": 0, "residual": None}
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        resfuse.conv_bn_act(**call)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_empty_batch_as_in_eager(training: bool, requires_grad: bool) -> None:
    input = torch.ones(0, 8, 5, 5, requires_grad=requires_grad)
    running = (torch.zeros(8), torch.ones(8))
    eager = torch.relu(F.batch_norm(input, *(tensor.clone() for tensor in running), training=training))
    assert resfuse.bn_act(input, *running, training=training).shape == eager.shape
    weight, wide = torch.ones(12, 8, 3, 3, requires_grad=requires_grad), (torch.zeros(12), torch.ones(12))
    output = resfuse.conv_bn_act(input, weight, *wide, training=training)
    assert output.shape == (0, 12, 3, 3)
    assert resfuse.add_relu(input, input.detach()).shape == input.shape
    if requires_grad:
        output.sum().backward()
        assert weight.grad is not None and (weight.grad == 0).all()
    for mean, var in (running, wide):
        assert (mean == 0).all() and (var == 1).all()


def test_more_than_2_31_elements_of_address_space() -> None:
    """Strides beyond 32 bits: a view of few elements that lie far apart is copied, not addressed wrongly."""
    huge = torch.empty(2**31 + 16, dtype=torch.bfloat16)  # never touched but for two ends: no memory is used
    view = huge.as_strided((2, 8, 1, 1), (2**31, 1, 1, 1))
    view.copy_(torch.arange(16.0).view(2, 8, 1, 1))
    mean, var = torch.zeros(8), torch.ones(8)
    expected = resfuse.bn_act(view.contiguous(), mean, var)
    assert torch.equal(resfuse.bn_act(view, mean, var), expected)
    assert torch.equal(resfuse.add_relu(view, view), torch.relu(view + view))


def test_shapes_that_overflow_are_refused_by_shape_alone() -> None:
    """On the meta device nothing is allocated: the shape arithmetic itself is in Python's integers."""
    input = torch.empty(2**20, 8, 2**12, 2**12, device="meta")
    weight = torch.empty(8, 8, 1, 1, device="meta")
    vector = torch.empty(8, device="meta")
    with resfuse.use_backend("reference"):
        assert resfuse.conv_bn_act(input, weight, vector, vector).numel() == 2**47
