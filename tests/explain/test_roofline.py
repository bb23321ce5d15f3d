"""Bytes, FLOPs and launches of operator calls against hand-computed ones and against what the backends launch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import resfuse
from resfuse import roofline
from resfuse.backends import dispatch
from resfuse.roofline import Device, Kernel
from resfuse.tracing import Tracer

GPU = Device("a GPU", "cuda", 1e12, {torch.float32: 1e12, torch.bfloat16: 4e12}, "made up", (8, 0))
SHAPE = (8, 64, 56, 56)
SIZE = 2 * 8 * 64 * 56 * 56  # B of an activation in bfloat16
SMALL = 16 * 64 * 4  # B that vectors may add


class Apply(nn.Module):
    """A function as a module, on an input, another one in the same shape, and a gate for each channel."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, other: Tensor, gate: Tensor) -> Any:
        return self.function(x, other, gate)


def moved(model: nn.Module, *shapes: tuple[int, ...], device: Device = GPU) -> tuple[int, int]:
    """Bytes of forward, and of the gradients of everything, in bfloat16."""
    inputs = [torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    inputs = [input.to(memory_format=torch.channels_last).detach().requires_grad_() for input in inputs]
    model = model.to("meta", torch.bfloat16)
    both, forward = (resfuse.explain(model, *inputs, device=device, backward=b).total.bytes for b in (True, False))
    return forward, both - forward


def batch_norm(training: bool, affine: bool = True) -> Callable[..., Tensor]:
    def function(x: Tensor, other: Tensor, gate: Tensor) -> Tensor:
        vector = gate[0, :, 0, 0]
        weight = vector if affine else None
        return F.batch_norm(x, vector.detach(), vector.detach(), weight, weight, training)

    return function


@pytest.mark.parametrize(
    ("function", "forward", "backward"),
    [
        (lambda x, r, gate: torch.relu(x), 2, 3),
        (lambda x, r, gate: torch.relu_(x * gate), 2 + 2, 3 + 2 + 3 + 1),  # the product with x is written, then summed
        (lambda x, r, gate: x + r, 3, 0),
        (lambda x, r, gate: x + gate.expand(x.shape), 2, 1),  # what is only expanded has no memory
        (lambda x, r, gate: torch.relu(x) + x, 2 + 3, 3 + 3),  # two paths meet, and their gradients are added
        (lambda x, r, gate: x * r, 3, 6),
        (lambda x, r, gate: torch.cat((x, r)), 4, 0),
        (lambda x, r, gate: x.permute(0, 2, 3, 1).flatten(0, 2), 0, 0),
        (lambda x, r, gate: F.dropout(x, training=False), 0, 0),
        (lambda x, r, gate: x.float(), 3, 3),
        (batch_norm(True), 3, 5),
        (batch_norm(False), 2, 4),
        (batch_norm(False, affine=False), 2, 2),
        (lambda x, r, gate: resfuse.add_relu(x, r), 3, 3),
        (lambda x, r, gate: resfuse.bn_act(x, *[gate[0, :, 0, 0].detach()] * 2, residual=r), 3, 5),
        # x twice; then dy, x, y -> the masked gradient, which is read again with x, -> dx
        (lambda x, r, gate: resfuse.bn_act(x, None, None, residual=r, training=True), 4, 3 + 1 + 2 + 1),
        (lambda x, r, gate: resfuse.bn_act(x, None, None, training=True), 3, 2 + 2 + 1),  # without y
        (lambda x, r, gate: resfuse.bn_act(x, None, None, training=True, activation="identity"), 3, 2 + 2 + 1),
    ],
)
def test_passes_over_an_activation(function: Callable[..., Any], forward: int, backward: int) -> None:
    found = moved(Apply(function), SHAPE, SHAPE, (1, 64, 1, 1))
    for count, expected in zip(found, (forward, backward), strict=True):
        assert expected * SIZE <= count <= expected * SIZE + SMALL


def test_bytes_of_pooling_and_of_a_convolution() -> None:
    pooled = SIZE // 4
    indices = 8 * (pooled // 2)
    assert moved(nn.MaxPool2d(2), SHAPE) == (SIZE + pooled + indices, 2 * SIZE + pooled + indices)
    weight, z = 2 * 256 * 64, 4 * SIZE
    convolution = nn.Conv2d(64, 256, 1)
    bias = 2 * 256
    gradients = 2 * (SIZE + weight + z) + z + bias
    assert moved(convolution, SHAPE) == (SIZE + weight + bias + z + 2 * z, gradients)
    on_cpu = dataclasses.replace(GPU, type="cpu")
    assert moved(convolution, SHAPE, device=on_cpu) == (SIZE + weight + bias + z, gradients)


@pytest.mark.parametrize("residual", [False, True])
def test_bytes_of_conv_bn_act(residual: bool) -> None:
    weight, z, r = 2 * 256 * 64, 4 * SIZE, 4 * SIZE * residual

    def found(training: bool) -> tuple[int, int]:
        def function(x: Tensor, other: Tensor, conv_weight: Tensor) -> Tensor:
            v = None if training else conv_weight[:, 0, 0, 0].detach()
            return resfuse.conv_bn_act(x, conv_weight, v, v, residual=other if residual else None, training=training)

        return moved(Apply(function), SHAPE, (8, 256, 56, 56), (256, 64, 1, 1))

    assert found(False)[0] == pytest.approx(SIZE + weight + z + r, abs=4 * SMALL)
    forward, backward = found(True)
    assert forward == pytest.approx(SIZE + weight + 3 * z + r, abs=4 * SMALL)  # z is written, and read again
    batch_norm, masked = 2 * z + 2 * z + z, 0  # dy, z; again; dz
    if residual:  # with y; g is written, and read in place of dy and y
        batch_norm, masked = 3 * z + 2 * z + z, r
    gradients = 2 * (SIZE + weight + z)
    assert backward == pytest.approx(batch_norm + masked + gradients, abs=4 * SMALL)


def test_what_fits_the_cache_is_not_read_again() -> None:
    model = Apply(lambda x, r, gate: resfuse.bn_act(x, None, None, training=True))
    for cache, expected in ((SIZE, 2), (SIZE // 2, 2.5)):
        found, _ = moved(model, SHAPE, SHAPE, (1, 64, 1, 1), device=dataclasses.replace(GPU, cache=cache))
        assert found == pytest.approx(expected * SIZE, abs=SMALL)


@pytest.mark.parametrize(
    ("shape", "convolution"),
    [
        ((2, 6, 9, 8), nn.Conv2d(6, 4, 3, stride=2, padding=1)),
        ((1, 5, 9, 9), nn.Conv2d(5, 7, 1)),
        ((2, 6, 9, 8), nn.Conv2d(6, 9, (3, 2), padding=(1, 0), groups=3)),
        ((2, 4, 9, 8), nn.ConvTranspose2d(4, 6, 2, stride=2)),
        ((5, 32), nn.Linear(32, 10)),
    ],
)
def test_flops_are_those_that_torch_counts(shape: tuple[int, ...], convolution: nn.Module) -> None:
    """Of the gradient of a grouped convolution's weight, torch counts products across groups, which nobody makes."""
    input = torch.randn(shape, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        convolution(input)
    forward = counter.get_total_flops()
    models = [(convolution, None)]
    if type(convolution) is nn.Conv2d:
        models.append((nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels)), "cuda"))
    for model, backend in models:
        for backward, expected in ((False, forward), (True, 3 * forward)):
            found = resfuse.explain(model, input, device=GPU, backward=backward, backend=backend)
            assert found.total.flops == expected


def test_roofline_of_a_kernel() -> None:
    assert Kernel(0, 10**12).seconds(GPU) == 1.0
    assert Kernel(8 * 10**12, 10**12, torch.bfloat16).seconds(GPU) == 2.0
    assert Kernel(8 * 10**12, 10**12).seconds(GPU) == 8.0
    assert Kernel(8 * 10**12, 10**12).is_compute_bound(GPU) and not Kernel(10**12, 2 * 10**12).is_compute_bound(GPU)
    assert GPU.rate(torch.float64) == GPU.rate(torch.float32)


@pytest.mark.parametrize("type_", ["cpu", "cuda"])
def test_ceilings_of_this_machine(type_: str) -> None:
    if type_ == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA GPU")
    device = roofline.measure_device(torch.device(type_), seconds=0.02)
    assert device.name == (torch.cuda.get_device_name() if type_ == "cuda" else roofline.processor_name())
    assert device.source.startswith(f"measured on {device.name}")
    assert 1e8 < device.bandwidth < 1e14 and all(1e8 < rate < 1e16 for rate in device.rates.values())
    assert device.cache >= 1 << 15


def test_a_measurement_divides_work_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, dict[str, Any]] = {}
    monkeypatch.setattr(
        roofline, "_seconds", lambda statement, at_least, **names: seen.setdefault(statement, names) and 0.5
    )
    monkeypatch.setattr(roofline, "_last_level_cache", lambda: 1 << 20)
    device = roofline.measure_device(torch.device("cpu"))
    assert device.bandwidth == 2 * 4 * (4 << 20) / 0.5
    assert device.rates[torch.float32] == max(2 * 1024**3, 2 * 4 * 21**2 * 256 * 256 * 9) / 0.5
    assert seen["target.copy_(source)"]["source"].std() > 0.5
    with pytest.raises(ValueError, match="device: expected a CPU or a CUDA device, got meta"):
        roofline.measure_device(torch.device("meta"))


# Launches, against the backends' own


def block(stride: int, groups: int) -> nn.Module:
    """A residual block, with a projection, behind a batch norm of its own."""
    downsample = resfuse.nn.ConvBNAct2d(16, 32, 1, stride=stride, activation="identity")
    block = resfuse.nn.BasicBlock(16, 32, stride=stride, downsample=downsample)
    return nn.Sequential(resfuse.nn.BNAct2d(16), block, resfuse.nn.ConvBNAct2d(32, 16, 3, groups=groups))


def fused_launches(model: nn.Module, shape: tuple[int, ...], backward: bool) -> int:
    """Kernels of resfuse's operators but for the gradients of convolutions, which are cuDNN's."""
    runs = itertools.chain.from_iterable(
        (*call.forward, *call.backward) for call in Tracer(model, (shape,)).calls(backward=backward)
    )
    own = [run for run in runs if run.func.namespace == "resfuse" and "conv_backward" not in str(run.func)]
    assert own
    return sum(len(roofline.kernels(*run, GPU)) for run in own)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 4)])
def test_launches_of_cuda(stride: int, groups: int, training: bool) -> None:
    from tests.emulator import backend as emulator

    if (reason := emulator.unavailable_reason()) is not None:
        pytest.skip(f"emulator: {reason}")
    dispatch.register("cuda_emulator", emulator)
    model = block(stride, groups).train(training).to(memory_format=torch.channels_last)
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    emulated_gpu = emulator.device(resident_blocks=64)
    with resfuse.use_backend("cuda_emulator"), emulated_gpu, emulator.launches() as found:
        output = model(x) if training else model.requires_grad_(False)(x)
        if training:
            output.sum().backward()
    assert found.launches == fused_launches(model, (2, 16, 8, 8), training)
