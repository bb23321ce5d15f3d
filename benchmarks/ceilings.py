"""What the machine reaches, measured in the same run, and what a case would cost at that."""

from __future__ import annotations

import torch

import resfuse
from benchmarks.cases import Case
from benchmarks.providers import Setting
from benchmarks.records import CEILINGS, Conditions, Record, Roofline, Subject, dtype_text
from benchmarks.workload import needs_gradient
from resfuse.costs import Device


def ceiling_rows(device: Device, mode: str, conditions: Conditions) -> list[Record]:
    """The bandwidth of a copy, and the rate of a matrix product in each dtype."""
    copy = Subject(CEILINGS, "copy", "pytorch", mode, "", "", "")
    rows = [copy.record("bandwidth", [device.bandwidth], "B/s", conditions)]
    for dtype, rate in device.rates.items():
        product = Subject(CEILINGS, "matmul", "pytorch", mode, "", dtype_text(dtype), "")
        rows.append(product.record("matmul_rate", [rate], "FLOP/s", conditions))
    return rows


def describe(device: Device) -> str:
    """For a line before the results."""
    rates = ", ".join(f"{rate / 1e12:.3g} TFLOP/s {dtype_text(dtype)}" for dtype, rate in device.rates.items())
    return f"ceilings: {device.bandwidth / 1e9:.4g} GB/s copied, {rates}"


def cost_of(case: Case, setting: Setting, device: Device) -> Roofline:
    """Bytes, FLOPs and the roofline time of a case as `fuse_` leaves it: the same for all providers.

    A training step counts forward and backward; loss and optimiser, a few percent of it, are not counted.  Parameters
    are taken to be in the setting's dtype, as which autocast reads them.
    """
    module = case.build().to(setting.dtype).train(setting.mode == "train")
    leaves = needs_gradient(case, setting)
    inputs = [torch.empty(shape, dtype=setting.dtype, device="meta", requires_grad=leaves) for shape in case.inputs]
    total = resfuse.explain(module, *inputs, device=device).total
    return Roofline(total.bytes, total.flops, total.seconds)
