"""What operations cost on paper: whole networks against known totals and FLOPs against torch's count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import resfuse
from resfuse import costs
from resfuse.costs import Cost, Operation, TensorInfo
from resfuse.tracing import operations
from tests.cost_operations import BACKENDS, BF16, H200, ResNet50, backward, forward, info

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
