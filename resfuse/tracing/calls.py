"""The calls of operators in an exported program: what each reads, and what for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from resfuse.costs import Operation, TensorInfo
from resfuse.tracing.schema import PARAMETERS, arguments_by_name, operator_name, options_of

# What autocast runs in its dtype.  The graph has these operators without the casts of what they read.
_CAST_BY_AUTOCAST = {"conv1d", "conv2d", "conv3d", "linear", "matmul", "mm", "bmm", "addmm"}
_IGNORED = {"_assert_tensor_metadata", "_assert_scalar", "sym_size", "sym_constrain_range_for_size", "lift_fresh_copy"}


@dataclasses.dataclass(frozen=True)
class Call:
    """One operator call of a traced model."""

    operation: Operation
    target: torch._ops.OpOverload
    arguments: Mapping[str, Any]
    """By name in the schema, all of them; tensors are fake."""
    requires_grad: frozenset[str]
    """The names of the arguments that are part of what gradients are computed for."""


def calls_in(graph_module: fx.GraphModule, names: Mapping[str, str], flags: Mapping[str, bool]) -> Iterator[Call]:
    """The calls of a program's graph, in order.

    Args:
        graph_module: of an exported program.
        names: placeholder -> the name of the parameter or buffer that it stands for.
        flags: placeholder -> whether gradients flow to it.

    Raises:
        ValueError: the program has control flow that depends on values.
    """
    walk = _Walk(dict(names), dict(flags))
    yield from walk.calls(graph_module, None, grad_enabled=True)


class _Walk:
    """What is known of the nodes that have been seen."""

    def __init__(self, names: dict[str, str], flags: dict[str, bool]) -> None:
        self.names, self.flags = names, flags
        self.origin: dict[fx.Node, str] = {}  # the parameter or buffer that a tensor is, or is a cast of
        self.with_grad: set[fx.Node] = set()
        self.cast: set[fx.Node] = set()  # parameters, which autocast casts once

    def calls(
        self, graph_module: fx.GraphModule, outer: Mapping[str, Any] | None, grad_enabled: bool
    ) -> Iterator[Call]:
        """`outer`: what an inner program's placeholders stand for in the one around it."""
        for node in graph_module.graph.nodes:
            if node.op == "placeholder":
                self._place(node, outer)
            elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
                yield from self._call(node, grad_enabled)
            elif node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
                yield from self._nested(graph_module, node, grad_enabled)
            elif node.op == "call_function" and self._has_grad(node.all_input_nodes):  # getitem
                self.with_grad.add(node)

    def _place(self, node: fx.Node, outer: Mapping[str, Any] | None) -> None:
        if outer is None:
            origin, with_grad = self.names.get(node.name), self.flags.get(node.name, False)
        else:
            given = outer[node.name]
            origin, with_grad = self.origin.get(given), given in self.with_grad
        if origin is not None:
            self.origin[node] = origin
        if with_grad:
            self.with_grad.add(node)

    def _nested(self, graph_module: fx.GraphModule, node: fx.Node, grad_enabled: bool) -> Iterator[Call]:
        """What runs under `torch.no_grad`, `torch.autocast` and the like is a program of its own."""
        position = next((index for index, arg in enumerate(node.args) if _is_attribute(arg)), None)
        kind = str(node.target)
        if position is None or not kind.startswith("wrap_with_"):
            raise ValueError(f"model: has control flow that depends on values ({kind})")
        inner = getattr(graph_module, str(node.args[position].target))  # type: ignore[union-attr]
        if "set_grad_enabled" in kind:
            grad_enabled = bool(node.args[0])
        places = [place for place in inner.graph.nodes if place.op == "placeholder"]
        given = dict(zip((place.name for place in places), node.args[position + 1 :], strict=True))
        yield from self.calls(inner, given, grad_enabled)
        if grad_enabled and self._has_grad(node.all_input_nodes):
            self.with_grad.add(node)

    def _call(self, node: fx.Node, grad_enabled: bool) -> Iterator[Call]:
        target: Any = node.target
        name = operator_name(target)
        output = _first(node.meta.get("val"))
        if name in _IGNORED or output is None:
            return
        arguments = arguments_by_name(node)
        tensors = {key: arg for key, arg in arguments.items() if isinstance(arg, fx.Node)}
        listed = [item for arg in arguments.values() if isinstance(arg, list | tuple) for item in arg]
        read = [*tensors.values(), *(item for item in listed if isinstance(item, fx.Node))]
        if name in ("to", "_to_copy"):
            if tensors["self"] in self.origin:
                self.origin[node] = self.origin[tensors["self"]]
            if output.dtype == tensors["self"].meta["val"].dtype:
                name = "alias"
        if grad_enabled and name != "detach" and output.is_floating_point() and self._has_grad(read):
            self.with_grad.add(node)
        parameters = [arg for key, arg in tensors.items() if key in PARAMETERS]
        inputs = [arg for arg in read if arg not in parameters]
        requires_grad = frozenset(key for key, arg in tensors.items() if grad_enabled and arg in self.with_grad)
        dtypes = {arg: arg.meta["val"].dtype for arg in read}
        if name in _CAST_BY_AUTOCAST:
            for arg in read:
                if dtypes[arg] != output.dtype:
                    yield from self._casts(node, arg, output.dtype, grad_enabled)
                    dtypes[arg] = output.dtype
        options = options_of(target, arguments)
        options["inplace"] = target._schema.name.endswith("_")
        options["needs_input_grad"] = grad_enabled and self._has_grad(inputs)
        options["needs_parameter_grad"] = grad_enabled and self._has_grad(parameters)
        options["requires_grad"] = requires_grad
        operation = Operation(
            path=self._path(node, parameters or inputs),
            name=name,
            inputs=tuple(_info(arg.meta["val"], dtypes[arg]) for arg in inputs),
            parameters=tuple(_info(arg.meta["val"], dtypes[arg]) for arg in _weight_first(parameters, tensors)),
            output=_info(output),
            options=options,
        )
        values = {
            key: fx.map_arg(arg, lambda node: node.meta["val"].to(dtypes[node])) for key, arg in arguments.items()
        }
        yield Call(operation, target, values, requires_grad)

    def _casts(self, node: fx.Node, source: fx.Node, dtype: torch.dtype, grad_enabled: bool) -> Iterator[Call]:
        """The cast that autocast puts before a call; none of a parameter that it has cast before."""
        if source in self.cast:
            return
        if source in self.origin:
            self.cast.add(source)
        value, with_grad = source.meta["val"], grad_enabled and source in self.with_grad
        requires_grad = frozenset(("self",) if with_grad else ())
        options: dict[str, Any] = {"inplace": False, "requires_grad": requires_grad}
        options |= {"needs_input_grad": with_grad, "needs_parameter_grad": False}
        operation = Operation(self._path(node, [source]), "to", (_info(value),), (), _info(value, dtype), options)
        arguments = {"self": value, "dtype": dtype, "non_blocking": False, "copy": False, "memory_format": None}
        yield Call(operation, torch.ops.aten.to.dtype, arguments, requires_grad)

    def _has_grad(self, nodes: list[fx.Node]) -> bool:
        return any(node in self.with_grad for node in nodes)

    def _path(self, node: fx.Node, read: list[fx.Node]) -> str:
        """Of the module that owns the first parameter; without one, of the module whose forward makes the call."""
        if read and read[0] in self.origin:
            return self.origin[read[0]].rpartition(".")[0]
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        return re.sub(r"@\d+", "", str(stack[-1][0])) if stack else ""


def _weight_first(parameters: list[fx.Node], tensors: Mapping[str, fx.Node]) -> list[fx.Node]:
    """Convolution weight, then the rest in the order of the schema."""
    weight = tensors.get("conv_weight")
    return parameters if weight is None else [weight, *(other for other in parameters if other is not weight)]


def _info(value: Any, dtype: torch.dtype | None = None) -> TensorInfo:
    tensor: Any = _first(value)
    return TensorInfo(tuple(int(size) for size in tensor.shape), dtype or tensor.dtype)


def _first(value: Any) -> Tensor | None:
    """The tensor, or the first of several: of the operators of training, the output."""
    if isinstance(value, list | tuple):
        value = next((item for item in value if isinstance(item, Tensor)), None)
    return value if isinstance(value, Tensor) else None


def _is_attribute(arg: Any) -> bool:
    return isinstance(arg, fx.Node) and arg.op == "get_attr"
