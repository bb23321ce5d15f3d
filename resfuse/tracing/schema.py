"""What the schemas of operators say of the arguments of a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

# By the names of arguments in the schemas of resfuse's operators and of ATen's.
PARAMETERS = {"weight", "bias", "conv_weight", "conv_bias", "running_mean", "running_var"}
_NAMES = {
    "conv_bn_act_train": "conv_bn_act",
    "conv_bn_act_eval": "conv_bn_act",
    "bn_act_train": "bn_act",
    "bn_act_eval": "bn_act",
    "add_relu_forward": "add_relu",
}
_PAIRS = {"stride", "padding", "dilation", "kernel_size", "output_size"}


def operator_name(target: torch._ops.OpOverload) -> str:
    """Ours, or ATen's without the underscore of what is done in place."""
    name = target._schema.name.partition("::")[2]
    return _NAMES.get(name, name.removesuffix("_") if not name.startswith("__") else name)


def arguments_by_name(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call by their names in the schema, defaults filled in."""
    target: Any = node.target
    found = {}
    for index, argument in enumerate(target._schema.arguments):
        if index < len(node.args) and not argument.kwarg_only:
            found[argument.name] = node.args[index]
        else:
            found[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return found


def options_of(target: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are no tensors: pairs as tuples of two, padding in numbers, training as a bool."""
    options = {
        key: tuple(arg) if isinstance(arg, list) else arg
        for key, arg in arguments.items()
        if isinstance(arg, bool | int | float | str | list | tuple) and not _holds_nodes(arg)
    }
    name = target._schema.name.partition("::")[2]
    if name.endswith(("_train", "_eval")):
        options["training"] = name.endswith("_train")
    if "pool2d" in name and options.get("stride") == ():
        options["stride"] = options["kernel_size"]
    if isinstance(options.get("padding"), str):
        weight = arguments["weight"].meta["val"]
        dilation = _pair(options["dilation"])
        same = tuple(step * (size - 1) // 2 for step, size in zip(dilation, weight.shape[2:], strict=True))
        options["padding"] = same if options["padding"] == "same" else (0,) * len(same)
    for key in _PAIRS & options.keys():
        options[key] = _pair(options[key])
    return options


def _pair(value: Any) -> Any:
    if isinstance(value, int):
        return value, value
    return tuple(value) * 2 if isinstance(value, tuple) and len(value) == 1 else value


def _holds_nodes(arg: Any) -> bool:
    return isinstance(arg, list | tuple) and any(isinstance(item, fx.Node) for item in arg)
