"""Random shapes, layouts, dtypes and options, within what stays small: the contract holds for all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import resfuse
from tests import contract, shapes
from tests.shapes import BOTH_FORMATS, LAYOUTS, Convolution, add_relu_call, bn_act_call, conv_bn_act_call

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

# The fixtures hold for all examples of a test alike.
MANY = settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

IMPLEMENTATIONS = {op: [param.values for param in shapes.implementations(op)] for op in contract.FUSED}
layouts = st.sampled_from(list(LAYOUTS))
channels = st.sampled_from([1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 65])
extents = st.integers(1, 12)
seeds = st.integers(0, 2**16)


def enough_values(shape: tuple[int, ...], training: bool) -> None:
    """With a handful of values per channel their deviations nearly cancel in the gradients, and errors are all noise.

    The fixed shapes hold such cases.
    """
    assume(not training or shape[0] * shape[2] * shape[3] >= 8)


@MANY
@given(
    implementation=st.sampled_from(IMPLEMENTATIONS["add_relu"]),
    shape=st.lists(extents, max_size=5),
    seed=seeds,
    data=st.data(),
)
def test_add_relu(implementation: Any, shape: list[int], seed: int, data: st.DataObject) -> None:
    backend, device, dtype = implementation
    assume(math.prod(shape) <= 20_000)
    chosen = layouts if len(shape) == 4 else st.just("nchw")
    call = add_relu_call(
        tuple(shape), dtype, device, layout=data.draw(chosen), residual_layout=data.draw(chosen), seed=seed
    )
    with resfuse.use_backend(backend):
        contract.check(call)


@MANY
@given(
    implementation=st.sampled_from(IMPLEMENTATIONS["bn_act"]),
    shape=st.tuples(st.integers(1, 4), channels, extents, extents),
    layout=layouts,
    residual_layout=st.none() | layouts,
    affine=st.booleans(),
    activation=st.sampled_from(["relu", "identity"]),
    training=st.booleans(),
    momentum=st.floats(0, 1),
    eps=st.sampled_from([1e-5, 1e-3, 0.1]),
    mean=st.sampled_from([0.0, 1.0, -20.0]),
    seed=seeds,
)
def test_bn_act(implementation: Any, shape: shapes.Shape4, training: bool, **rest: Any) -> None:
    backend, device, dtype = implementation
    enough_values(shape, training)
    with resfuse.use_backend(backend):
        contract.check(bn_act_call(shape, dtype, device, training=training, **rest))


@st.composite
def convolutions(draw: st.DrawFn) -> Convolution:
    kernel, dilation = draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (3, 2), (5, 5)])), draw(st.integers(1, 2))
    padding = (draw(st.integers(0, 2)), draw(st.integers(0, 2)))
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    groups = draw(st.sampled_from([1, 1, 2, 5]))
    in_channels, out_channels = groups * draw(st.integers(1, 20)), groups * draw(st.integers(1, 20))
    # Where PyTorch itself goes wrong, and is no measure: see test_known_bugs.
    if in_channels == groups:
        stride = (stride[0], stride[0])
    if kernel == (1, 1) and in_channels < 16:
        stride = (1, 1)
    smallest = [dilation * (k - 1) + 1 - 2 * p for k, p in zip(kernel, padding, strict=True)]
    size = [draw(st.integers(max(1, low), max(1, low) + 8)) for low in smallest]
    # No narrower than the stride: there PyTorch's own bfloat16 weight gradient is no measure of anything.
    size = [max(extent, step) for extent, step in zip(size, stride, strict=True)]
    return Convolution(
        (draw(st.integers(1, 3)), in_channels, size[0], size[1]), out_channels, kernel, stride, padding,
        (dilation, dilation), groups,
    )  # fmt: skip


@MANY
@given(
    implementation=st.sampled_from(IMPLEMENTATIONS["conv_bn_act"]),
    conv=convolutions(),
    layout=st.sampled_from(BOTH_FORMATS),
    weight_layout=st.sampled_from(BOTH_FORMATS),
    residual_layout=st.none() | layouts,
    conv_bias=st.booleans(),
    affine=st.booleans(),
    activation=st.sampled_from(["relu", "identity"]),
    training=st.booleans(),
    seed=seeds,
)
def test_conv_bn_act(implementation: Any, conv: Convolution, training: bool, **rest: Any) -> None:
    backend, device, dtype = implementation
    enough_values(conv.output, training)
    with resfuse.use_backend(backend):
        contract.check(conv_bn_act_call(conv, dtype, device, training=training, **rest))


@MANY
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    size=st.integers(1, 9),
    scale=st.floats(0.01, 100),
    mean=st.floats(-100, 100),
    seed=seeds,
)
def test_statistics_do_not_depend_on_how_the_batch_is_cut(
    sizes: list[int], size: int, scale: float, mean: float, seed: int
) -> None:
    """Each backend's bn_statistics of the parts, merged by Chan's formula, are those of the whole."""
    input = shapes.Values(torch.float32, seed=seed).normal(sum(sizes), 5, size, size, scale=scale, mean=mean)
    truth = input.double()
    whole = truth.mean((0, 2, 3)), truth.var((0, 2, 3), correction=0) * (truth.numel() // 5)
    for backend, device, dtype in (param.values for param in shapes.implementations("split", [torch.float32])):
        for layout in BOTH_FORMATS:
            run = resfuse.backends.registry.backend(backend)
            values = LAYOUTS[layout](input.to(device, dtype))
            parts = [(part.numel() // 5, *run.bn_statistics(part)) for part in values.split(sizes)]
            count, merged, m2 = parts[0]
            for other, other_mean, other_m2 in parts[1:]:
                delta, total = other_mean - merged, count + other
                m2 = m2 + other_m2 + delta.square() * count * other / total
                merged, count = merged + delta * other / total, total
            # A mean is a float32: off by eps / 2 of its size, which enters M2 squared, times the count, and times
            # 2 sqrt(count M2) where parts with different means are merged.
            error = torch.finfo(torch.float32).eps * max(abs(mean), scale)
            assert (merged.cpu() - whole[0]).abs().max() <= 8 * error
            slack = 4 * error * (count * whole[1]).sqrt() + count * error**2 + 1e-6 * whole[1]
            assert ((m2.cpu() - whole[1]).abs() <= slack).all()
