"""Descriptions of devices, the ceilings of this one, and what the cost model refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from resfuse import costs
from resfuse.costs import DEVICES, Cost, Device, Operation, TensorInfo, measure
from resfuse.processor import processor_name

DEVICE = Device("d", "cuda", 1e12, {torch.float32: 1e12, torch.bfloat16: 4e12}, 1 << 30, 0.0, "made up")
X = TensorInfo((2, 8, 4, 4), torch.float32)
V = TensorInfo((8,), torch.float32)
WEIGHT = TensorInfo((8, 8, 1, 1), torch.float32)


def test_known_devices() -> None:
    for name, device in DEVICES.items():
        assert costs.describe(name.upper()) is device
        assert device.type == "cuda" and device.capability is not None and device.capability >= (8, 0)
        assert "measured" in device.source or "datasheet" in device.source
        assert device.rate(torch.bfloat16) == device.rate(torch.float16) == 2 * device.rate(torch.float32)
        # The roofline's ridge: FLOPs per byte from which on arithmetic is the limit.
        assert 100 < device.rate(torch.bfloat16) / device.bandwidth < 320
    assert (DEVICES["h200"].bandwidth, DEVICES["h200"].rate(torch.bfloat16)) == (4.3e12, 790e12)
    with pytest.raises(ValueError, match="device: expected one of h200, h100, a100, b200, got 'h300'"):
        costs.describe("h300")


def test_a_dtype_without_a_rate_has_that_of_float32() -> None:
    assert DEVICE.rate(torch.float64) == 1e12
    with pytest.raises(ValueError, match=r"d has no rate of torch.float64, nor of torch.float32"):
        dataclasses.replace(DEVICE, rates={torch.bfloat16: 1.0}).rate(torch.float64)


def test_costs_add_up_and_have_a_roofline() -> None:
    assert Cost(1, 2, 3) + Cost(10, 20, 30) == Cost(11, 22, 33) == sum([Cost(11, 22, 33)], Cost(0, 0, 0))
    with pytest.raises(TypeError):
        sum([Cost(1, 2, 3)])  # which begins with 0
    assert costs.roofline(Cost(0, 10**12, 1), torch.float32, DEVICE) == 1.0
    assert costs.roofline(Cost(8 * 10**12, 10**12, 1), torch.bfloat16, DEVICE) == 2.0
    assert costs.roofline(Cost(8 * 10**12, 10**12, 1), torch.float32, DEVICE) == 8.0


def test_tensor_info() -> None:
    assert (X.numel, X.bytes) == (256, 1024)
    assert TensorInfo((), torch.bfloat16).bytes == 2
    assert TensorInfo((4, 0), torch.bfloat16).bytes == 0


@pytest.mark.parametrize(
    ("operation", "backend", "message"),
    [
        (Operation("a.b", "conv2d", (X,), (), X), None, r"parameters: expected a weight of 4 dimensions .* at 'a.b'"),
        (Operation("", "linear", (X,), (V,), X), None, r"weight of 2 dimensions first for linear .*\[\(8,\)\]"),
        (Operation("", "add_relu", (X,), (), X), "cpu", "inputs: expected two for add_relu at '', got 1"),
        (Operation("", "bn_act", (V,), (V,), V), "cpu", r"inputs: expected \(N, C, H, W\) first for bn_act"),
        (Operation("", "bn_act", (X, X, X), (V,), X), "cpu", "and at most a residual for bn_act at '', got 3"),
        (Operation("", "bn_act", (X,), (V,), X), "cudnn", "backend: expected one of cuda, triton, cpu, reference"),
        (Operation("", "conv_bn_act", (X,), (WEIGHT,), X, {"stride": "1"}), "cpu", "stride: expected one integer"),
        (Operation("", "bn_act", (X,), (V,), X), "cuda", "device: d has no capability, num_sms, shared_memory"),
    ],
)  # fmt: skip
def test_bad_input_is_named(operation: Operation, backend: str | None, message: str) -> None:
    for cost in (costs.forward_cost, costs.backward_cost):
        with pytest.raises(ValueError, match=message):
            cost(operation, training=True, backend=backend, device=DEVICE)


def test_triton_has_to_be_installed_for_its_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    from resfuse.backends import triton

    monkeypatch.setattr(triton, "import_failure", lambda: "Triton is not installed")
    operation = Operation("", "bn_act", (X,), (V,), X)
    with pytest.raises(ValueError, match="backend 'triton': Triton is not installed"):
        costs.forward_cost(operation, training=True, backend="triton", device=DEVICES["h100"])


# --- this machine ----------------------------------------------------------------------------------------------------


def test_ceilings_of_the_processor() -> None:
    device = costs.measure_device(torch.device("cpu"), seconds=0.05)
    assert (device.type, device.name, device.launch) == ("cpu", processor_name(), 0.0)
    assert device.source.startswith(f"measured on {processor_name()}, {torch.get_num_threads()} threads, 20")
    assert 1e8 < device.bandwidth < 1e13
    assert set(device.rates) == {torch.float32, torch.bfloat16}
    assert all(1e8 < rate < 1e16 for rate in device.rates.values())
    assert device.memory > device.l2 >= 1 << 15


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
def test_ceilings_of_a_gpu() -> None:
    device = costs.measure_device(torch.device("cuda"), seconds=0.05)
    assert device.name == torch.cuda.get_device_name()
    assert device.capability == torch.cuda.get_device_capability()
    assert 1e10 < device.bandwidth < 1e14
    assert set(device.rates) == {torch.float32, torch.bfloat16, torch.float16}
    assert device.rate(torch.bfloat16) > device.rate(torch.float32) / 2
    assert 1e-8 < device.launch < 1e-3
    assert device.num_sms > 0 and device.shared_memory > 48 << 10 and device.l2 > 0


def test_what_a_measurement_divides_by_what(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock by which everything takes half a second."""
    calls = []

    def clock(run: Any) -> float:
        calls.append(run())
        return 0.5

    cpu = torch.device("cpu")
    assert measure._bandwidth(cpu, 1 << 20, 1e-9, clock) == 2 * (1 << 20) / 0.5
    assert len(calls) == 3  # however little time there is
    assert calls[0].std() > 0.5  # random
    assert measure._rate(cpu, torch.bfloat16, 64, 1e-9, clock) == 2 * 64**3 / 0.5
    assert calls[-1].dtype == torch.bfloat16
    assert calls[-1].float().std() > 1


def test_products_in_tf32_where_convolutions_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    with measure._multiplying_as_convolutions():
        expected = "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]
        assert torch.backends.cuda.matmul.fp32_precision == expected
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_the_measurement_says_what_it_can_not_do() -> None:
    with pytest.raises(ValueError, match="device: expected a CPU or a CUDA device, got meta"):
        costs.measure_device(torch.device("meta"))
    with pytest.raises(ValueError, match="seconds: expected a positive number, got 0"):
        costs.measure_device(torch.device("cpu"), seconds=0)
