"""A module in inference whose fused convolutions are somebody else's calls, with batch norm folded into the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from benchmarks.providers.fused import fuse
from benchmarks.worker import UnsuitableError

Pair = tuple[int, int]


class Group(NamedTuple):
    """act(conv2d(input, weight, bias) [+ residual]), act being ReLU or nothing."""

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


def rewrite(module: nn.Module, examples: tuple[Tensor, ...], make_call: Callable[[Group], nn.Module]) -> nn.Module:
    """The module with each of its fused convolutions replaced by a call of what `make_call` returns.

    The groups are those that resfuse finds: the module is fused and exported, and every `resfuse::conv_bn_act_eval` of
    the program is replaced.  What is left runs on the reference backend, as eager PyTorch.

    Args:
        module: in eval mode; it is fused.
        examples: arguments like those of the calls: same shapes, dtypes and layout.
        make_call: gives the module that computes a group: call(input), or call(input, residual).

    Raises:
        UnsuitableError: there is no convolution with a batch norm in the module.
    """
    with torch.no_grad():
        program = torch.export.export(fuse(module), examples).module(check_guards=False)
    assert isinstance(program, GraphModule)
    found = program.graph.find_nodes(op="call_function", target=torch.ops.resfuse.conv_bn_act_eval.default)
    if not found:
        raise UnsuitableError("a fused convolution has nothing to do here: no convolution is followed by a batch norm")
    for index, node in enumerate(found):
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        program.add_submodule(f"group_{index}", make_call(_group(node, arguments, program)))
        with program.graph.inserting_before(node):
            residual = _padded(arguments["residual"], node)
            inputs = (arguments["input"],) if residual is None else (arguments["input"], residual)
            call = program.graph.call_module(f"group_{index}", inputs)
        call.meta = node.meta
        node.replace_all_uses_with(call)
        program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.recompile()
    return _OnReference(program)


class _OnReference(nn.Module):
    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def train(self, mode: bool = True) -> nn.Module:
        return self  # an exported program has one mode

    def forward(self, *inputs: Tensor) -> Tensor:
        import resfuse

        with resfuse.use_backend("reference"):
            output: Tensor = self.program(*inputs)
        return output


def _group(node: Node, arguments: dict[str, Any], program: GraphModule) -> Group:
    def value(name: str) -> Any:
        argument = arguments[name]
        if not isinstance(argument, Node) or argument.op != "get_attr":
            return None
        owner, _, attribute = str(argument.target).rpartition(".")
        return getattr(program.get_submodule(owner), attribute).detach()

    vectors = (value(name) for name in ("conv_bias", "running_mean", "running_var", "weight", "bias"))
    weight, bias = fold(value("conv_weight"), *vectors, eps=arguments["eps"])
    return Group(
        weight, bias, arguments["relu"], arguments["residual"] is not None,
        tuple(arguments["stride"]), tuple(arguments["padding"]), tuple(arguments["dilation"]), arguments["groups"],
        tuple(arguments["input"].meta["val"].shape), tuple(node.meta["val"].shape),
    )  # fmt: skip


def fold(
    conv_weight: Tensor, conv_bias: Tensor | None, running_mean: Tensor, running_var: Tensor,
    weight: Tensor | None, bias: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weight and bias of the convolution that computes batch_norm(conv(input)) in inference.

    With s = weight / sqrt(running_var + eps) per output channel, the weight is s * conv_weight and the bias is
    bias + s * (conv_bias - running_mean); computed in float64, rounded once.
    """
    scale = (running_var.double() + eps).rsqrt() * (1.0 if weight is None else weight.double())
    shift = ((0.0 if conv_bias is None else conv_bias.double()) - running_mean.double()) * scale
    if bias is not None:
        shift = shift + bias.double()
    folded = torch.empty_like(conv_weight).copy_(conv_weight.double() * scale[:, None, None, None])
    return folded, shift.to(conv_weight.dtype)


def _padded(residual: Node | None, node: Node) -> Node | None:
    """A residual of fewer channels (shortcut A) with zeros for the missing ones."""
    if residual is None or not (missing := node.meta["val"].shape[1] - residual.meta["val"].shape[1]):
        return residual
    return node.graph.call_function(torch.ops.aten.constant_pad_nd.default, (residual, [0, 0, 0, 0, 0, missing]))
