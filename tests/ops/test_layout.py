"""Gradients arrive in any layout: results are the same, and channels_last activations stay channels_last."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import resfuse
from tests import contract, shapes
from tests.shapes import CONVOLUTIONS, LAYOUTS, Values, add_relu_call, bn_act_call, conv_bn_act_call

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

SHAPE = CONVOLUTIONS["3x3"].output
CALLS: dict[str, Callable[..., contract.Call]] = {
    "add_relu": lambda *where, **layouts: add_relu_call(SHAPE, *where, **layouts),
    "bn_act": lambda *where, **layouts: bn_act_call(SHAPE, *where, **layouts, training=True),
    "conv_bn_act": lambda *where, **layouts: conv_bn_act_call(CONVOLUTIONS["3x3"], *where, **layouts, training=True),
    "conv_bn_act-eval": lambda *where, **layouts: conv_bn_act_call(CONVOLUTIONS["3x3"], *where, **layouts),
}


@pytest.mark.parametrize("dtype", shapes.FAST_DTYPES)
@pytest.mark.parametrize("grad", ["expanded", "nhwc", "nchw", "transposed", "nhwc_slice_of_channels"])
@pytest.mark.parametrize("layout", shapes.BOTH_FORMATS)
@pytest.mark.parametrize("name", CALLS)
def test_gradient_layouts(name: str, layout: str, grad: str, dtype: torch.dtype) -> None:
    op = name.removesuffix("-eval")
    for backend, device in shapes.running(op, dtype):
        call = CALLS[name](dtype, device, layout=layout, residual_layout=layout)
        values = Values(dtype, device, 1).normal(*SHAPE)
        grad_output = values[:1, :, :1].expand_as(values) if grad == "expanded" else LAYOUTS[grad](values)
        with resfuse.use_backend(backend):
            found = contract.results(contract.FUSED, call, grad_output)
            expected = contract.results(contract.FUSED, call, LAYOUTS[layout](grad_output.contiguous()))
        for key, tensor in expected.items():
            # The same kernels on the same values: only the order of sums may differ, and not on our kernels.
            torch.testing.assert_close(found[key], tensor, msg=f"{backend}: {key}")
        if layout == "nhwc" and op != "add_relu":
            for key in ("output", "grad_input"):
                assert found[key].is_contiguous(memory_format=torch.channels_last), f"{backend}: {key}"
                assert not found[key].is_contiguous(), f"{backend}: {key}"
