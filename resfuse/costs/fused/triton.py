"""The backend `triton`: its own verbs, run on tensors without data, list the kernels that they would launch.

So tiles, splits and the form of a launch (one or two, z in registers or not) are those that a GPU like this one gets.
What each kernel moves follows from its docstring and from the pointers that it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from resfuse.backends import triton as backend
from resfuse.backends.triton.config import DeviceProperties
from resfuse.costs.convolution import convolution_flops
from resfuse.costs.cost import Cost, Kernels
from resfuse.costs.device import Device
from resfuse.costs.fused.aten import operators
from resfuse.costs.fused.call import FusedCall, without_data
from resfuse.costs.fused.gpu import gpu


def forward(call: FusedCall, device: Device) -> Kernels:
    return _listed(call, device, _forward)


def backward(call: FusedCall, device: Device) -> Kernels:
    return _listed(call, device, _backward)


def _listed(call: FusedCall, device: Device, run: Callable[[FusedCall], None]) -> Kernels:
    """Raises ValueError where Triton is not installed: the plans are its kernels' own."""
    device = gpu(device)
    reason = backend.import_failure()
    if reason is not None:
        raise ValueError(f"backend 'triton': {reason}, and without it what it launches can not be told")
    from resfuse.backends.triton.launch import collected

    assert device.capability is not None
    properties = DeviceProperties(device.name, device.capability, device.num_sms, device.shared_memory)
    with collected(properties) as specs:
        before = operators(lambda: run(call), device)  # casts and copies
    return (*before, *(_cost(spec, specs[i - 1], call) for i, spec in enumerate(specs)))


def _cost(spec: Any, previous: Any, call: FusedCall) -> Cost:
    """Of one launch; `previous` is the one before it, whose parts a `sum_splits_kernel` adds."""
    flops = 0
    if call.conv_weight is not None and _multiplies(spec):
        flops = convolution_flops(call.output, call.conv_weight)
    if spec.name == "sum_splits_kernel":
        if previous.name == "column_sum_kernel":
            return Cost(0, 4 * call.output.shape[1], 1)
        size = _gradient(previous, call)
        return Cost(0, (4 * previous.grid[1] // call.input.dtype.itemsize + 1) * size, 1)
    return Cost(flops, sum(_touched(spec, call)) + call.vectors, 1)


def _touched(spec: Any, call: FusedCall) -> list[int]:
    """Bytes of each pass over an operand.  A kernel in PHASE 0 does what 1 and 2 do one after the other."""
    size, x = call.dz, call.input.bytes
    weight = 0 if call.conv_weight is None else call.conv_weight.numel * call.input.dtype.itemsize
    phase = spec.constants.get("PHASE", 0)
    first, second = phase != 2, phase != 1

    def given(*names: str) -> int:
        return sum(spec.signature[f"{name}_ptr"].startswith("*") for name in names)

    match spec.name:
        case "conv_bn_act_kernel":
            splits = spec.constants["SPLIT_K"]
            partials = 2 * 4 * splits * call.output.numel if splits > 1 else 0
            return [x, weight, size * given("residual", "out"), partials]
        case "conv_bn_act_train_kernel":
            reads_z = second and not spec.constants["IN_REGISTERS"]
            return [first * (x + weight + size), reads_z * size, second * size * given("residual", "out")]
        case "bn_statistics_kernel":
            return [first * size]
        case "bn_train_forward_kernel":
            return [first * size, second * size * given("x", "residual", "y")]
        case "bn_backward_kernel":
            batch = spec.constants["BATCH_STATISTICS"]
            reduce = size * (given("dy", "x", "y", "dresidual") + (0 if batch else given("dx")))
            g = given("dresidual") or given("dy", "y")
            return [first * reduce, second * (batch and given("dx")) * size * (g + given("x", "dx"))]
        case "dgrad_kernel" | "wgrad_kernel":
            read = weight if spec.name == "dgrad_kernel" else x
            gradient, splits = _gradient(spec, call), spec.grid[1]
            written = gradient if splits == 1 else 4 * splits * gradient // call.input.dtype.itemsize
            return [size * given("dz", "z", "y"), read, written]
        case "column_sum_kernel":
            return [size]
        case _:  # element by element: bn_apply_kernel, bn_backward_apply_kernel and those of add_relu
            activations = ("x", "residual", "y", "dy", "dx")
            return [size * given(*(name for name in activations if f"{name}_ptr" in spec.signature))]


def _multiplies(spec: Any) -> bool:
    if spec.name == "conv_bn_act_train_kernel":
        return bool(spec.constants["PHASE"] != 2)
    return spec.name in ("conv_bn_act_kernel", "dgrad_kernel", "wgrad_kernel")


def _gradient(spec: Any, call: FusedCall) -> int:
    """Bytes of what dgrad or wgrad computes, in the dtype of the input."""
    assert call.conv_weight is not None
    numel = call.input.numel if spec.name == "dgrad_kernel" else call.conv_weight.numel
    return numel * call.input.dtype.itemsize


def _forward(call: FusedCall) -> None:
    from resfuse.backends.triton import verbs

    x, v = without_data(call.input), _vector(call)
    residual = None if call.residual is None else without_data(call.residual)
    if call.name == "add_relu":
        assert residual is not None
        verbs.add_relu_forward(x, residual)
    elif call.conv_weight is None:
        verbs.bn_act_forward(x, v, v, v, v, residual, call.relu, call.training, 0.1, 1e-5)
    else:
        verbs.conv_bn_act_forward(
            x, without_data(call.conv_weight), v, v, v, v, v if call.conv_bias else None, residual, call.relu,
            *call.conv, call.training, 0.1, 1e-5, call.overwrite_residual,
        )  # fmt: skip


def _backward(call: FusedCall) -> None:
    """As the Functions of resfuse.ops do it where all verbs are Triton's."""
    from resfuse.backends.triton import verbs

    dy, x, v = without_data(call.output), without_data(call.input), _vector(call)
    y = dy if call.relu else None
    if call.name == "add_relu":
        verbs.add_relu_backward(dy, dy)
        return
    if call.conv_weight is None:
        verbs.bn_act_backward(dy, x, y, v, v, v, call.training, call.needs_dz, call.masked_residual)
        return
    weight, z = without_data(call.conv_weight), None
    if call.training:
        z = dy
    elif call.computes_z_again:
        z = verbs.conv_forward(x, weight, v if call.conv_bias else None, *call.conv)
    if any(call.needs_conv) and verbs.conv_bn_act_backward(
        dy, x, weight, z, y, v, v, v, *call.conv, call.training, call.needs_conv, call.needs_norm,
        call.masked_residual,
    ) is not None:  # fmt: skip
        return
    dz, *_ = verbs.bn_act_backward(dy, dy, y, v, v, v, call.training, call.needs_dz, call.masked_residual)
    if dz is not None:
        verbs.conv_backward(dz, x, weight, *call.conv, call.needs_conv)


def _vector(call: FusedCall) -> torch.Tensor:
    return torch.empty(call.output.shape[1], device="meta")
