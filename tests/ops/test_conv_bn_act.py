"""conv_bn_act against the numerical contract: output, every gradient and the running statistics, on every backend."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import resfuse
from resfuse.backends import buffer_pool, cpu_conv
from tests import contract, shapes
from tests.shapes import CONVOLUTIONS, FAST_DTYPES, LAYOUTS, Values, conv_bn_act_call, implementations

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def check(call: contract.Call) -> contract.Results:
    """With gradients; and, as another path serves inference, without."""
    found = contract.check(call)
    if not call.options.get("training", False):
        with torch.no_grad():
            output = {"output": contract.forward(contract.FUSED, call)}
        channels_last = call.map(lambda tensor: _nhwc(tensor) if tensor.dim() == 4 else tensor)
        eager = [{"output": contract.forward(contract.EAGER, same)} for same in (call, channels_last)]
        truth = {"output": contract.forward(contract.EAGER, call.truth())}
        terms = contract.term_sizes(call, torch.ones_like(output["output"]))
        contract.assert_within_contract(output, eager, truth, call.input.dtype, terms)
    return found


def _nhwc(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


@MODES
@pytest.mark.parametrize(("backend", "device", "dtype"), implementations("conv_bn_act"))
@pytest.mark.parametrize("conv", CONVOLUTIONS)
def test_shapes(conv: str, backend: str, device: str, dtype: torch.dtype, training: bool) -> None:
    for layout, residual_layout, conv_bias in (("nchw", "nchw", True), ("nhwc", "nchw", False), ("nhwc", None, True)):
        call = conv_bn_act_call(
            CONVOLUTIONS[conv], dtype, device, layout=layout, residual_layout=residual_layout, conv_bias=conv_bias,
            training=training,
        )  # fmt: skip
        with resfuse.use_backend(backend):
            check(call)


@MODES
@pytest.mark.parametrize("dtype", FAST_DTYPES)
@pytest.mark.parametrize("conv", CONVOLUTIONS)
def test_paths_of_large_outputs(conv: str, dtype: torch.dtype, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large outputs of the cpu backend lie in pooled memory and are accumulated onto zeros: here small ones are."""
    if not shapes.supports("cpu", "conv_bn_act", dtype, "cpu") or "cpu" not in resfuse.available_backends():
        pytest.skip("the cpu backend does not run here")
    monkeypatch.setattr(buffer_pool, "SMALLEST", 1)
    monkeypatch.setattr(cpu_conv, "MAPPED_ANEW", 1)
    monkeypatch.setattr(cpu_conv, "POOLED_GRADIENT", 1)
    used = buffer_pool.allocated()
    for layout, residual_layout in (("nhwc", "nhwc"), ("nhwc", None), ("nchw", "nhwc")):
        call = conv_bn_act_call(
            CONVOLUTIONS[conv], dtype, layout=layout, residual_layout=residual_layout, conv_bias=layout == "nchw",
            training=training,
        )  # fmt: skip
        with resfuse.use_backend("cpu"):
            check(call)
    assert buffer_pool.allocated() > used or buffer_pool._limit == 0
    call.input[0, 0, 0, 0] = math.nan
    with resfuse.use_backend("cpu"), torch.no_grad():
        fused = contract.forward(contract.FUSED, call.map(torch.clone))
    assert torch.equal(fused.isnan(), contract.forward(contract.EAGER, call.map(torch.clone)).isnan())


@MODES
@pytest.mark.parametrize(("backend", "device", "dtype"), implementations("conv_bn_act", FAST_DTYPES))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, backend: str, device: str, dtype: torch.dtype, training: bool) -> None:
    """Input, weight and residual in any layouts; the output is channels_last if the input or the weight is."""
    conv = shapes.Convolution((2, 9, 6, 5), 9, (3, 3), padding=(1, 1))
    for other in LAYOUTS:
        call = conv_bn_act_call(
            conv, dtype, device, layout=layout, weight_layout=other, residual_layout=other, training=training
        )
        with resfuse.use_backend(backend):
            output = check(call)["output"]
        last = layout.startswith("nhwc") or other.startswith("nhwc")
        assert output.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@MODES
@pytest.mark.parametrize(("backend", "device", "dtype"), implementations("conv_bn_act", FAST_DTYPES))
@pytest.mark.parametrize("layout", shapes.BOTH_FORMATS)
def test_options(layout: str, backend: str, device: str, dtype: torch.dtype, training: bool) -> None:
    """Every combination of ReLU, residual, affine parameters and convolution bias."""
    conv = shapes.Convolution((3, 13, 7, 6), 21, (3, 3), (2, 1), (1, 1))
    for activation, residual, affine, conv_bias in itertools.product(
        ["relu", "identity"], [layout, None], [True, False], [True, False]
    ):
        call = conv_bn_act_call(
            conv, dtype, device, layout=layout, residual_layout=residual, affine=affine, conv_bias=conv_bias,
            activation=activation, training=training, momentum=0.3, eps=1e-3,
        )  # fmt: skip
        with resfuse.use_backend(backend):
            check(call)
            if training:
                contract.check(call.replace(running_mean=None, running_var=None))


@MODES
@pytest.mark.parametrize(("backend", "device", "dtype"), implementations("conv_bn_act", [torch.bfloat16]))
@pytest.mark.parametrize("wide", [True, False], ids=["float32_parameters", "half_parameters"])
def test_parameter_dtypes(wide: bool, backend: str, device: str, dtype: torch.dtype, training: bool) -> None:
    """As under autocast, and as after model.bfloat16()."""
    call = conv_bn_act_call(
        CONVOLUTIONS["3x3"], dtype, device, layout="nhwc", parameter_dtype=torch.float32 if wide else dtype,
        training=training,
    )  # fmt: skip
    with resfuse.use_backend(backend):
        found = check(call)
    for name in ("running_mean", "grad_weight"):
        assert found[name].dtype == (torch.float32 if wide else dtype)


@MODES
@pytest.mark.parametrize(("backend", "device", "dtype"), implementations("conv_bn_act", FAST_DTYPES))
def test_large_mean(backend: str, device: str, dtype: torch.dtype, training: bool) -> None:
    """Inputs far from zero, as behind a ReLU of a wide layer: the batch mean is large against the deviations."""
    call = conv_bn_act_call(CONVOLUTIONS["3x3"], dtype, device, layout="nhwc", mean=30.0, training=training)
    with resfuse.use_backend(backend):
        check(call)


@MODES
@pytest.mark.parametrize(("backend", "device", "dtype"), implementations("conv_bn_act", FAST_DTYPES))
@pytest.mark.parametrize("frozen", ["input", "conv_weight", "conv_bias", "weight", "bias", "residual"])
def test_without_one_gradient(frozen: str, backend: str, device: str, dtype: torch.dtype, training: bool) -> None:
    """What is not needed is not computed, and all else is what it was: above all for a frozen batch norm's weight."""
    call = conv_bn_act_call(CONVOLUTIONS["3x3"], dtype, device, layout="nhwc", conv_bias=True, training=training)
    with resfuse.use_backend(backend):
        found = contract.check(call, needs_grad=[name for name in call.differentiable if name != frozen])
    assert f"grad_{frozen}" not in found


@MODES
@pytest.mark.parametrize(("backend", "device", "dtype"), implementations("conv_bn_act", FAST_DTYPES))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["input", "residual", "bias", "running_mean", "conv_bias"])
def test_not_finite(where: str, value: float, backend: str, device: str, dtype: torch.dtype, training: bool) -> None:
    """NaN and Inf reach the same elements of the output as in eager, also where a primitive's ReLU swallows NaN."""
    for conv in ("3x3", "depthwise", "grouped"):
        call = conv_bn_act_call(
            CONVOLUTIONS[conv], dtype, device, layout="nhwc", residual_layout="nhwc", conv_bias=True, training=training
        )
        struck = call.tensors[where]
        assert struck is not None
        struck[(1, 3, 2, 2) if struck.dim() == 4 else 3] = value
        with resfuse.use_backend(backend), torch.no_grad():
            fused = contract.forward(contract.FUSED, call.map(torch.clone))
        eager = contract.forward(contract.EAGER, call.map(torch.clone))
        assert torch.equal(fused.isnan(), eager.isnan())
        assert torch.equal(fused.isinf(), eager.isinf())


@pytest.mark.parametrize(("backend", "device", "dtype"), implementations("conv_bn_act", FAST_DTYPES))
@pytest.mark.parametrize("grad", ["expanded", "nhwc", "nchw", "transposed", "nhwc_slice_of_channels"])
def test_gradient_layouts(grad: str, backend: str, device: str, dtype: torch.dtype) -> None:
    conv = CONVOLUTIONS["3x3"]
    for layout in shapes.BOTH_FORMATS:
        call = conv_bn_act_call(conv, dtype, device, layout=layout, residual_layout=layout, training=True)
        grad_output = Values(dtype, device, 1).normal(*conv.output)
        if grad == "expanded":
            grad_output = grad_output[:1, :, :1].expand_as(grad_output)
        same = LAYOUTS[layout](grad_output.contiguous())
        if grad != "expanded":
            grad_output = LAYOUTS[grad](grad_output)
        with resfuse.use_backend(backend):
            found = contract.results(contract.FUSED, call, grad_output)
            expected = contract.results(contract.FUSED, call, same)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, msg=name)


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


@pytest.mark.parametrize("form", ["int", "list", "pair"])
def test_forms_of_the_geometry(form: str) -> None:
    """stride, padding and dilation as F.conv2d takes them."""
    input, weight = torch.randn(2, 4, 9, 9), torch.randn(5, 4, 3, 3)
    running = torch.zeros(5), torch.ones(5)
    value = {"int": 2, "list": [2, 2], "pair": (2, 2)}[form]
    geometry = {"stride": value, "padding": value, "dilation": value}
    fused = resfuse.conv_bn_act(input, weight, *running, **geometry)  # type: ignore[arg-type]
    eager = torch.relu(F.batch_norm(F.conv2d(input, weight, **geometry), *running))  # type: ignore[arg-type]
    torch.testing.assert_close(fused, eager, rtol=1e-5, atol=1e-5)  # sums of 36 products of order one


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
