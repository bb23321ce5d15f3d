"""Activations that backward computes again, from what batch norm keeps anyway, in place of keeping them.

A call y = act(bn(z) [+ residual]) in training keeps z, mean and invstd.  Within `recomputing` it does not keep y, and a
call that reads y keeps, in place of it, the autograd node that made it.  In backward the first reader computes y again
by the element-wise kernel `bn_apply`, bit for bit what it was; the node, which runs after all readers of y, drops it.
A residual may be such a y itself, so that the outputs of a stage of residual blocks come back together and go one by
one; of a long stage some come back twice.  No convolution is computed twice.

A tensor's node is its `grad_fn`.  A view, and a tensor that was written to, have another one or another version: those
are saved as they are, and so is y by every reader that does not know of this: PyTorch's functions, hooks, users.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resfuse.backends import dispatch, reference
from resfuse.ops.library import run_kernel

Vectors = Sequence[Any]
"""(weight, bias, mean, invstd) of a batch norm; the first two may be None."""


@contextmanager
def recomputing() -> Iterator[None]:
    """Calls inside the context do not keep outputs that backward can compute again."""
    token = dispatch.recomputing.set(True)
    try:
        yield
    finally:
        dispatch.recomputing.reset(token)


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function within `recomputing`; torch.compile, which decides itself what to keep, sees the function alone."""

    @wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **options)
        with recomputing():
            return function(*args, **options)

    return run


class Saved(NamedTuple):
    """What a call saves for backward; what it has no use for is None."""

    input: Tensor | None = None
    """None where its node is kept."""
    residual: Tensor | None = None
    """Only where the output is computed again, and None where its node is kept."""
    output: Tensor | None = None
    """Only as the source of the ReLU's mask."""
    z: Tensor | None = None
    """What is normalised; None where that is the input."""
    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    invstd: Tensor | None = None
    conv_weight: Tensor | None = None
    conv_bias: Tensor | None = None
    total_count: Tensor | None = None
    """Number of values of all processes, where batch norm is synchronised."""
    weight_copy: Tensor | None = None
    """For the readers of the output, to which FSDP does not give the parameters of the layer that made it."""
    bias_copy: Tensor | None = None

    @property
    def vectors(self) -> Vectors:
        return self[4:8]


class Reading:
    """What the readers of a node share during one backward pass."""

    def __init__(self, task: int, saved: Saved) -> None:
        self.task, self.saved = task, saved
        self.outputs: dict[bool, Tensor] = {}
        """The output computed again, by whether it is a function that PyTorch can differentiate."""


def save(ctx: Any, saved: Saved, output: Tensor, relu: bool, training: bool = True) -> None:
    """Save for backward what a call needs of all that it has, and of its output.

    Sets `ctx.kept`, the nodes that are kept in place of (input, residual), and `ctx.recompute_version`: the version of
    an output that backward can compute again, else None.
    """
    masks_by_input = relu and training and saved.residual is None and saved.mean is not None
    ctx.relu, ctx.masks_by_output = relu, relu and not masks_by_input
    ctx.kept, ctx.recompute_version, ctx.reading, ctx.request = (None, None), None, None, None
    is_sum, again = saved.mean is None, False
    if not torch.compiler.is_compiling():
        ctx.request = dispatch.requested_backend()
        wanted, residual = dispatch.recomputing.get(), saved.residual
        ctx.kept = _maker(saved.input), _maker(residual)
        if is_sum:
            again = wanted and None not in ctx.kept
        else:
            again = wanted and training and (residual is None or ctx.kept[1] is not None or _is_saved(residual))
        if again:
            ctx.recompute_version = output._version
            copies = (None if vector is None else vector.clone() for vector in saved.vectors[:2])
            saved = Saved(*saved[:-2], *copies)
        else:
            ctx.kept = None if is_sum else ctx.kept[0], None
        if wanted and ctx.kept[0] is None and not is_sum:
            _note(saved.input, saved.input.grad_fn)  # type: ignore[arg-type, union-attr]
        if wanted and ctx.masks_by_output and not again:
            _note(output, ctx)
    ctx.save_for_backward(
        saved.input if ctx.kept[0] is None and not is_sum else None,
        saved.residual if ctx.kept[1] is None and again else None,
        output if ctx.masks_by_output and not again else None,
        *saved[3:5],
        saved.bias if masks_by_input or again else None,
        *saved[6:],
    )


# Whether a tensor is saved by one of these calls, so that another one may save it at no cost, and without an error that
# eager does not raise if it is written to later.

_KEY = "resfuse: version of the output that is saved"


def _note(tensor: Tensor, node: Any) -> None:
    if node is not None and tensor.output_nr == 0:
        node.metadata[_KEY] = tensor._version


def _is_saved(tensor: Tensor) -> bool:
    node: Any = tensor.grad_fn
    return node is not None and tensor.output_nr == 0 and node.metadata.get(_KEY) == tensor._version


def _maker(tensor: Tensor | None) -> Any:
    """The node that can compute a tensor again, or None."""
    node = None if tensor is None else tensor.grad_fn
    version = getattr(node, "recompute_version", None)
    return node if version is not None and version == tensor._version else None  # type: ignore[union-attr]


def take(ctx: Any) -> Saved:
    """What a node has saved, for its own backward, with the output if the ReLU's mask comes from it.

    Unless the graph is retained, the caller is the only one who holds it then, and can free each tensor as soon as it
    has been read.
    """
    if torch.compiler.is_compiling():
        return Saved(*ctx.saved_tensors)
    if ctx.recompute_version is None:
        saved = Saved(*ctx.saved_tensors)
    else:
        output = output_of(ctx, False) if ctx.masks_by_output else None
        saved = _reading(ctx).saved._replace(output=output)
        ctx.reading = None  # all readers of the output have been
    ctx.maybe_clear_saved_tensors()
    return saved


def input_of(ctx: Any, saved: Saved) -> Tensor:
    """The input of a call, computed again where it was not saved."""
    return output_of(ctx.kept[0], torch.is_grad_enabled()) if saved.input is None else saved.input


def mask_of(ctx: Any, saved: Saved, z: Tensor | None) -> Tensor | None:
    """The output, for its sign; None without a ReLU."""
    if not ctx.relu or saved.output is not None:
        return saved.output
    with torch.no_grad(), recomputing():
        return _apply(ctx, z, saved.vectors, None)


def output_of(node: Any, differentiable: bool) -> Tensor:
    """The output of the call that a node belongs to, computed again for all of its readers.

    Args:
        node: one that `save` has given a `recompute_version`.
        differentiable: as a function of the tensors that the calls before it were given (create_graph=True).
    """
    todo, depth = [node], 1
    while todo:  # no recursion: a stage may have hundreds of blocks
        node = todo[-1]
        reading = _reading(node)
        if differentiable not in reading.outputs:
            of_input, of_residual = node.kept
            needed = (of_input if differentiable or reading.saved.z is None else None, of_residual)
            missing = [kept for kept in needed if kept is not None and differentiable not in _reading(kept).outputs]
            if missing:
                todo += missing
                depth = len(todo)
                continue
            with torch.set_grad_enabled(differentiable), recomputing():
                reading.outputs[differentiable] = _compute(node, reading.saved, differentiable)
            if not differentiable and of_residual is not None and _is_passed(len(todo), depth):
                del of_residual.reading.outputs[False]
        todo.pop()
    return reading.outputs[differentiable]


def _is_passed(distance: int, depth: int) -> bool:
    """True for the outputs of a long row of blocks that are computed once more rather than held until they are read.

    With sqrt(depth) blocks to a group, the nearest group stays, and the last block of every other one.
    """
    group = 1 + math.isqrt(depth)
    return distance > group and distance % group != 0


def _reading(node: Any) -> Reading:
    """The one of this backward pass: saved tensors are read once, as activation checkpointing requires."""
    task = torch._C._current_graph_task_id()
    if node.reading is None or node.reading.task != task:
        node.reading = Reading(task, Saved(*node.saved_tensors))
    return node.reading


def _compute(node: Any, saved: Any, differentiable: bool) -> Tensor:
    """The output, where those of the nodes that are kept are there."""

    def argument(which: int) -> Any:
        kept = node.kept[which]
        return saved[which] if kept is None else kept.reading.outputs[differentiable]

    residual = argument(1)
    if saved.mean is None:
        if differentiable:
            return torch.relu(argument(0) + residual)
        return run_kernel("add_relu_forward", argument(0), residual, request=node.request)
    if not differentiable:
        vectors = (saved.weight_copy, saved.bias_copy, saved.mean, saved.invstd)
        return _apply(node, argument(0) if saved.z is None else saved.z, vectors, residual)
    if saved.total_count is not None:
        raise RuntimeError("sync_bn_act: double backward is not supported")
    z = argument(0)
    if saved.z is not None:
        z = reference.conv_forward(z, saved.conv_weight, saved.conv_bias, node.convolution)
    output = F.batch_norm(z, None, None, saved.weight, saved.bias, True, 0.0, node.eps)
    return reference._activate(output, residual, node.relu)


def _apply(node: Any, z: Any, vectors: Vectors, residual: Tensor | None) -> Tensor:
    weight, bias, mean, invstd = vectors
    return run_kernel("bn_apply", z, mean, invstd, weight, bias, residual, node.relu, request=node.request)
