"""The four kernels that synchronised batch norm is made of: each against float64, and together against the whole."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resfuse import contract as rule
from resfuse.backends import dispatch, reference
from tests import contract, shapes, split
from tests.shapes import ACTIVATIONS, FAST_DTYPES, Values, bn_act_call, implementations, running

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

IMPLEMENTATIONS = pytest.mark.parametrize(("backend", "device", "dtype"), implementations("split", FAST_DTYPES))
LAYOUT = pytest.mark.parametrize("layout", shapes.BOTH_FORMATS)


@pytest.mark.parametrize("mean_of_input", [0.5, 300.0])
@pytest.mark.parametrize("shape", ACTIVATIONS)
def test_statistics(shape: str, mean_of_input: float) -> None:
    for layout, dtype in (("nchw", torch.float32), ("nhwc", torch.bfloat16)):
        call = bn_act_call(ACTIVATIONS[shape], dtype, layout=layout, mean=mean_of_input)
        wide_mean, wide_m2 = reference.bn_statistics(call.truth().input)
        for backend, device in running("split", dtype):
            mean, m2 = dispatch.backend(backend).bn_statistics(call.input.to(device))
            assert mean.dtype == m2.dtype == torch.float32
            # Sums in float32 whatever the input's dtype, and no cancellation: a few roundings.  M2 gains
            # n (error of the mean)^2, and the mean is a float32: (eps / 2 mean)^2 against a variance of one.
            for name, found, wide, floor in (("mean", mean, wide_mean, 5e-7), ("m2", m2, wide_m2, 1e-6)):
                deviation = rule.measure(name, found, wide, wide, torch.float32, floor=floor)
                assert not deviation.violated, f"{backend}: {deviation}"


@pytest.mark.parametrize("dtype", FAST_DTYPES)
@LAYOUT
@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("affine", [True, False])
def test_parts_equal_the_whole(affine: bool, activation: str, layout: str, dtype: torch.dtype) -> None:
    """Two processes with unequal shares of a batch compute what one computes with all of it."""
    call = bn_act_call(
        (5, 13, 6, 7), dtype, layout=layout, residual_layout=layout, affine=affine, activation=activation, training=True
    )
    oracle = contract.Oracle(call, seed=1)
    for backend, device in running("split", dtype):
        there = call.map(lambda tensor: tensor.to(device))  # noqa: B023
        found = split.results(backend, there, oracle.grad_output.to(device), [slice(0, 2), slice(2, 5)])
        eager, truth = ({name: results[name] for name in found} for results in (oracle.eager(device)[0], oracle.truth))
        contract.assert_within_contract(found, eager, truth, dtype, oracle.terms)


@IMPLEMENTATIONS
@LAYOUT
def test_backward_with_running_statistics(layout: str, backend: str, device: str, dtype: torch.dtype) -> None:
    """count None: the sums do not enter grad_input, whatever they hold."""
    values = Values(dtype, device)
    grad_output, input, output = (shapes.LAYOUTS[layout](values.normal(3, 10, 5, 4)) for _ in range(3))
    output = torch.relu(output)
    weight, mean = values.normal(10, dtype=torch.float32), values.normal(10, dtype=torch.float32)
    invstd, poison = mean.abs() + 0.5, torch.full_like(mean, torch.nan)
    found = dispatch.backend(backend).bn_backward_apply(
        grad_output, input, output, weight, mean, invstd, poison, poison, None
    )
    g = grad_output.double() * (output > 0)
    expected = (g * (weight.double() * invstd).view(1, -1, 1, 1)).to(dtype)
    torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps * 2, atol=0)  # two roundings


@IMPLEMENTATIONS
def test_mixed_layouts(backend: str, device: str, dtype: torch.dtype) -> None:
    """Each tensor in a layout of its own gives what all in one give."""
    run, values = dispatch.backend(backend), Values(dtype, device)
    input, residual, grad_output = (values.normal(3, 10, 5, 4) for _ in range(3))
    weight, bias, mean = (values.normal(10, dtype=torch.float32) for _ in range(3))
    invstd = mean.abs() + 0.5
    sums = (mean, bias)
    expected_output = run.bn_apply(input, mean, invstd, weight, bias, residual, True)
    expected = (
        run.bn_backward_reduce(grad_output, input, expected_output, mean, invstd),
        run.bn_backward_apply(grad_output, input, expected_output, weight, mean, invstd, *sums, 60),
    )
    for first, second in (("nhwc", "nchw"), ("nhwc_slice_of_channels", "transposed"), ("nchw_misaligned", "nhwc")):
        x, r, dy = shapes.LAYOUTS[first](input), shapes.LAYOUTS[second](residual), shapes.LAYOUTS[second](grad_output)
        output = run.bn_apply(x, mean, invstd, weight, bias, r, True)
        torch.testing.assert_close(output, expected_output)
        other = shapes.LAYOUTS[second](output.contiguous())
        found = (
            run.bn_backward_reduce(dy, x, other, mean, invstd),
            run.bn_backward_apply(dy, x, other, weight, mean, invstd, *sums, 60),
        )
        torch.testing.assert_close(found, expected, rtol=1e-5 if dtype == torch.float32 else 1.6e-2, atol=1e-4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    size=st.integers(1, 9),
    scale=st.floats(0.01, 100),
    mean=st.floats(-100, 100),
    seed=st.integers(0, 2**16),
)
def test_statistics_do_not_depend_on_how_the_batch_is_cut(
    sizes: list[int], size: int, scale: float, mean: float, seed: int
) -> None:
    """Each backend's bn_statistics of the parts, merged by Chan's formula, are those of the whole."""
    input = Values(torch.float32, seed=seed).normal(sum(sizes), 5, size, size, scale=scale, mean=mean)
    truth = input.double()
    whole = truth.mean((0, 2, 3)), truth.var((0, 2, 3), correction=0) * (truth.numel() // 5)
    for (backend, device), layout in itertools.product(running("split", torch.float32), shapes.BOTH_FORMATS):
        values = shapes.LAYOUTS[layout](input.to(device))
        kernels = dispatch.backend(backend)
        parts = [(part.numel() // 5, *kernels.bn_statistics(part)) for part in values.split(sizes)]
        count, merged, m2 = split.merge(parts)
        # A mean is a float32: off by eps / 2 of its size, which enters M2 squared, times the count, and times
        # 2 sqrt(count M2) where parts with different means are merged.
        error = torch.finfo(torch.float32).eps * max(abs(mean), scale)
        assert (merged.cpu() - whole[0]).abs().max() <= 8 * error
        slack = 4 * error * (count * whole[1]).sqrt() + count * error**2 + 1e-6 * whole[1]
        assert ((m2.cpu() - whole[1]).abs() <= slack).all()
