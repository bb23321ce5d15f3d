"""A traced call as a function of its arguments that can be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from resfuse import functional
from resfuse.tracing import Call

Function = Callable[[Mapping[str, Any]], Any]
"""From the arguments by name to the output."""

_GEOMETRY = ("stride", "padding", "dilation", "groups")


def function_for(call: Call) -> Function:
    """What makes the call on other tensors: resfuse's public function, or ATen's operator, not in place."""
    if call.operation.name in ("conv_bn_act", "bn_act", "add_relu"):
        return _own(call)
    return _aten(_out_of_place(call.target))


def _own(call: Call) -> Function:
    """The registered operators have no gradients; the functions do, and choose a backend as a model's call does."""
    name = call.operation.name
    run: Callable[..., Any] = getattr(functional, name)
    if name == "add_relu":
        return lambda arguments: run(arguments["input"], arguments["residual"])
    residual = call.arguments["residual"]
    fixed: dict[str, Any] = {
        "activation": "relu" if call.arguments["relu"] else "identity",
        "training": call.operation.options["training"],
        "momentum": call.arguments.get("momentum", 0.1),
        "eps": call.arguments["eps"],
        "pad_residual": residual is not None and residual.shape[1] < call.operation.output.shape[1],
    }
    if name == "conv_bn_act":
        fixed |= {key: _plain(call.arguments[key]) for key in _GEOMETRY}
    tensors = [key for key in call.arguments if key not in fixed and key != "relu"]
    return lambda arguments: run(**{key: arguments[key] for key in tensors}, **fixed)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _out_of_place(target: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """What a leaf allows, too; the bytes are the same."""
    namespace, _, name = target._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    overload = getattr(packet, target._overloadname, None)
    return target if overload is None else overload


def _aten(target: torch._ops.OpOverload) -> Function:
    schema = target._schema.arguments
    positional = [argument.name for argument in schema if not argument.kwarg_only]
    by_name = [argument.name for argument in schema if argument.kwarg_only]
    return lambda arguments: target(
        *(arguments[name] for name in positional), **{name: arguments[name] for name in by_name}
    )
