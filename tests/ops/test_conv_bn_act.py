"""conv_bn_act against the numerical contract: output, every gradient and the running statistics, on every backend."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import resfuse
from tests import contract, shapes
from tests.shapes import CONVOLUTIONS, DTYPES, FAST_DTYPES, LAYOUTS, Values, check_all, conv_bn_act_call, running

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
FAST = pytest.mark.parametrize("dtype", FAST_DTYPES)
# (input, residual, bias of the convolution)
FORMS = (("nchw", "nchw", True), ("nhwc", "nchw", False), ("nhwc", None, True))


@MODES
@pytest.mark.parametrize(("conv", "dtype", "form"), shapes.one_form_each(CONVOLUTIONS, DTYPES, FORMS))
def test_shapes(conv: str, dtype: torch.dtype, form: tuple[str, str | None, bool], training: bool) -> None:
    layout, residual_layout, conv_bias = form
    check_all(
        conv_bn_act_call(
            CONVOLUTIONS[conv], dtype, layout=layout, residual_layout=residual_layout, conv_bias=conv_bias,
            training=training,
        ),
        interpret=conv != "larger",
    )  # fmt: skip


@pytest.mark.slow
def test_several_tiles_in_the_interpreter() -> None:
    """Left out above: it takes seconds there."""
    for training in (True, False):
        check_all(conv_bn_act_call(CONVOLUTIONS["larger"], layout="nhwc", training=training))


@MODES
@FAST
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype, training: bool) -> None:
    """Input, weight and residual in any layouts; the output is channels_last if the input or the weight is."""
    conv = shapes.Convolution((2, 9, 6, 5), 9, (3, 3), padding=(1, 1))
    for other in shapes.partners(layout):
        call = conv_bn_act_call(
            conv, dtype, layout=layout, weight_layout=other, residual_layout=other, training=training
        )
        last = layout.startswith("nhwc") or other.startswith("nhwc")
        for found in check_all(call).values():
            memory_format = torch.channels_last if last else torch.contiguous_format
            assert found["output"].is_contiguous(memory_format=memory_format)


@MODES
@FAST
@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("with_residual", [True, False])
def test_options(with_residual: bool, activation: str, dtype: torch.dtype, training: bool) -> None:
    """Every combination of ReLU, residual, affine parameters and convolution bias, in alternating formats."""
    conv = shapes.Convolution((3, 13, 7, 6), 21, (3, 3), (2, 1), (1, 1))
    for affine, conv_bias in itertools.product([True, False], repeat=2):
        layout = "nhwc" if affine is conv_bias else "nchw"
        call = conv_bn_act_call(
            conv, dtype, layout=layout, residual_layout=layout if with_residual else None, affine=affine,
            conv_bias=conv_bias, activation=activation, training=training, momentum=0.3, eps=1e-3,
        )  # fmt: skip
        check_all(call)
        if training and affine is conv_bias:
            check_all(call.replace(running_mean=None, running_var=None))


@MODES
@pytest.mark.parametrize("wide", [True, False], ids=["float32_parameters", "half_parameters"])
def test_parameter_dtypes(wide: bool, training: bool) -> None:
    """As under autocast, and as after model.bfloat16()."""
    dtype = torch.float32 if wide else torch.bfloat16
    call = conv_bn_act_call(
        CONVOLUTIONS["3x3"], torch.bfloat16, layout="nhwc", parameter_dtype=dtype, training=training
    )
    for found in check_all(call).values():
        assert found["running_mean"].dtype == found["grad_weight"].dtype == dtype


@MODES
@FAST
def test_large_mean(dtype: torch.dtype, training: bool) -> None:
    """Inputs far from zero, as behind a ReLU of a wide layer: the batch mean is large against the deviations."""
    check_all(conv_bn_act_call(CONVOLUTIONS["3x3"], dtype, layout="nhwc", mean=30.0, training=training))


@MODES
@FAST
@pytest.mark.parametrize("frozen", ["input", "conv_weight", "conv_bias", "weight", "bias", "residual"])
def test_without_one_gradient(frozen: str, dtype: torch.dtype, training: bool) -> None:
    """A gradient that is not needed is not computed, and the others do not change: as for a frozen batch norm."""
    call = conv_bn_act_call(CONVOLUTIONS["3x3"], dtype, layout="nhwc", conv_bias=True, training=training)
    for found in check_all(call, needs_grad=[name for name in call.differentiable if name != frozen]).values():
        assert f"grad_{frozen}" not in found


@MODES
@FAST
@pytest.mark.parametrize("where", ["input", "residual", "bias", "running_mean", "conv_bias"])
def test_not_finite(where: str, dtype: torch.dtype, training: bool) -> None:
    """NaN and Inf reach the same elements of the output as in eager, also where a primitive's ReLU swallows NaN."""
    for conv, value in itertools.product(("3x3", "depthwise", "grouped"), (math.nan, math.inf, -math.inf)):
        if conv != "3x3" and (value == math.inf or where not in ("input", "residual")):
            continue
        call = conv_bn_act_call(
            CONVOLUTIONS[conv], dtype, layout="nhwc", residual_layout="nhwc", conv_bias=True, training=training
        )
        struck = call.tensors[where]
        assert struck is not None
        struck[(1, 3, 2, 2) if struck.dim() == 4 else 3] = value
        eager = contract.forward(contract.EAGER, call.map(torch.clone))
        for backend, device in running("conv_bn_act", dtype):
            with resfuse.use_backend(backend), torch.no_grad():
                fused = contract.forward(contract.FUSED, call.map(lambda t: t.to(device, copy=True))).cpu()  # noqa: B023
            assert torch.equal(fused.isnan(), eager.isnan()), f"{backend}, {conv}, {value}"
            assert torch.equal(fused.isinf(), eager.isinf()), f"{backend}, {conv}, {value}"


@MODES
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", shapes.BOTH_FORMATS)
def test_autocast(layout: str, input_dtype: torch.dtype, residual_dtype: torch.dtype | None, training: bool) -> None:
    """The dtypes of eager under autocast, parameters and gradients in float32, and numbers within the contract."""
    conv = CONVOLUTIONS["3x3"]
    call = conv_bn_act_call(conv, torch.float32, layout=layout, conv_bias=True, training=training)
    residual = None if residual_dtype is None else call.tensors["residual"].to(residual_dtype)  # type: ignore[union-attr]
    call = call.replace(residual=residual, input=call.input.to(input_dtype))
    with torch.autocast("cpu", torch.bfloat16):
        dtype = contract.forward(contract.EAGER, call.map(torch.clone)).dtype
    grad_output = Values(dtype, seed=1).normal(*conv.output)

    def run(functions: contract.Functions) -> contract.Results:
        with torch.autocast("cpu", torch.bfloat16):
            return contract.results(functions, call, grad_output)

    assert dtype == (torch.float32 if residual_dtype == torch.float32 else torch.bfloat16)
    rounded = call.map(lambda tensor: tensor.bfloat16().float() if tensor.dim() == 4 else tensor)
    rounded = rounded.replace(residual=residual, conv_bias=call.tensors["conv_bias"].bfloat16())  # type: ignore[union-attr]
    undecided = contract.decided_by_rounding(rounded.replace(input=call.input.bfloat16()))
    grad_output.masked_fill_(undecided, 0)
    fused, eager = run(contract.FUSED), run(contract.EAGER)
    reference = contract.results(contract.EAGER, rounded.truth(), grad_output.double())
    terms = contract.term_sizes(rounded, grad_output)
    contract.assert_within_contract(fused, eager, reference, torch.bfloat16, terms)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        output = contract.forward(contract.FUSED, call.map(torch.clone))
    assert output.dtype == dtype
    torch.testing.assert_close(output, eager["output"], rtol=4e-2, atol=4e-2)  # other roundings of bfloat16, 2^-8


@MODES
def test_autocast_leaves_float64_alone(training: bool) -> None:
    call = conv_bn_act_call(CONVOLUTIONS["3x3"], torch.float64, training=training)
    with torch.autocast("cpu", torch.bfloat16):
        contract.check(call)


def test_a_residual_may_be_overwritten_only_where_allowed() -> None:
    call = conv_bn_act_call(CONVOLUTIONS["3x3"], layout="nhwc", residual_layout="nhwc")
    residual = call.tensors["residual"]
    assert residual is not None
    expected, kept = contract.forward(contract.EAGER, call), residual.clone()
    for options in ({}, {"overwrite_residual": True}):
        leaves = call.map(lambda tensor: tensor.detach().requires_grad_())
        output = resfuse.conv_bn_act(**leaves.tensors, **call.options, **options)  # type: ignore[arg-type]
        assert torch.equal(residual, kept)  # gradients are recorded: backward of others may need it
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        output = resfuse.conv_bn_act(**call.tensors, **call.options, overwrite_residual=True)  # type: ignore[arg-type]
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
