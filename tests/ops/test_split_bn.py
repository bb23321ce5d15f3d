"""The four kernels that synchronised batch norm is made of; test_differential holds them together against the whole."""

from __future__ import annotations

import pytest
import torch

from resfuse import contract as rule
from resfuse.backends import dispatch, reference
from tests import shapes
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


@IMPLEMENTATIONS
@LAYOUT
def test_backward_with_running_statistics(layout: str, backend: str, device: str, dtype: torch.dtype) -> None:
    """count None: the sums do not enter grad_input, whatever they hold."""
    values = Values(dtype, device)
    g, input = (shapes.LAYOUTS[layout](values.normal(3, 10, 5, 4)) for _ in range(2))
    weight, mean = values.normal(10, dtype=torch.float32), values.normal(10, dtype=torch.float32)
    invstd, poison = mean.abs() + 0.5, torch.full_like(mean, torch.nan)
    found = dispatch.backend(backend).bn_backward_apply(g, input, weight, mean, invstd, poison, poison, None)
    expected = (g.double() * (weight.double() * invstd).view(1, -1, 1, 1)).to(dtype)
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
        run.bn_backward_reduce(grad_output, input, expected_output, weight, bias, mean, invstd, True),
        run.bn_backward_apply(grad_output, input, weight, mean, invstd, *sums, 60),
    )
    for first, second in (("nhwc", "nchw"), ("nhwc_slice_of_channels", "transposed"), ("nchw_misaligned", "nhwc")):
        x, r, dy = shapes.LAYOUTS[first](input), shapes.LAYOUTS[second](residual), shapes.LAYOUTS[second](grad_output)
        output = run.bn_apply(x, mean, invstd, weight, bias, r, True)
        torch.testing.assert_close(output, expected_output)
        other = shapes.LAYOUTS[second](output.contiguous())
        found = (
            run.bn_backward_reduce(dy, x, other, weight, bias, mean, invstd, True),
            run.bn_backward_apply(dy, x, weight, mean, invstd, *sums, 60),
        )
        torch.testing.assert_close(found, expected, rtol=1e-5 if dtype == torch.float32 else 1.6e-2, atol=1e-4)
