"""What operations cost on paper: whole networks against known totals, FLOPs against torch's count, and passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import resfuse
from resfuse import costs
from resfuse.backends import triton
from resfuse.costs import Cost, Device, Operation, TensorInfo
from resfuse.tracing import operations
from tests.network_operations import ResNet50

BACKENDS = ["cuda", "cpu", "reference"]
if triton.import_failure() is None:
    BACKENDS.append("triton")
ON_GPUS = [name for name in BACKENDS if name in ("cuda", "triton")]

H200 = costs.describe("h200")
BF16 = torch.bfloat16


def info(*shape: int, dtype: torch.dtype = BF16) -> TensorInfo:
    return TensorInfo(shape, dtype)


def forward(operation: Operation, backend: str | None = None, training: bool = False, device: Device = H200) -> Cost:
    return costs.forward_cost(operation, training=training, backend=backend, device=device)


def backward(operation: Operation, backend: str | None = None, training: bool = True, device: Device = H200) -> Cost:
    return costs.backward_cost(operation, training=training, backend=backend, device=device)


# --- whole networks --------------------------------------------------------------------------------------------------


def images_per_second(network: ResNet50, backend: str | None, training: bool) -> float:
    """If every kernel ran at its roofline."""
    seconds = 0.0
    for operation in network.operations:
        kernels = costs.forward_kernels(operation, training=training, backend=backend, device=H200)
        if training:
            kernels += costs.backward_kernels(operation, training=True, backend=backend, device=H200)
        seconds += sum(costs.roofline(kernel, network.dtype, H200) for kernel in kernels)
    return network.operations[0].inputs[0].shape[0] / seconds


@pytest.mark.parametrize(
    ("training", "backend", "expected"),
    [
        (False, None, 24e3),
        (False, "cuda", 59e3),  # here with the indices that max_pool2d writes, 3 % of all bytes
        (True, None, 8.0e3),
        (True, "cuda", 10.8e3),
    ],
)
def test_resnet50_on_an_h200_as_in_the_design(training: bool, backend: str | None, expected: float) -> None:
    """DESIGN.md, section 6: images per second if every operator ran at the limit of an H200, batch 256, bfloat16."""
    network = ResNet50(256, fused=backend is not None)
    assert images_per_second(network, backend, training) == pytest.approx(expected, rel=0.04)


def test_flops_and_launches_of_resnet50() -> None:
    eager, fused = ResNet50(32, fused=False).operations, ResNet50(32, fused=True).operations
    for training in (False, True):
        flops = {forward_total(eager, None, training).flops}
        flops |= {forward_total(fused, name, training).flops for name in BACKENDS}
        assert flops == {32 * 2 * 4_089_184_256}  # the multiply-adds that torchvision names: 4.09e9
    # 53 convolutions, as many batch norms of two launches, ReLU but for four; 16 sums; two poolings; the classifier
    assert forward_total(eager, None, False).launches == 53 * 3 + 49 + 16 + 2 + 1
    assert forward_total(fused, "cuda", False).launches == 53 + 4 + 2 + 1  # and four for the padded image


def test_the_reference_costs_what_eager_costs() -> None:
    """Its verbs are PyTorch's own operators, one after the other."""
    eager, fused = ResNet50(2, fused=False).operations, ResNet50(2, fused=True).operations
    assert forward_total(fused, "reference", False) == forward_total(eager, None, False)


def forward_total(operations: list[Operation], backend: str | None, training: bool) -> Cost:
    return sum((forward(operation, backend, training) for operation in operations), Cost(0, 0, 0))


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_a_traced_network_costs_what_the_one_written_down_does(training: bool) -> None:
    """But for the counters of batches, which a training step adds one to."""
    model = resfuse.models.resnet50().to(BF16).train(training)
    traced = operations(model, (4, 3, 224, 224))
    batches = [operation for operation in traced if operation.output.dtype == torch.int64]
    assert len(batches) == (53 if training else 0)
    traced = tuple(operation for operation in traced if operation not in batches)
    written = ResNet50(4, fused=True).operations
    assert [len(costs_of(found, training)) for found in (traced, written)] == [56, 56]
    for one, other in zip(costs_of(traced, training), costs_of(written, training), strict=True):
        assert (one.flops, one.launches) == (other.flops, other.launches)
        assert one.bytes == pytest.approx(other.bytes, rel=0.01)  # vectors are in bfloat16, or in float32


def costs_of(operations: Sequence[Operation], training: bool) -> list[Cost]:
    """Forward and backward together, of what is not free."""
    found = [forward(one, "cuda", training) + backward(one, "cuda", training) for one in operations]
    return sorted(cost for cost in found if cost.launches)


# --- against torch's own count of FLOPs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "weight", "options"),
    [
        ((2, 6, 9, 8), (4, 6, 3, 3), {"stride": 2, "padding": 1}),
        ((2, 6, 9, 8), (9, 2, 3, 3), {"padding": (1, 0), "groups": 3}),
        ((1, 5, 9, 9), (7, 5, 1, 1), {}),
    ],
)
@pytest.mark.parametrize("name", ["conv2d", *BACKENDS])
def test_flops_of_a_convolution(name: str, shape: tuple[int, ...], weight: tuple[int, ...], options: Any) -> None:
    x, w = (torch.empty(size, device="meta", requires_grad=True) for size in (shape, weight))
    with FlopCounterMode(display=False) as counter:
        z = F.conv2d(x, w, **options)
    counted = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        z.sum().backward()
    fused = name != "conv2d"
    tensors = [TensorInfo(tuple(t.shape), torch.float32) for t in (x, w, z)]
    vectors = (info(weight[0]),) * 4 if fused else ()
    operation = Operation(
        "", "conv_bn_act" if fused else name, (tensors[0],), (tensors[1], *vectors), tensors[2], options
    )
    backend = name if fused else None
    assert forward(operation, backend, True).flops == forward(operation, backend).flops == counted
    assert backward(operation, backend).flops == 2 * counted
    if "groups" not in options:  # of which torch takes the gradient of the weight to have all products across groups
        assert counter.get_total_flops() == 2 * counted


def test_flops_of_a_linear_layer() -> None:
    operation = Operation("", "linear", (info(8, 32),), (info(10, 32), info(10)), info(8, 10))
    assert forward(operation).flops == 2 * 8 * 32 * 10
    assert backward(operation).flops == 2 * forward(operation).flops
    assert (forward(operation).launches, backward(operation).launches) == (1, 3)


# --- passes over memory ----------------------------------------------------------------------------------------------

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
