"""Every operator against the numerical contract: forward, every gradient, running statistics, on every backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import resfuse
from tests import cases, contract
from tests.contract import Call
from tests.poison import poisoned_allocations

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=resfuse.available_backends())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with resfuse.use_backend(request.param), poisoned_allocations():
        yield request.param


def supports(backend: str, dtype: torch.dtype) -> bool:
    return backend == "reference" or dtype in (torch.float32, torch.bfloat16)


def random(seed: int, shape: tuple[int, ...], dtype: torch.dtype, layout: str = "nchw") -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return cases.lay_out(values, layout) if len(shape) == 4 else values


def vectors(channels: int, dtype: torch.dtype, seed: int = 10) -> dict[str, Tensor]:
    """Statistics and affine parameters: some weights are negative, one is zero."""
    wide = dtype if dtype == torch.float64 else torch.float32
    weight = random(seed, (channels,), wide)
    weight[channels // 2] = 0 if channels > 2 else -1
    running = {"running_mean": random(seed + 1, (channels,), wide), "running_var": random(seed + 2, (channels,), wide)}
    running["running_var"] = running["running_var"].abs() + 0.5
    return running | {"weight": weight, "bias": random(seed + 3, (channels,), wide)}


def bn_call(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    layout: str = "channels_last",
    residual: str | None = None,
    affine: bool = True,
    **options: Any,
) -> Call:
    tensors: dict[str, Tensor | None] = {"input": random(0, shape, dtype, layout), **vectors(shape[1], dtype)}
    if not affine:
        tensors |= {"weight": None, "bias": None}
    if residual is not None:
        tensors["residual"] = random(1, shape, dtype, residual)
    return Call("bn_act", tensors, options)


def conv_call(
    conv: cases.Convolution,
    dtype: torch.dtype,
    *,
    layout: str = "channels_last",
    weight_layout: str = "nchw",
    residual: str | None = None,
    conv_bias: bool = False,
    **options: Any,
) -> Call:
    in_channels = conv.input[1] // conv.groups
    scale = (in_channels * conv.kernel[0] * conv.kernel[1]) ** -0.5
    weight = random(2, (conv.out_channels, in_channels, *conv.kernel), torch.float32) * scale
    tensors: dict[str, Tensor | None] = {
        "input": random(0, conv.input, dtype, layout),
        "conv_weight": cases.lay_out(weight.to(dtype), weight_layout),
        **vectors(conv.out_channels, dtype),
    }
    if conv_bias:
        tensors["conv_bias"] = random(3, (conv.out_channels,), dtype)
    if residual is not None:
        shape = resfuse.layout.conv_output_shape(
            torch.Size(conv.input), weight.shape, conv.stride, conv.padding, conv.dilation
        )
        tensors["residual"] = random(1, shape, dtype, residual)
    return Call("conv_bn_act", tensors, conv.options | options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_add_relu(layout: str, dtype: torch.dtype, backend: str) -> None:
    if not supports(backend, dtype):
        pytest.skip(f"{backend} has no {dtype}")
    for index, shape in enumerate(cases.ACTIVATIONS.values()):
        other = cases.LAYOUTS[(index + 1) % len(cases.LAYOUTS)]
        for residual in (layout, other):
            tensors = {"input": random(0, shape, dtype, layout), "residual": random(1, shape, dtype, residual)}
            contract.check(Call("add_relu", tensors))


@pytest.mark.parametrize("shape", [(), (1,), (17,), (3, 5), (2, 3, 4, 5, 6)])
def test_add_relu_of_any_rank(shape: tuple[int, ...], backend: str) -> None:
    input = torch.randn(shape)
    assert torch.equal(resfuse.add_relu(input, input.flip(0) if shape else input), torch.relu(
        input + (input.flip(0) if shape else input)))  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", cases.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bn_act(dtype: torch.dtype, shape: str, training: bool, backend: str) -> None:
    if not supports(backend, dtype):
        pytest.skip(f"{backend} has no {dtype}")
    size = cases.ACTIVATIONS[shape]
    for layout in cases.LAYOUTS:
        for residual in (None, layout, "nchw"):
            contract.check(bn_call(size, dtype, layout=layout, residual=residual, training=training))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("residual", [None, "nchw"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_bn_act_options(
    layout: str, residual: str | None, affine: bool, activation: str, training: bool, backend: str
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = bn_call((3, 40, 6, 5), dtype, layout=layout, residual=residual, affine=affine, training=training,
                       activation=activation, momentum=0.3, eps=1e-3)  # fmt: skip
        contract.check(call)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(("mean", "deviation"), [(1000.0, 0.01), (-3e4, 1.0), (0.0, 1e-4)])
def test_large_mean_and_small_variance(mean: float, deviation: float, layout: str, backend: str) -> None:
    """Where sums of squares would cancel."""
    call = bn_call((4, 19, 23, 21), torch.float32, layout=layout, training=True, activation="identity")
    contract.check(call.replace(input=call.input * deviation + mean))


def test_values_that_drift_through_the_batch(backend: str) -> None:
    """What one pass over memory with a moving centre has to get right: the first values tell nothing of the rest."""
    call = bn_call((4, 19, 33, 31), torch.float32, training=True, activation="identity")
    drift = torch.linspace(0, 1, 4 * 33 * 31).view(4, 1, 33, 31)
    for input in (call.input + 1e4 * drift, call.input * 1e-3 + (drift > 0.5) * 1e3):
        contract.check(call.replace(input=input.to(memory_format=torch.channels_last)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("conv", cases.CONVOLUTIONS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_conv_bn_act(training: bool, conv: str, dtype: torch.dtype, backend: str) -> None:
    if not supports(backend, dtype):
        pytest.skip(f"{backend} has no {dtype}")
    options: dict[str, Any] = {"training": training}
    for layout, weight_layout, residual, bias in (
        ("channels_last", "channels_last", None, False),
        ("nchw", "nchw", "nchw", True),
        ("sliced", "channels_last", "channels_last", False),
        ("misaligned", "nchw", "sliced", True),
    ):
        call = conv_call(cases.CONVOLUTIONS[conv], dtype, layout=layout, weight_layout=weight_layout,
                         residual=residual, conv_bias=bias, **options)  # fmt: skip
        contract.check(call)
        if not training:
            check_without_gradients(call)


def check_without_gradients(call: Call) -> None:
    """In eval mode the forward without gradients may take another way (folded weights)."""
    with torch.no_grad():
        fused = {"output": contract.forward(contract.FUSED, call)}
        eager = {"output": contract.forward(contract.EAGER, call)}
        reference = {"output": contract.forward(contract.EAGER, call.truth())}
    contract.assert_within_contract(fused, eager, reference, call.input.dtype)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("residual", [None, "channels_last"])
def test_conv_bn_act_options(residual: str | None, activation: str, training: bool, backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = conv_call(cases.CONVOLUTIONS["3x3"], dtype, residual=residual, conv_bias=True, training=training,
                         activation=activation, momentum=0.3, eps=1e-3)  # fmt: skip
        contract.check(call)
        without = call.replace(weight=None, bias=None)
        contract.check(without)
        if training:
            contract.check(without.replace(running_mean=None, running_var=None))
        else:
            check_without_gradients(call)


@pytest.mark.parametrize("op", ["bn_act", "conv_bn_act"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_bfloat16_parameters_and_statistics(training: bool, op: str, backend: str) -> None:
    """model.bfloat16() rounds batch norm's tensors too."""
    if op == "bn_act":
        call = bn_call((3, 40, 6, 5), torch.bfloat16, training=training)
    else:
        call = conv_call(cases.CONVOLUTIONS["3x3"], torch.bfloat16, training=training)
    contract.check(call.map(Tensor.bfloat16))


def test_layout_of_the_output(backend: str) -> None:
    """bn_act and add_relu keep the input's; conv_bn_act is channels_last if input or weight is."""
    for layout in ("nchw", "channels_last"):
        call = bn_call((2, 16, 6, 5), torch.float32, layout=layout, residual="nchw", training=True)
        assert contract.forward(contract.FUSED, call).stride() == call.input.stride()
        for weight_layout in ("nchw", "channels_last"):
            for training in (True, False):
                call = conv_call(cases.CONVOLUTIONS["3x3"], torch.float32, layout=layout, weight_layout=weight_layout,
                                 residual="nchw", training=training)  # fmt: skip
                output = contract.forward(contract.FUSED, call)
                last = "channels_last" in (layout, weight_layout)
                assert output.is_contiguous(memory_format=torch.channels_last) is last
                assert output.is_contiguous() is not last


@pytest.mark.parametrize("residual_dtype", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast(training: bool, residual_dtype: torch.dtype | None) -> None:
    """The dtype that eager gives under autocast, promotion by the residual included, and its values."""
    call = conv_call(cases.CONVOLUTIONS["3x3"], torch.float32, residual="channels_last", training=training)
    residual = call.tensors["residual"]
    call = call.replace(residual=None if residual_dtype is None or residual is None else residual.to(residual_dtype))
    for grad in (True, False):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
            leaves = call.map(lambda tensor: tensor.clone())
            for name in ("input", "conv_weight"):
                leaves.tensors[name].requires_grad_(grad)  # type: ignore[union-attr]
            fused = contract.forward(contract.FUSED, leaves)
            eager = contract.forward(contract.EAGER, call.map(torch.clone))
        assert fused.dtype == eager.dtype
        assert fused.requires_grad is grad
        torch.testing.assert_close(fused, eager, rtol=0.05, atol=0.05)
        if grad:
            fused.float().sum().backward()
            assert leaves.tensors["conv_weight"].grad.dtype == torch.float32  # type: ignore[union-attr]


@pytest.mark.parametrize("verb", ["statistics", "apply", "reduce", "backward"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_split_verbs_equal_the_whole(verb: str, layout: str, backend: str) -> None:
    """What synchronised batch norm is made of."""
    run, reference = resfuse.backends.registry.backend(backend), resfuse.backends.reference
    x, r, dy = (random(seed, (3, 40, 7, 5), torch.float32, layout) for seed in range(3))
    weight, bias = random(3, (40,), torch.float32), random(4, (40,), torch.float32)
    mean, m2 = reference.bn_statistics(x)
    invstd = (m2 / (x.numel() // 40) + 1e-5).rsqrt()
    if verb == "statistics":
        torch.testing.assert_close(run.bn_statistics(x), (mean, m2))
        return
    y = reference.bn_apply(x, mean, invstd, weight, bias, r, True)
    if verb == "apply":
        torch.testing.assert_close(run.bn_apply(x, mean, invstd, weight, bias, r, True), y)
        return
    for mask in (y, None):
        sum_g, sum_g_xhat, g = reference.bn_backward_reduce(dy, x, mask, mean, invstd)
        if verb == "reduce":
            found = run.bn_backward_reduce(dy, x, mask, mean, invstd)
            torch.testing.assert_close(found, (sum_g, sum_g_xhat, g), rtol=1e-4, atol=1e-4)
        else:
            for count in (105, None):
                args = (dy, x, mask, weight, mean, invstd, sum_g, sum_g_xhat, count)
                torch.testing.assert_close(run.bn_backward_apply(*args), reference.bn_backward_apply(*args))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_convolution(training: bool, backend: str, data: st.DataObject) -> None:
    """Random shapes and options, within sizes that stay small."""
    draw, small = data.draw, st.integers(1, 3)
    groups = draw(st.integers(1, 4))
    pair = lambda strategy: (draw(strategy), draw(strategy))  # noqa: E731
    kernel, stride, dilation = pair(small), pair(small), pair(st.integers(1, 2))
    padding = pair(st.integers(0, 2))
    extent = [d * (k - 1) + 1 - 2 * p for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = [draw(st.integers(max(1, low), max(1, low) + 7)) for low in extent]
    conv = cases.Convolution(
        (draw(st.integers(2, 4)), groups * draw(st.integers(1, 9)), size[0], size[1]),
        groups * draw(st.integers(1, 9)), kernel, stride, padding, dilation, groups,
    )  # fmt: skip
    layouts = st.sampled_from(["nchw", "channels_last"])
    call = conv_call(
        conv, draw(st.sampled_from([torch.float32, torch.bfloat16])), layout=draw(layouts), weight_layout=draw(layouts),
        residual=draw(st.none() | layouts), conv_bias=draw(st.booleans()), training=training,
        activation=draw(st.sampled_from(["relu", "identity"])),
    )  # fmt: skip
    contract.check(call)
