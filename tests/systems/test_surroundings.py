"""Fused calls under PyTorch's modes, defaults and transforms behave as the eager operators do."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import resfuse

MODES = pytest.mark.parametrize("training", [False, True])


def layers(training: bool, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, nn.Module]:
    """conv + bn + ReLU, eager and fused."""
    convolution = nn.Conv2d(4, 6, **{"kernel_size": 3, "dtype": dtype, **options})
    eager = nn.Sequential(convolution, nn.BatchNorm2d(6, dtype=dtype), nn.ReLU()).train(training)
    fused = copy.deepcopy(eager)
    resfuse.fuse_(fused)
    return eager, fused


class CoarseConvolutions(TorchDispatchMode):
    """Rounds the results of convolutions, as a mode that emulates other hardware does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        return (output * 4).round() / 4 if func is torch.ops.aten.convolution.default else output


class CoarseFunctions(TorchFunctionMode):
    """The same one level above."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        return (output * 4).round() / 4 if func is torch.conv2d else output


@MODES
@pytest.mark.parametrize("mode", [CoarseConvolutions, CoarseFunctions])
def test_modes_see_pytorchs_operators(mode: type, training: bool) -> None:
    eager, fused = layers(training)
    x = torch.randn(2, 4, 8, 8)
    plain = fused(x)
    with mode():
        torch.testing.assert_close(fused(x), eager(x))
        assert not torch.allclose(fused(x), plain)


def test_dispatch_modes_see_the_operator_of_a_function() -> None:
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    with Names():
        resfuse.add_relu(x, x.detach()).sum().backward()
    assert {"resfuse.add_relu_forward.default", "resfuse.add_relu_backward.default"} <= set(names)


def test_make_fx_records_pytorchs_operators() -> None:
    eager, fused = layers(training=False)
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        graph = make_fx(fused)(x)
        x[0, 0, 3, 3] = torch.nan
        assert torch.equal(graph(x).isnan(), eager(x).isnan())


@MODES
@pytest.mark.parametrize("part", [slice(None), slice(1, None)], ids=["conv_bn_act", "bn_act"])
def test_batched_gradients(part: slice, training: bool) -> None:
    eager, fused = (model[part] for model in layers(training))
    x = (torch.randn(2, 6, 5, 5) if part.start else torch.randn(2, 4, 5, 5)).requires_grad_()
    directions = torch.randn(3, *eager(x).shape)
    grads = [torch.autograd.grad(model(x), x, directions, is_grads_batched=True)[0] for model in (eager, fused)]
    torch.testing.assert_close(grads[1], grads[0])


def test_batched_gradients_of_add_relu() -> None:
    x, residual, directions = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4), torch.randn(5, 2, 3, 4)
    found = torch.autograd.grad(resfuse.add_relu(x, residual), x, directions, is_grads_batched=True)[0]
    torch.testing.assert_close(found, directions * (x + residual > 0))


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_default_dtype_does_not_leak(dtype: torch.dtype, training: bool) -> None:
    eager, fused = layers(training, dtype)
    x = torch.randn(2, 4, 8, 8, dtype=dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = fused(x)
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(found, eager(x), rtol=2e-2, atol=2e-2)


@MODES
def test_default_device_does_not_leak(training: bool) -> None:
    eager, fused = layers(training)
    x = torch.randn(2, 4, 8, 8)
    with torch.device("meta"):
        found = fused(x)
    torch.testing.assert_close(found, eager(x))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": np.int64(3), "padding": np.int64(1)},
        {"stride": np.int32(2)},
        {"dilation": np.int64(2)},
        {"stride": (2,)},
        {"padding": [1, 2]},
    ],
    ids=str,
)
def test_geometry_of_other_integers(options: dict[str, Any]) -> None:
    eager, fused = layers(training=False, **options)
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(fused(x), eager(x))


def test_a_residual_that_is_the_input_is_not_overwritten() -> None:
    x = torch.randn(2, 8, 20, 20).contiguous(memory_format=torch.channels_last)
    weight, mean, var = torch.randn(8, 8, 3, 3) * 0.2, torch.zeros(8), torch.ones(8)
    expected = torch.relu(F.batch_norm(F.conv2d(x, weight, padding=1), mean, var) + x)
    given = x.clone()
    found: Tensor = resfuse.conv_bn_act(x, weight, mean, var, residual=x, padding=1, overwrite_residual=True)
    torch.testing.assert_close(found, expected)
    assert torch.equal(x, given)


@MODES
def test_results_can_be_resized(training: bool) -> None:
    """Large results too, which do not come from an allocation that the caller cannot own."""
    _, fused = layers(training)
    for resize in (lambda y: y.resize_(8, 6, 200, 200), lambda y: y.untyped_storage().resize_(0)):
        with torch.no_grad():
            resize(fused(torch.randn(4, 4, 102, 102)))
