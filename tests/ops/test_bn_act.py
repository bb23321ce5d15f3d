"""bn_act against the numerical contract: output, every gradient and the running statistics, on every backend."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import resfuse
from tests import contract, shapes
from tests.shapes import ACTIVATIONS, DTYPES, FAST_DTYPES, LAYOUTS, Values, bn_act_call, check_all, running

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
FAST = pytest.mark.parametrize("dtype", FAST_DTYPES)
ALL = pytest.mark.parametrize("dtype", DTYPES)
FORMATS = pytest.mark.parametrize("layout", shapes.BOTH_FORMATS)
FORMS = (("nchw", "nchw"), ("nhwc", "nchw"), ("nhwc", None))  # input, residual


@MODES
@pytest.mark.parametrize(("shape", "dtype", "form"), shapes.one_form_each(ACTIVATIONS, DTYPES, FORMS))
def test_shapes(shape: str, dtype: torch.dtype, form: tuple[str, str | None], training: bool) -> None:
    check_all(bn_act_call(ACTIVATIONS[shape], dtype, layout=form[0], residual_layout=form[1], training=training))


@MODES
@FAST
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype, training: bool) -> None:
    for residual_layout in shapes.partners(layout):
        call = bn_act_call((3, 10, 4, 5), dtype, layout=layout, residual_layout=residual_layout, training=training)
        # On the CPU: CUDA's eager kernel keeps the strides of any dense input, be they of neither memory format.
        eager = F.batch_norm(call.input, None, None, training=True)
        for found in check_all(call).values():
            assert found["output"].stride() == eager.stride()


@MODES
@FAST
@FORMATS
def test_options(layout: str, dtype: torch.dtype, training: bool) -> None:
    """Every combination of ReLU, residual, affine parameters, and running statistics that may be absent."""
    for activation, residual, affine in itertools.product(["relu", "identity"], [layout, None], [True, False]):
        call = bn_act_call(
            (3, 21, 6, 7), dtype, layout=layout, residual_layout=residual, affine=affine, activation=activation,
            training=training, momentum=0.3, eps=1e-3,
        )  # fmt: skip
        check_all(call)
        if training and affine:
            check_all(call.replace(running_mean=None, running_var=None))


@MODES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [True, False], ids=["float32_parameters", "half_parameters"])
def test_parameter_dtypes(wide: bool, dtype: torch.dtype, training: bool) -> None:
    """As under autocast, and as after model.bfloat16()."""
    parameters = torch.float32 if wide else dtype
    call = bn_act_call((4, 24, 9, 7), dtype, layout="nhwc", parameter_dtype=parameters, training=training)
    for found in check_all(call).values():
        assert found["running_mean"].dtype == found["grad_weight"].dtype == parameters


@ALL
@FORMATS
@pytest.mark.parametrize("mean", [64.0, -4096.0])
@pytest.mark.parametrize(
    "size", [(19, 13), pytest.param((45, 41), marks=pytest.mark.slow)], ids=["one_tile_per_chunk", "many_tiles"]
)
def test_large_mean_and_tiny_variance(size: tuple[int, int], mean: float, layout: str, dtype: torch.dtype) -> None:
    """Deviations of a few units in the last place of the mean: sums of squares cancel completely."""
    scale = 8 * abs(mean) * torch.finfo(dtype).eps
    check_all(bn_act_call((4, 18, *size), dtype, layout=layout, mean=mean, scale=scale, training=True, eps=scale**2))


@FORMATS
@pytest.mark.parametrize("values", ["ramp", "step", "outlier_first"])
def test_values_that_drift_through_the_batch(values: str, layout: str) -> None:
    """The first values tell nothing of the rest: what one pass with a guessed centre has to get right."""
    call = bn_act_call((4, 19, 33, 31), layout=layout, training=True, activation="identity")
    position = torch.linspace(0, 1, 4 * 33 * 31).view(4, 1, 33, 31)
    drift = {"ramp": 1e4 * position, "step": 1e3 * (position > 0.5), "outlier_first": 1e4 * (position == 0)}[values]
    check_all(call.replace(input=LAYOUTS[layout]((call.input + drift).contiguous())))


@ALL
@FORMATS
def test_constant_input(layout: str, dtype: torch.dtype) -> None:
    """A variance of exactly 0: invstd is eps^-1/2 and the output is the bias."""
    call = bn_act_call((2, 7, 6, 5), dtype, layout=layout, residual_layout=None, training=True)
    check_all(call.replace(input=torch.full_like(call.input, 3)))


@MODES
@FAST
@FORMATS
@pytest.mark.parametrize("where", ["input", "residual", "bias", "running_mean"])
def test_not_finite(where: str, layout: str, dtype: torch.dtype, training: bool) -> None:
    """NaN and Inf reach the same elements as in eager, of the output and of every gradient."""
    for value in (math.nan, math.inf, -math.inf):
        call = bn_act_call((2, 6, 4, 5), dtype, layout=layout, residual_layout=layout, training=training)
        struck = call.tensors[where]
        assert struck is not None
        struck[(1, 3, 2, 2) if struck.dim() == 4 else 3] = value
        grad_output = Values(dtype, seed=1).normal(*call.input.shape)
        eager = contract.results(contract.EAGER, call, grad_output)
        for backend, device in running("bn_act", dtype):
            with resfuse.use_backend(backend):
                there = call.map(lambda tensor: tensor.to(device))  # noqa: B023
                fused = contract.results(contract.FUSED, there, grad_output)
            for name, tensor in eager.items():
                assert torch.equal(fused[name].cpu().isfinite(), tensor.isfinite()), f"{backend}, {value}: {name}"
            assert torch.equal(fused["output"].cpu().isnan(), eager["output"].isnan()), f"{backend}, {value}"


@MODES
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual_dtype", [None, torch.float32, torch.bfloat16])
def test_autocast(input_dtype: torch.dtype, residual_dtype: torch.dtype | None, training: bool) -> None:
    """The dtype and the numbers of eager under autocast, whether or not the residual promotes."""
    call = bn_act_call((2, 12, 7, 5), input_dtype, parameter_dtype=torch.float32, training=training)
    if residual_dtype is None:
        call = call.replace(residual=None)
    else:
        call = call.replace(residual=call.tensors["residual"].to(residual_dtype))  # type: ignore[union-attr]

    def run(functions: contract.Functions) -> contract.Results:
        with torch.autocast("cpu", torch.bfloat16):
            dtype = contract.forward(functions, call.map(torch.clone)).dtype
            grad_output = Values(dtype, seed=1).normal(*call.input.shape)
            return contract.results(functions, call, grad_output)

    fused, eager = run(contract.FUSED), run(contract.EAGER)
    grad_output = Values(fused["output"].dtype, seed=1).normal(2, 12, 7, 5)
    reference = contract.results(contract.EAGER, call.truth(), grad_output)
    narrow = torch.bfloat16 if torch.bfloat16 in (input_dtype, residual_dtype) else torch.float32
    contract.assert_within_contract(fused, eager, reference, narrow, floor=4e-3)  # and a few flipped masks


def test_statistics_that_are_views_are_updated_where_they_lie() -> None:
    """Running statistics that are columns of a larger tensor, and in bfloat16."""
    input = torch.randn(4, 6, 5, 5)
    for dtype in (torch.float32, torch.bfloat16):
        mean, var = torch.zeros(6, 2, dtype=dtype), torch.ones(6, 2, dtype=dtype)
        values = input if dtype == torch.float32 else input.bfloat16()
        resfuse.bn_act(values, mean[:, 1], var[:, 0], training=True)
        expected = torch.zeros(6), torch.ones(6)
        F.batch_norm(values.float(), *expected, training=True)
        torch.testing.assert_close(mean[:, 1].float(), expected[0], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(var[:, 0].float(), expected[1], rtol=1e-2, atol=1e-2)
        assert (mean[:, 0] == 0).all() and (var[:, 1] == 1).all()
