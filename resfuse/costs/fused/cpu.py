"""The backend `cpu`: oneDNN's primitives with everything else in their epilogue, and the kernels of csrc/cpu.

Inference accumulates onto the residual: onto a copy of it, unless it may be overwritten.  Large results without one are
accumulated onto zeros from a pool, which cost less than the page faults of fresh memory.  Looking for values that are
not finite, which reads one or two per pixel, is not counted, nor is packing weights, done once.
"""

from __future__ import annotations

from resfuse.backends import buffer_pool, cpu_conv
from resfuse.costs import convolution
from resfuse.costs.cost import Cost, Kernels, kernel
from resfuse.costs.device import Device
from resfuse.costs.fused.call import FusedCall
from resfuse.costs.operation import TensorInfo


def forward(call: FusedCall, device: Device) -> Kernels:
    if call.name == "add_relu":
        return (kernel(3 * call.dz),)
    if call.conv_weight is None:
        return (*call.placing, _bn_forward(call))
    return _conv_forward(call, call.conv_weight)


def backward(call: FusedCall, device: Device) -> Kernels:
    if call.name == "add_relu":
        return (kernel(3 * call.dz),)
    if call.conv_weight is None:
        return _bn_backward(call)
    return _conv_backward(call, call.conv_weight)


def _bn_forward(call: FusedCall) -> Cost:
    return kernel((1 + call.training) * call.dz, call.dz if call.residual is not None else 0, call.dz, call.vectors)


def _bn_backward(call: FusedCall) -> Kernels:
    """The sums, with the masked gradient where the residual's is needed, and then that of the input."""
    operands = (2 + call.relu) * call.dz
    masked = call.dz if call.masked_residual else 0
    found = [kernel(operands, masked, call.vectors)]
    if call.needs_dz:
        g = 1 if masked or not call.relu else 2
        found.append(kernel((g + 1) * call.dz, call.dz, call.vectors))
    return tuple(found)


def _conv_forward(call: FusedCall, weight: TensorInfo) -> Kernels:
    if call.training:
        return (*_onto_zeros(call, weight, buffer_pool.SMALLEST), *call.placing, _bn_forward(call))
    if call.residual is None:
        return _onto_zeros(call, weight, cpu_conv.MAPPED_ANEW)
    accumulated = convolution.forward(call.input, weight, call.output)
    accumulated = accumulated._replace(bytes=accumulated.bytes + call.dz + call.vectors)
    if call.placing:
        return (*call.placing, accumulated)
    return (accumulated,) if call.overwrite_residual else (kernel(2 * call.dz), accumulated)


def _onto_zeros(call: FusedCall, weight: TensorInfo, smallest: int) -> Kernels:
    """The convolution alone, or, of results of so many bytes, onto zeros: written, read, written."""
    plain = convolution.forward(call.input, weight, call.output)
    if call.dz < smallest:
        return (plain,)
    return kernel(call.dz), plain._replace(bytes=plain.bytes + call.dz)


def _conv_backward(call: FusedCall, weight: TensorInfo) -> Kernels:
    found: list[Cost] = []
    if call.computes_z_again:
        found += _onto_zeros(call, weight, buffer_pool.SMALLEST)
    found += _bn_backward(call)
    needs_input, needs_weight, _ = call.needs_conv
    gradients = convolution.backward(
        call.input, weight, call.output, needs_input=needs_input, needs_weight=needs_weight
    )
    pointwise = weight.shape[2:] == (1, 1) and call.conv[:2] == ((1, 1), (0, 0)) and call.groups == 1
    if needs_input and pointwise and call.input.bytes >= cpu_conv.POOLED_GRADIENT:
        found += [kernel(call.input.bytes), gradients[0]._replace(bytes=gradients[0].bytes + call.input.bytes)]
        gradients = gradients[1:]
    return (*found, *gradients)
