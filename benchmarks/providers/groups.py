"""A module in inference as a graph whose fused groups are calls of somebody else's fused convolution.

The groups are those that `resfuse.fuse_` finds: the module is fused, exported, and every `resfuse::conv_bn_act_eval` of
the program becomes a call of whatever a provider makes of the group, with batch norm folded into the weights.  What is
left, pooling and the like, stays PyTorch's own.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

import resfuse
from benchmarks.providers.base import UnsuitableError
from benchmarks.providers.folding import fold

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Group:
    """`act(conv2d(input, weight, bias) [+ residual])`, act being ReLU or nothing."""

    weight: Tensor
    """(K, C / groups, R, S), with batch norm folded in."""
    bias: Tensor
    """(K,), same dtype."""
    relu: bool
    residual: bool
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


MakeCall = Callable[[Group], nn.Module]
"""Gives the module that computes a group: call(input), or call(input, residual) where the group has one."""


def rewrite(module: nn.Module, examples: tuple[Tensor, ...], make_call: MakeCall) -> GraphModule:
    """The module with its fused groups replaced; it is fused, and its parameters stay where they are.

    Args:
        module: in eval mode.
        examples: arguments like those that the result is going to be called with: same shapes, dtypes and layout.
        make_call: called once per group, in the order of the graph.

    Raises:
        UnsuitableError: there is no convolution with a batch norm in the module.
    """
    program = _exported(module, examples)
    graph_module = _with_attributes(program)
    graph = graph_module.graph
    found = list(graph.find_nodes(op="call_function", target=torch.ops.resfuse.conv_bn_act_eval.default))
    if not found:
        raise UnsuitableError("a fused convolution has nothing to do here: no convolution is followed by a batch norm")
    for index, node in enumerate(found):
        name = f"group_{index}"
        graph_module.add_submodule(name, make_call(_group(node, graph_module)))
        _replace(node, lambda node, name=name: _call_group(node, name))
    for target, calls in _ELSEWHERE.items():
        for node in graph.find_nodes(op="call_function", target=target):
            _replace(node, calls)
    graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return graph_module


def _exported(module: nn.Module, examples: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    resfuse.fuse_(module)
    with torch.no_grad():
        return torch.export.export(module, examples)


def _with_attributes(program: torch.export.ExportedProgram) -> GraphModule:
    """The program's graph, its parameters and buffers attributes instead of arguments: called with the inputs alone."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names |= signature.inputs_to_lifted_tensor_constants
    owner = nn.Module()
    graph = Graph()
    copies: dict[Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            if not node.users:
                continue
            name = node.name
            value = program.state_dict.get(names[name], program.constants.get(names[name]))
            owner.register_buffer(name, value.detach())
            copies[node] = graph.get_attr(name)
            copies[node].meta = node.meta
        elif node.op == "output":
            (outputs,) = node.args
            if len(outputs) != 1:
                raise UnsuitableError(f"expected one output, the module has {len(outputs)}")
            graph.output(copies[outputs[0]])
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return GraphModule(owner, graph)


def _group(node: Node, owner: GraphModule) -> Group:
    """What a call of resfuse's operator computes, with its arguments by their place in the schema."""
    arguments = _arguments(node)
    values = {
        name: getattr(owner, argument.target) if isinstance(argument, Node) and argument.op == "get_attr" else None
        for name, argument in arguments.items()
    }
    folded = fold(
        values["conv_weight"], values["conv_bias"], values["running_mean"], values["running_var"],
        values["weight"], values["bias"], arguments["eps"],
    )  # fmt: skip
    return Group(
        *folded,
        relu=arguments["relu"],
        residual=arguments["residual"] is not None,
        stride=tuple(arguments["stride"]),
        padding=tuple(arguments["padding"]),
        dilation=tuple(arguments["dilation"]),
        groups=arguments["groups"],
        input_shape=tuple(arguments["input"].meta["val"].shape),
        output_shape=tuple(node.meta["val"].shape),
    )


def _arguments(node: Node) -> dict[str, Any]:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _replace(node: Node, calls: Callable[[Node], Node]) -> None:
    with node.graph.inserting_before(node):
        new = calls(node)
    new.meta = node.meta
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _call_group(node: Node, name: str) -> Node:
    arguments = _arguments(node)
    residual = arguments["residual"]
    inputs = [arguments["input"]]
    if residual is not None:
        inputs.append(_padded(residual, node))
    return node.graph.call_module(name, tuple(inputs))


def _padded(residual: Node, node: Node) -> Node:
    """A residual of fewer channels (shortcut A) as others need it: with zeros in the ones that are missing."""
    missing = node.meta["val"].shape[1] - residual.meta["val"].shape[1]
    if missing == 0:
        return residual
    return node.graph.call_function(torch.ops.aten.constant_pad_nd.default, (residual, [0, 0, 0, 0, 0, missing]))


def _bn_act(node: Node) -> Node:
    arguments = _arguments(node)
    tensors = [arguments[name] for name in ("input", "weight", "bias", "running_mean", "running_var")]
    options = (False, 0.0, arguments["eps"], True)
    output = node.graph.call_function(torch.ops.aten.batch_norm.default, (*tensors, *options))
    if arguments["residual"] is not None:
        output = node.graph.call_function(operator.iadd, (output, _padded(arguments["residual"], node)))
    return node.graph.call_function(torch.ops.aten.relu_.default, (output,)) if arguments["relu"] else output


def _add_relu(node: Node) -> Node:
    output = node.graph.call_function(torch.ops.aten.add.Tensor, node.args)
    return node.graph.call_function(torch.ops.aten.relu_.default, (output,))


_ELSEWHERE: dict[Any, Callable[[Node], Node]] = {
    torch.ops.resfuse.bn_act_eval.default: _bn_act,
    torch.ops.resfuse.add_relu_forward.default: _add_relu,
}
"""resfuse's other operators, as eager PyTorch computes them."""
