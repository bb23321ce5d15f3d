"""Which backend runs an operation, asked of the registry, and why."""

from __future__ import annotations

from typing import NamedTuple

import torch

from resfuse.backends import dispatch as registry
from resfuse.types import AbsentDevice, Problem
from resfuse.costs import Operation
from resfuse.explain.facts import PYTORCH
from resfuse.surgery import FuseReport

Place = torch.device | AbsentDevice

_FORWARD = {
    "conv_bn_act": "conv_bn_act_forward", "bn_act": "bn_act_forward", "add_relu": "add_relu_forward",
    "bn_statistics": "bn_statistics", "bn_apply": "bn_apply",
}  # fmt: skip
_BACKWARD = {
    "conv_bn_act": "conv_backward", "bn_act": "bn_act_backward", "add_relu": "add_relu_backward",
    "bn_statistics": "bn_backward_apply", "bn_apply": "bn_backward_reduce",
}  # fmt: skip
_FUSIBLE = ("conv2d", "batch_norm", "relu", "add")


class Choice(NamedTuple):
    """Who runs an operation."""

    forward: str
    backward: str
    """What computes the gradients: of a fused convolution, those of the convolution, which are most of the work."""
    reason: str
    """Of the forward."""


def choose(operation: Operation, place: Place, request: str | None, report: FuseReport) -> Choice:
    """Who runs an operation there.

    Args:
        operation: which.
        place: a device, in this machine or not.
        request: a backend's name, or None for automatic choice.
        report: what was fused, and what was not for which reason.

    Raises:
        RuntimeError: the requested backend can not run it; the message has the reasons.
    """
    if operation.name not in _FORWARD:
        return Choice(PYTORCH, PYTORCH, _reason_of_pytorch(operation, report))
    name, rejected = registry.explain_choice(_problem(operation, _FORWARD, place), request)
    backward, _ = registry.explain_choice(_problem(operation, _BACKWARD, place), request)
    if request is not None:
        reason = "asked for by name"
    elif rejected:
        reason = "; ".join(f"not {other}: {', '.join(reasons)}" for other, reasons in rejected.items())
    else:
        reason = "first in the order of preference"
    return Choice(name, backward, reason)


def _problem(operation: Operation, verbs: dict[str, str], place: Place) -> Problem:
    verb, input, conv = verbs[operation.name], operation.inputs[0], None
    if operation.name == "conv_bn_act":
        options = operation.options
        geometry = (tuple(options[name]) for name in ("stride", "padding", "dilation"))
        conv = (torch.Size(operation.weight().shape), *geometry, options["groups"])
    return Problem(verb, place, input.dtype, torch.Size(input.shape), conv)


def _reason_of_pytorch(operation: Operation, report: FuseReport) -> str:
    """Why `fuse_` left it, if it is of a module that `fuse_` left."""
    if operation.name in _FUSIBLE:
        around = [
            left
            for left in report.left
            if left.reason != "already fused" and f"{operation.path}.".startswith(f"{left.name}." if left.name else "")
        ]
        if around:
            return f"not fused: {max(around, key=lambda left: len(left.name)).reason}"
    return "PyTorch's own operator"
