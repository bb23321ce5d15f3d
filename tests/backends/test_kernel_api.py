"""Promises of the convolution kernels for GPUs beyond the numerical contract: 64-bit offsets, memory that is reused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from resfuse.backends import dispatch
from resfuse.types import BatchNorm
from resfuse.types import Convolution as Settings
from tests import shapes
from tests.shapes import CONVOLUTIONS, conv_bn_act_call

BACKEND = pytest.mark.parametrize("backend", [name for name in shapes.BACKENDS if name not in ("cpu", "reference")])


@BACKEND
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("channels", [64, 65], ids=["copied_by_16_bytes", "by_value"])
def test_offsets_beyond_32_bits(channels: int, training: bool, backend: str) -> None:
    """Pixels from 2^31 elements on; of the input, 4 GB, only those pages are touched that the stride reaches."""
    kernels, device = dispatch.backend(backend), shapes.devices_of(backend)[0]
    side, stride = 5888, 2900
    size = channels * side**2
    assert size > 2**31
    memory = torch.tensor([], dtype=torch.float16, device=device)
    memory.set_(torch.UntypedStorage(2 * size, device=device))  # type: ignore[call-overload]
    x = memory.as_strided((1, channels, side, side), (size, 1, channels * side, channels))
    pixels, w = torch.randn(1, channels, 3, 3).half().to(device), torch.randn(16, channels, 1, 1).half().to(device)
    x[:, :, ::stride, ::stride] = pixels
    convolution = Settings((stride, stride), (0, 0), (1, 1), 1)
    if training:
        bn = BatchNorm(None, None, None, None, True, 0.1, 1e-5)
        z = kernels.conv_bn_act_forward(x, w, None, convolution, bn, None, False)[1]
    else:
        z = kernels.conv_forward(x, w, None, convolution)
    expected = F.conv2d(pixels.double(), w.double())
    torch.testing.assert_close(z.double(), expected, rtol=2**-10, atol=1e-2)  # sums of 64 products, rounded once


@BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_the_residual_is_overwritten_where_that_is_allowed(dtype: torch.dtype, backend: str) -> None:
    kernels, device = dispatch.backend(backend), shapes.devices_of(backend)[0]
    for conv, layout in (("3x3", "nhwc"), ("3x3", "nhwc_misaligned"), ("3x3_odd_channels", "nhwc")):
        call = conv_bn_act_call(CONVOLUTIONS[conv], dtype, device, layout="nhwc", residual_layout=layout)
        residual = call.tensors["residual"]
        args = call.input, call.tensors["conv_weight"], None, call.convolution, call.batch_norm, residual, True
        expected = kernels.conv_bn_act_forward(*args)[0]
        assert expected.data_ptr() != residual.data_ptr()
        found = kernels.conv_bn_act_forward(*args, overwrite_residual=True)[0]
        assert found.data_ptr() == residual.data_ptr()
        assert torch.equal(found, expected)
