"""Passes over memory: what each operator reads and writes on paper, and what stays on the chip."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from resfuse import costs
from resfuse.costs import Cost, Operation
from tests.cost_operations import BACKENDS, H200, ON_GPUS, backward, forward, info

X = info(8, 64, 56, 56)
SIZE = X.bytes
VECTORS = (info(64, dtype=torch.float32),) * 4
SMALL = 16 * 64 * 4  # what vectors may add


@pytest.mark.parametrize(
    ("name", "inputs", "options", "passes"),
    [
        ("relu", 1, {"inplace": True}, (2, 3)),
        ("relu", 1, {"needs_input_grad": False}, (2, 0)),
        ("add", 2, {}, (3, 3)),
        ("mul", 2, {}, (3, 6)),
        ("dropout", 1, {"training": False}, (0, 0)),
        ("dropout", 1, {"training": True}, (2.5, 2.5)),
        ("flatten", 1, {}, (0, 0)),
        ("cat", 1, {}, (2, 0)),
        ("contiguous", 1, {}, (2, 2)),
        ("batch_norm", 1, {"training": True}, (3, 5)),
        ("batch_norm", 1, {"training": False}, (2, 4)),
        ("batch_norm", 1, {"training": False, "needs_parameter_grad": False}, (2, 2)),
        ("something_else", 1, {}, (2, 2)),
    ],
)
def test_passes_of_atens_operators(name: str, inputs: int, options: Any, passes: tuple[float, float]) -> None:
    operation = Operation("", name, (X,) * inputs, VECTORS if name == "batch_norm" else (), X, options)
    found = forward(operation).bytes, backward(operation).bytes
    for count, expected in zip(found, passes, strict=True):
        assert expected * SIZE <= count <= expected * SIZE + SMALL
    assert costs.is_estimated(operation) == (name == "something_else")


def test_pooling_and_squeeze_and_excite() -> None:
    pooled, gate = info(8, 64, 28, 28), info(8, 64, 1, 1)
    indices = 8 * pooled.numel
    pool = Operation("", "max_pool2d", (X,), (), pooled)
    assert forward(pool) == Cost(0, SIZE + pooled.bytes + indices, 1)
    assert backward(pool) == Cost(0, 2 * SIZE + pooled.bytes + indices, 2)
    average = Operation("", "adaptive_avg_pool2d", (X,), (), gate)
    assert forward(average) == backward(average) == Cost(0, SIZE + gate.bytes, 1)
    scale = Operation("", "mul", (X, gate), (), X)
    assert forward(scale) == Cost(0, 2 * SIZE + gate.bytes, 1)
    # dy gate -> dx; dy x -> a product, which is summed; and dx meets the gradient that came through the gate
    assert backward(scale) == Cost(0, (2 + 3 + 1 + 3) * SIZE + 2 * gate.bytes, 4)
    padded = Operation("", "pad", (X,), (), info(8, 64, 58, 58))
    assert forward(padded) == Cost(0, padded.output.bytes + 2 * SIZE, 2)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_passes_of_bn_act(backend: str) -> None:
    """Of a tensor that is much larger than all shared memory."""
    x = info(1024, 64, 112, 112)
    operation = Operation("", "bn_act", (x, x), VECTORS, x, {"relu": True})
    forward_passes, backward_passes = 2 + 1, 3 + 1 + 2 + 1 + 3  # x, r -> y; dy, y, x -> g; g, x -> dx; two paths met
    inference, training = forward(operation, backend), forward(operation, backend, training=True)
    assert inference.bytes == pytest.approx(forward_passes * x.bytes, rel=0.03)
    assert training.bytes == pytest.approx((forward_passes + 1) * x.bytes, rel=0.03)
    assert backward(operation, backend).bytes == pytest.approx(backward_passes * x.bytes, rel=0.03)
    alone = dataclasses.replace(operation, inputs=(x,))
    assert backward(alone, backend).bytes == pytest.approx((3 + 3 + 1) * x.bytes, rel=0.03)
    plain = dataclasses.replace(alone, options={"relu": False})
    assert backward(plain, backend).bytes == pytest.approx((2 + 2 + 1) * x.bytes, rel=0.03)


@pytest.mark.parametrize("name", ["bn_act", "conv_bn_act"])
def test_a_narrower_residual_is_placed_first(name: str) -> None:
    """Two launches, in inference and in training, behind which nothing changes."""
    r, parameters = info(8, 16, 56, 56), (info(64, 64, 1, 1), *VECTORS) if name == "conv_bn_act" else VECTORS
    for backend in (name for name in BACKENDS if name != "reference"):
        for training in (False, True):
            whole, narrow = (
                Operation("", name, (X, residual), parameters, X, {"overwrite_residual": True}) for residual in (X, r)
            )
            extra = forward(narrow, backend, training).bytes - forward(whole, backend, training).bytes
            assert extra == pytest.approx(SIZE + r.bytes, abs=SMALL)  # r copied; the other channels cleared


def test_what_stays_in_shared_memory_is_read_once() -> None:
    small, large = info(32, 64, 14, 14), info(256, 64, 112, 112)
    again = {}
    for x in (small, large):
        operation = Operation("", "bn_act", (x,), VECTORS, x)
        again[x] = forward(operation, "cuda", training=True).bytes / x.bytes - 2
    assert again[small] < 0.01
    assert again[large] > 0.9


CONV_VECTORS = (info(256, dtype=torch.float32),) * 4


def convolution(batch: int, residual: bool = False, **options: Any) -> Operation:
    """1x1 on 56 x 56, 64 -> 256 channels."""
    x, z = info(batch, 64, 56, 56), info(batch, 256, 56, 56)
    weight = info(256, 64, 1, 1)
    return Operation("", "conv_bn_act", (x, z) if residual else (x,), (weight, *CONV_VECTORS), z, options)


@pytest.mark.parametrize("backend", ON_GPUS)
def test_z_is_read_again_only_where_it_left_the_registers(backend: str) -> None:
    """One image: a tile per block.  Many: more tiles than are resident, and all but the last of each are read again."""
    for batch in (1, 256):
        x, z = (info(batch, channels, 28, 28) for channels in (64, 256))
        operation = Operation("", "conv_bn_act", (x, z), (info(256, 64, 1, 1), *CONV_VECTORS), z)
        found = forward(operation, backend, training=True)
        once = x.bytes + operation.parameters[0].bytes + 3 * z.bytes
        again = (found.bytes - once) / z.bytes
        assert found.launches == 1
        assert again == pytest.approx(0, abs=0.02) if batch == 1 else 0.9 < again < 1.01


def test_where_the_blocks_are_not_resident_there_are_two_launches() -> None:
    """4096 tiles of channels wait for nobody: none of the two backends has so many blocks at a time."""
    x, z = info(1, 16, 4, 4), info(1, 1 << 19, 4, 4)
    operation = Operation("", "conv_bn_act", (x,), (info(1 << 19, 16, 1, 1), *CONV_VECTORS), z)
    for backend in ON_GPUS:
        kernels = costs.forward_kernels(operation, training=True, backend=backend, device=H200)
        assert [bool(kernel.flops) for kernel in kernels] == [True, False]
        assert sum(kernel.bytes for kernel in kernels) >= 3 * z.bytes


def test_split_sums_are_counted() -> None:
    """Batch 1 at 7 x 7: too few tiles for the GPU, so that several blocks share the sum of one."""
    operation = Operation("", "conv_bn_act", (info(1, 512, 7, 7),), (info(512, 512, 3, 3), *CONV_VECTORS), info(1, 512, 7, 7), {"padding": 1})  # fmt: skip  # noqa: E501
    once = operation.inputs[0].bytes + operation.parameters[0].bytes + operation.output.bytes
    for backend in ON_GPUS:
        assert forward(operation, backend).bytes > once + 8 * operation.output.numel


def test_frozen_batch_norm_has_a_shorter_backward() -> None:
    """Running statistics and no gradient of weight and bias: z is not computed again, nor read."""
    frozen = convolution(64, training=False, requires_grad={"input", "conv_weight"})
    trained = convolution(64, training=False, requires_grad={"input", "conv_weight", "weight", "bias"})
    for backend in BACKENDS:
        saved = backward(trained, backend).flops - backward(frozen, backend).flops
        assert saved == forward(frozen, backend).flops  # of z, computed again
        assert backward(frozen, backend).bytes < backward(trained, backend).bytes
    only_norm = convolution(64, requires_grad={"weight", "bias"})
    assert backward(only_norm, "cuda").flops == 0
    if "triton" in BACKENDS:  # which computes dz as it loads it, and never writes it
        one_gradient = convolution(64, training=False, requires_grad={"conv_weight"})
        assert backward(one_gradient, "triton").bytes < backward(one_gradient, "cuda").bytes


def test_synchronised_batch_norm() -> None:
    """Its two halves, which a traced model has, and between them what is small."""
    x = info(64, 64, 56, 56)
    whole = Operation("", "sync_bn_act", (x, x), VECTORS, x)
    mean = VECTORS[0]
    statistics = Operation("", "bn_statistics", (x,), (), mean)
    apply = Operation("", "bn_apply", (x, mean, mean, x), VECTORS[:2], x)
    for backend in BACKENDS:
        halves = forward(statistics, backend, True) + forward(apply, backend, True)
        between = forward(whole, backend, True).launches - halves.launches
        assert 10 < between < 40
        assert forward(whole, backend, True).bytes == pytest.approx(halves.bytes, rel=0.01)
        # Of the residual's path either counts: both have the residual.
        halves = backward(statistics, backend) + backward(apply, backend)
        assert backward(whole, backend).bytes == pytest.approx(halves.bytes, rel=0.01)
    assert forward(whole, "cuda", True).bytes == pytest.approx(4 * x.bytes, rel=0.01)  # x; x, r -> y
    assert backward(whole, "cuda").bytes == pytest.approx((3 + 1 + 2 + 1 + 3) * x.bytes, rel=0.01)
    frozen = Operation("", "bn_statistics", (x,), (), mean, {"requires_grad": frozenset()})
    assert backward(frozen, "cuda") == Cost(0, 0, 0)
