"""Every operator in the `resfuse` namespace keeps its promises to the dispatcher: schema, fake, mutation, strides."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import resfuse
from tests import shapes

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS = ("nchw", "nhwc", "nhwc_slice_of_channels", "transposed", "one_pixel")
BACKENDS = [name for name in shapes.BACKENDS if "cpu" in shapes.devices_of(name)]
Arguments = tuple[Any, ...]


def tensor(layout: str, channels: int = 8) -> Tensor:
    if layout == "one_pixel":
        return torch.randn(4, channels, 1, 1)
    return lay_out(torch.randn(2, channels, 6, 5), layout)


def lay_out(values: Tensor, layout: str) -> Tensor:
    return shapes.LAYOUTS[layout](values)


def vectors(channels: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """running_mean, running_var, weight, bias."""
    mean, var, weight, bias = (torch.randn(channels, dtype=dtype) for _ in range(4))
    return mean, var.abs() + 0.5, weight, bias


def check(name: str, arguments: Arguments) -> None:
    """PyTorch's own checks once, and on every backend the shapes, strides and dtypes that the fake promises."""
    op = getattr(torch.ops.resfuse, name).default
    torch.library.opcheck(op, arguments)
    with FakeTensorMode() as mode:
        promised = tree_leaves(op(*tree_map_only(Tensor, mode.from_tensor, arguments)))
    for backend in BACKENDS:
        with resfuse.use_backend(backend):
            results = tree_leaves(op(*arguments))
        for fake, found in zip(promised, results, strict=True):
            # opcheck compares strides only from torch 2.13 on.
            assert (fake.shape, fake.stride(), fake.dtype) == (found.shape, found.stride(), found.dtype), backend


def test_all_operators_are_here() -> None:
    schemas = torch._C._jit_get_all_schemas()
    registered = {schema.name.removeprefix("resfuse::") for schema in schemas if schema.name.startswith("resfuse::")}
    assert registered == {
        "add_relu_forward", "add_relu_backward", "bn_act_train", "bn_act_eval", "bn_act_backward",
        "conv_bn_act_train", "conv_bn_act_eval", "conv_forward", "conv_backward",
        "bn_statistics", "bn_apply", "bn_backward_reduce", "bn_backward_apply",
    }  # fmt: skip


@pytest.mark.parametrize("other", LAYOUTS[:3])
@pytest.mark.parametrize("layout", LAYOUTS[:4])
def test_add_relu(layout: str, other: str) -> None:
    check("add_relu_forward", (tensor(layout), tensor(other)))
    check("add_relu_backward", (tensor(other), tensor(layout)))


@pytest.mark.parametrize("residual", [None, "nchw", "nhwc"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bn_act(layout: str, residual: str | None) -> None:
    input = tensor(layout)
    added = None if residual is None else lay_out(torch.randn(input.shape), residual)
    check("bn_act_train", (input, *vectors(8), added, True, 0.1, 1e-5))
    check("bn_act_train", (input, None, None, None, None, added, False, 0.1, 1e-5))
    check("bn_act_eval", (input, *vectors(8), added, True, 1e-5))


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_bn_act_in_bfloat16(parameters: torch.dtype) -> None:
    input = tensor("nhwc").bfloat16()
    check("bn_act_train", (input, *vectors(8, parameters), None, True, 0.1, 1e-5))
    check("bn_act_eval", (input, *vectors(8, parameters), None, True, 1e-5))


@pytest.mark.parametrize("grad_layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bn_act_backward(layout: str, grad_layout: str) -> None:
    input = tensor(layout)
    grad_output = lay_out(torch.randn(input.shape), grad_layout)
    mean, invstd, weight, bias = vectors(8)
    output = torch.relu(torch.randn_like(input))
    for needs in itertools.product([True, False], repeat=2):
        check("bn_act_backward", (grad_output, input, output, weight, None, mean, invstd, True, True, *needs))
    check("bn_act_backward", (grad_output, input, output, weight, None, mean, invstd, True, False, True, True))
    check("bn_act_backward", (grad_output, input, None, weight, bias, mean, invstd, True, True, True, False))
    check("bn_act_backward", (grad_output, input, None, None, None, mean, invstd, False, True, True, False))


@pytest.mark.parametrize("other_layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_of_synchronised_batch_norm(layout: str, other_layout: str) -> None:
    input = tensor(layout)
    other = lay_out(torch.randn(input.shape), other_layout)
    mean, invstd, weight, bias = vectors(8)
    check("bn_statistics", (input,))
    check("bn_apply", (input, mean, invstd, weight, bias, other, True))
    check("bn_apply", (input, mean, invstd, None, None, None, False))
    check("bn_backward_reduce", (other, input, torch.relu(other), weight, bias, mean, invstd, True))
    check("bn_backward_reduce", (other, input, None, weight, bias, mean, invstd, True))
    check("bn_backward_reduce", (other, input, None, None, None, mean, invstd, False))
    check("bn_backward_apply", (other, input, weight, mean, invstd, bias, weight))


CONVOLUTIONS = {
    "3x3": ((8, 4, 3, 3), [1, 1], [1, 1], [1, 1], 2),
    "1x1_stride2": ((12, 8, 1, 1), [2, 2], [0, 0], [1, 1], 1),
    "depthwise": ((8, 1, 3, 3), [1, 1], [1, 1], [2, 2], 8),
}


@pytest.mark.parametrize(
    ("layout", "weight_layout"),
    [("nchw", "nchw"), ("nchw", "nhwc"), ("nhwc", "nhwc"), ("nhwc_slice_of_channels", "nchw")],
)
@pytest.mark.parametrize("conv", CONVOLUTIONS)
def test_conv_bn_act(conv: str, weight_layout: str, layout: str) -> None:
    shape, *geometry = CONVOLUTIONS[conv]
    input, weight = tensor(layout), lay_out(torch.randn(shape), weight_layout)
    bias = torch.randn(shape[0])
    z = torch.ops.resfuse.conv_forward(input, weight, bias, *geometry)
    assert z.stride() == torch.conv2d(input, weight, bias, *geometry).stride()
    check("conv_forward", (input, weight, bias, *geometry))
    check("conv_bn_act_train", (input, weight, *vectors(shape[0]), bias, z, True, *geometry, 0.1, 1e-5))
    check("conv_bn_act_train", (input, weight, None, None, None, None, None, None, False, *geometry, 0.1, 1e-5))
    check("conv_bn_act_eval", (input, weight, *vectors(shape[0]), bias, z.contiguous(), True, *geometry, 1e-5))
    check("conv_bn_act_eval", (input, weight, *vectors(shape[0]), None, None, True, *geometry, 1e-5))
    for needs in ([True, True, True], [False, True, False], [True, False, True]):
        check("conv_backward", (z if needs[1] else z.contiguous(), input, weight, *geometry, needs))
