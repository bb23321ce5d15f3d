"""From the calls of a model to what each costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from resfuse.costs import Cost, Device, Operation, backward_kernels, forward_kernels, is_estimated, roofline
from resfuse.explain.choice import Choice
from resfuse.explain.facts import COMPUTE, MEMORY, PYTORCH, Layer
from resfuse.explain.measure import Stopwatch
from resfuse.tracing import Call

_FREE = Cost(0, 0, 0)


class Conditions(NamedTuple):
    """What is explained of every call."""

    device: Device
    training: bool
    backward: bool
    stopwatch: Stopwatch | None
    """None where nothing is measured."""


def layers_of(calls: Sequence[Call], choices: Sequence[Choice], conditions: Conditions) -> tuple[Layer, ...]:
    """The calls that move data, with what they cost."""
    layers = []
    for call, choice in zip(calls, choices, strict=True):
        kernels, gradients = _kernels(call.operation, choice, conditions)
        if any(cost != _FREE for cost in (*kernels, *gradients)):
            layers.append(_layer(call, choice, kernels, gradients, conditions))
    return tuple(layers)


def _kernels(operation: Operation, choice: Choice, conditions: Conditions) -> tuple[tuple[Cost, ...], tuple[Cost, ...]]:
    forward, backward = (None if name == PYTORCH else name for name in (choice.forward, choice.backward))
    known: dict[str, Any] = {"training": conditions.training, "device": conditions.device}
    gradients = backward_kernels(operation, backend=backward, **known) if conditions.backward else ()
    return forward_kernels(operation, backend=forward, **known), gradients


def _layer(
    call: Call, choice: Choice, kernels: tuple[Cost, ...], gradients: tuple[Cost, ...], conditions: Conditions
) -> Layer:
    operation, device = call.operation, conditions.device
    input = operation.inputs[0] if operation.inputs else operation.output
    times = {MEMORY: 0.0, COMPUTE: 0.0}
    for kernel in (*kernels, *gradients):
        compute_bound = kernel.flops / device.rate(input.dtype) > kernel.bytes / device.bandwidth
        times[COMPUTE if compute_bound else MEMORY] += roofline(kernel, input.dtype, device)
    forward, backward = sum(kernels, _FREE), sum(gradients, _FREE)
    total = forward + backward
    return Layer(
        path=operation.path,
        op=operation.name,
        detail=_detail(operation),
        shape=input.shape,
        output_shape=operation.output.shape,
        dtype=input.dtype,
        backend=choice.forward,
        backward_backend=choice.backward if conditions.backward else None,
        reason=choice.reason,
        launches=total.launches,
        flops=total.flops,
        bytes=total.bytes,
        seconds=sum(times.values()),
        bound=max(times, key=lambda bound: times[bound]),
        forward=forward,
        backward=backward if conditions.backward else None,
        estimated=is_estimated(operation),
        measured=None if conditions.stopwatch is None else conditions.stopwatch.seconds(call),
    )


def _detail(operation: Operation) -> str:
    """Kernel, stride, groups and residual."""
    options, words = operation.options, []
    if operation.name in ("conv2d", "conv_bn_act"):
        words.append("x".join(map(str, operation.weight().shape[2:])))
    elif isinstance(options.get("kernel_size"), tuple):
        words.append("x".join(map(str, options["kernel_size"])))
    stride = options.get("stride", (1, 1))
    if words and set(stride) != {1}:
        words[0] += f"/{stride[0]}" if len(set(stride)) == 1 else f"/{stride[0]},{stride[1]}"
    if options.get("groups", 1) != 1:
        words.append(f"g{options['groups']}")
    if operation.name in ("conv_bn_act", "bn_act") and len(operation.inputs) > 1:
        words.append("+res")
    if not operation.output.dtype.is_floating_point:  # such as a batch norm's num_batches_tracked
        words.append(str(operation.output.dtype).removeprefix("torch."))
    return " ".join(words)
