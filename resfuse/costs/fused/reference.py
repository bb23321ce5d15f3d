"""The backend `reference`: its own code, run on tensors without data, operator by operator."""

from __future__ import annotations

import torch

from resfuse.backends import reference
from resfuse.costs.cost import Kernels
from resfuse.costs.device import Device
from resfuse.costs.fused.aten import operators
from resfuse.costs.fused.call import FusedCall, without_data


def forward(call: FusedCall, device: Device) -> Kernels:
    return operators(lambda: _forward(call), device)


def backward(call: FusedCall, device: Device) -> Kernels:
    return operators(lambda: _backward(call), device)


def _forward(call: FusedCall) -> None:
    x = without_data(call.input)
    residual = None if call.residual is None else without_data(call.residual)
    if call.name == "add_relu":
        assert residual is not None
        reference.add_relu_forward(x, residual)
        return
    v = _vector(call)
    if call.conv_weight is None:
        reference.bn_act_forward(x, v, v, v, v, residual, call.relu, call.training, 0.1, 1e-5)
        return
    reference.conv_bn_act_forward(
        x, without_data(call.conv_weight), v, v, v, v, v if call.conv_bias else None, residual, call.relu, *call.conv,
        call.training, 0.1, 1e-5,
    )  # fmt: skip


def _backward(call: FusedCall) -> None:
    """As the Functions of resfuse.ops do it: batch norm's verb, then the convolution's."""
    dy, x = without_data(call.output), without_data(call.input)
    if call.name == "add_relu":
        reference.add_relu_backward(dy, dy)
        return
    v = _vector(call)
    weight = None if call.conv_weight is None else without_data(call.conv_weight)
    if weight is not None and call.computes_z_again:
        reference.conv_forward(x, weight, v if call.conv_bias else None, *call.conv)
    dz, *_ = reference.bn_act_backward(
        dy, dy, dy if call.relu else None, v, v, v, call.training, call.needs_dz, call.masked_residual
    )
    if weight is not None and dz is not None:
        reference.conv_backward(dz, x, weight, *call.conv, call.needs_conv)


def _vector(call: FusedCall) -> torch.Tensor:
    return torch.empty(call.output.shape[1], device="meta")
