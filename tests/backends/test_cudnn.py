"""PyTorch's convolution with an epilogue of another backend: held against float64 on the CPU, with `cpu`'s epilogue."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

import resfuse
from resfuse.backends import cudnn, dispatch
from tests.contract import Oracle
from tests.shapes import CONVOLUTIONS, DTYPES, conv_bn_act_call, one_form_each, partners

FORMS = [
    ("nhwc", {"training": True}),
    ("nchw", {"training": False, "conv_bias": True}),
    ("nhwc", {"training": True, "residual_layout": None, "activation": "identity"}),
    ("nhwc", {"training": False, "residual_layout": None, "affine": False}),
]


@pytest.mark.parametrize(("name", "dtype", "form"), one_form_each(CONVOLUTIONS, DTYPES, FORMS))
def test_the_numerical_contract(
    name: str, dtype: torch.dtype, form: tuple[str, dict[str, Any]], one_thread: None
) -> None:
    layout, options = form
    options = {"residual_layout": partners(layout)[0], **options}
    Oracle(conv_bn_act_call(CONVOLUTIONS[name], dtype, layout=layout, **options)).check("cudnn")


def test_inference_under_autocast_and_a_narrow_residual() -> None:
    """Weights in float32, and a residual that is padded with zeros."""
    call = conv_bn_act_call(CONVOLUTIONS["1x1"], torch.bfloat16, residual_layout=None)
    x, w = call.input, call.tensors["conv_weight"]
    assert w is not None
    bn, residual = call.batch_norm, torch.randn(2, 20, 7, 7).bfloat16()
    args = (None, call.convolution, bn, residual, True)
    expected = dispatch.backend("reference").conv_bn_act_forward(x, w, *args)[0]
    for weight in (w, w.float()):
        torch.testing.assert_close(cudnn.conv_bn_act_forward(x, weight, *args)[0], expected, rtol=2e-2, atol=2e-2)


def test_the_epilogue_is_one_kernel_of_the_backend_that_would_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x, vector = torch.randn(2, 4, 5, 5), torch.ones(4)
    epilogue = dispatch.backend_for("bn_act_forward", x)
    spy = Mock(wraps=epilogue.bn_act_forward)
    monkeypatch.setattr(epilogue, "bn_act_forward", spy)
    with resfuse.use_backend("cudnn"):
        resfuse.conv_bn_act(x, torch.randn(4, 4, 1, 1), vector, vector.clone())
        assert spy.call_count == 1
        assert dispatch.backend_for("bn_act_forward", x) is dispatch.backend("reference"), "what it does not declare"


def test_it_has_no_rank() -> None:
    assert "cudnn" not in (*dispatch.PREFERENCE, *resfuse.available_backends())
    with pytest.raises(ValueError, match="a backend named 'cudnn' exists already"):
        dispatch.register("cudnn", cudnn)


@pytest.mark.parametrize("training", [False, True])
def test_explain_counts_two_launches(training: bool) -> None:
    """The convolution writes z, which the epilogue reads: one pass more in each direction than one launch has."""
    model = nn.Sequential(nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()).bfloat16().train(training)
    one, two = (
        resfuse.explain(model, (8, 64, 8, 8), device="h200", backend=name, backward=False).layers[-1]
        for name in ("cuda", "cudnn")
    )
    z = 2 * 8 * 64 * 8 * 8
    assert (one.launches, two.launches) == (1, 2) and one.flops == two.flops
    assert two.bytes - one.bytes == pytest.approx((1 if training else 2) * z, abs=64 * 2)
