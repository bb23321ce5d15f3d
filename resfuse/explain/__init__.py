"""`explain`: what runs where in a model, what it costs at least, and how far from that it is."""

from __future__ import annotations

import torch
from torch import nn

from resfuse.backends import dispatch as registry
from resfuse.costs import Device, TensorInfo
from resfuse.explain import machine
from resfuse.explain.choice import Choice, choose
from resfuse.explain.explanation import Explanation
from resfuse.explain.facts import PYTORCH, Layer, Totals
from resfuse.explain.layers import Conditions, layers_of
from resfuse.explain.measure import Stopwatch
from resfuse.surgery import fuse_
from resfuse.tracing import Input, Tracer

__all__ = ["Explanation", "Layer", "Totals", "explain"]


def explain(
    model: nn.Module,
    *inputs: Input,
    device: str | Device | torch.device | None = None,
    backward: bool | None = None,
    measure: bool = False,
    backend: str | None = None,
) -> Explanation:
    """What runs where in a model and what it costs: per operator call and in total, fused and unfused.

    For every call of the fused model: shape, backend and why that one, kernel launches, floating-point operations,
    bytes, and the roofline time, which is what these take at least on a machine with given ceilings.  With `measure`
    also how long the operator takes, and so where time is lost.  The model need not be fused: what is explained is what
    `fuse_` would make of it.  It is not changed, and nothing is computed, so a model on the meta device will do.

    Args:
        model: in `train()` or `eval()`.
        inputs: tensors, or shapes; a shape stands for a tensor of the device and dtype of the model's parameters.
        device: the machine: one of `resfuse.costs.DEVICES` by name, such as "h200", which need not be there; a
            `resfuse.costs.Device`; or a device of torch, "cuda:0", whose ceilings are then measured, which takes a
            second, once.  None is the device that the model is on.
        backward: whether the gradients are in the figures; None: if the model is in training mode.
        measure: time each operator alone on random tensors (the median of several calls, after some that do not count,
            on inputs that the caches do not hold), on this machine's device.  `print` then begins with what loses most.
        backend: as in `use_backend`, but for `explain` alone and so also for a machine that is not there; None: what
            `use_backend` or RESFUSE_BACKEND ask for, else automatic choice.

    Returns:
        The explanation: `print` it, or look at `layers`, `total`, `unfused` and `to_dict()`.

    Raises:
        TypeError: `model`, an input or `device` is of another type.
        ValueError: there is no such device, it can not be measured on because it is not there, or the model can not be
            traced by `torch.export`; the message says why.
        RuntimeError: the requested backend can not run an operator; the message says why.

    Source of the formulas: `resfuse.costs`; of the roofline, Williams, Waterman & Patterson 2009
    (doi:10.1145/1498765.1498785).

    Example:
        >>> layers = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        >>> found = explain(layers.bfloat16().eval(), (8, 16, 56, 56), device="h200")
        >>> [(layer.path, layer.op, layer.backend, layer.bound) for layer in found.layers]
        [('0', 'conv_bn_act', 'triton', 'memory')]
        >>> found.total.launches, found.unfused.launches > 2, found.total.flops == 2 * 8 * 32 * 56 * 56 * 16 * 9
        (1, True, True)
    """
    tracer = Tracer(model, inputs)
    described, place = machine.find(device, model)
    if measure and not machine.is_here(described, place):
        raise ValueError(f"measure: {described.name} is not in this machine; only a device that is can be measured on")
    request = registry.requested_backend() if backend is None else registry.validated(backend)
    backward = model.training if backward is None else backward
    stopwatch = None
    if measure and isinstance(place, torch.device):
        stopwatch = Stopwatch(place, described.l2, request, backward)
    conditions = Conditions(described, model.training, backward, stopwatch)
    report = fuse_(tracer.model)
    calls, plain = tracer.calls(), tracer.calls(as_pytorch=True)
    layers = layers_of(calls, [choose(call.operation, place, request, report) for call in calls], conditions)
    unfused = layers_of(plain, [Choice(PYTORCH, PYTORCH, "")] * len(plain), conditions)
    infos = tuple(TensorInfo(tuple(input.shape), input.dtype) for input in tracer.inputs)
    return Explanation(
        layers, Totals.of(layers), Totals.of(unfused), described, tracer.name, infos, model.training, backward
    )
