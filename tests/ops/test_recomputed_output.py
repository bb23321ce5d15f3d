"""In training the output is computed again from what is saved, bit for bit: backward takes the ReLU's mask from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import resfuse
from resfuse.backends import dispatch
from tests import shapes
from tests.shapes import DTYPES, Values, implementations

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUT = pytest.mark.parametrize("layout", shapes.BOTH_FORMATS)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Signs of zeros included; NaN is NaN."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    bits = (torch.where(tensor.isnan(), torch.nan, tensor).view(integer) for tensor in (one, other))
    return torch.equal(*bits)


def awkward(values: Values, channels: int, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """(input, weight, bias) with outputs around zero, on it, below the least value of the dtype, and not finite."""
    input = values.normal(4, channels, 5, 7)
    weight, bias = values.normal(channels, dtype=torch.float32), values.normal(channels, dtype=torch.float32) * 0.1
    input[:, 0] = 3  # no variance: exactly the bias, which is zero
    bias[0] = 0
    weight[1], bias[1] = 3e-39, 1e-42  # below the least bfloat16 and float16, not the least float32
    weight[2], bias[2] = 2.0**-24, 0  # around half of the least float16
    weight[3] = 0
    input[:, 4] *= 1e-3
    input[:, 4] += 100  # the mean is far away
    input[1, 5, 2, 3], input[2, 6, 1, 1] = torch.nan, torch.inf
    if values.dtype == torch.float64:
        weight, bias = weight.double(), bias.double()
    return shapes.LAYOUTS[layout](input), weight, bias


def forward(backend: Any, input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Any:
    bn = resfuse.types.BatchNorm(None, None, weight, bias, True, 0.1, 1e-5)
    return backend.bn_act_forward(input, bn, residual, True)


@pytest.mark.parametrize(("backend", "device", "dtype"), implementations("split", DTYPES))
@LAYOUT
@pytest.mark.parametrize("channels", [24, 19])
def test_bn_act(channels: int, layout: str, backend: str, device: str, dtype: torch.dtype) -> None:
    kernels, values = dispatch.backend(backend), Values(dtype, device)
    input, weight, bias = awkward(values, channels, layout)
    for residual in (None, shapes.LAYOUTS[layout](values.normal(*input.shape))):
        output, mean, invstd = forward(kernels, input, weight, bias, residual)
        assert same_bits(output, kernels.bn_apply(input, mean, invstd, weight, bias, residual, True))
    output, mean, invstd = forward(kernels, input, weight, bias, None)
    grad_output = shapes.LAYOUTS[layout](values.normal(*input.shape))
    vectors = (weight, bias, mean, invstd)
    from_output, from_input = (
        kernels.bn_backward_reduce(grad_output, input, mask, *vectors, True) for mask in (output, None)
    )
    expected = torch.where(output <= 0, 0, grad_output)
    assert 0.2 < (expected == 0).float().mean() < 0.8
    assert all(torch.equal(expected, masked) for _, _, masked in (from_output, from_input))
    for training in (True, False):
        known, found = (
            kernels.bn_act_backward(grad_output, input, mask, *vectors, True, training, True, needs_residual)
            for mask, needs_residual in ((output, True), (None, False))
        )
        assert all(same_bits(a, b) for a, b in zip(known[:3], found[:3], strict=True))


@pytest.mark.parametrize(("backend", "device", "dtype"), implementations("conv_bn_act", DTYPES))
@LAYOUT
@pytest.mark.parametrize("name", ["3x3", "3x3_odd_channels", "1x1_stride2_odd", "larger"])
def test_conv_bn_act(name: str, layout: str, backend: str, device: str, dtype: torch.dtype) -> None:
    """The output is that of the stored, rounded z."""
    kernels = dispatch.backend(backend)
    for residual_layout in (None, layout):
        call = shapes.conv_bn_act_call(
            shapes.CONVOLUTIONS[name], dtype, device, layout=layout, residual_layout=residual_layout, training=True
        )
        tensors, residual = call.tensors, call.tensors.get("residual")
        output, z, mean, invstd = kernels.conv_bn_act_forward(
            call.input, tensors["conv_weight"], None, call.convolution, call.batch_norm, residual, True
        )
        again = kernels.bn_apply(z, mean, invstd, tensors["weight"], tensors["bias"], residual, True)
        assert same_bits(output, again)


def saved_storages(function: Any) -> tuple[Tensor, set[int]]:
    """The output of a function, and the addresses of the memory that it saves for backward."""
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    return output, {tensor.untyped_storage().data_ptr() for tensor in kept}


@pytest.mark.parametrize("op", ["bn_act", "conv_bn_act"])
def test_output_is_saved_only_where_it_is_read(op: str) -> None:
    shape, conv = (2, 16, 8, 8), shapes.CONVOLUTIONS["3x3"]
    for residual, training in (("nchw", True), (None, True), (None, False)):
        options: Any = {"residual_layout": residual, "training": training}
        call = shapes.bn_act_call(shape, **options) if op == "bn_act" else shapes.conv_bn_act_call(conv, **options)
        for name in call.differentiable:
            call.tensors[name].requires_grad_()  # type: ignore[union-attr]
        output, saved = saved_storages(lambda call=call: getattr(resfuse, op)(**call.tensors, **call.options))
        read = residual is not None or not training
        assert (output.untyped_storage().data_ptr() in saved) is read, (residual, training)


@pytest.mark.parametrize("changed", ["weight", "bias"])
def test_a_vector_changed_before_backward_is_an_error(changed: str) -> None:
    """Rather than a mask that forward did not have."""
    call = shapes.bn_act_call((4, 8, 5, 5), residual_layout=None, training=True)
    vector = call.tensors[changed]
    assert vector is not None
    call.input.requires_grad_()
    output = resfuse.bn_act(**call.tensors, **call.options)
    vector += 10
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
