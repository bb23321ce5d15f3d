"""sync_bn_act: bn_act with the batch statistics of all processes of a group.

The four split kernels do the work on each process; between them stand two collectives, for any number of processes:
an all-gather of (mean, M2, count) per channel in forward, and an all-reduce of (sum g, sum g xhat) in backward.  Counts
travel with the statistics, so that batches may have unequal sizes, or be empty on some of the processes, and stay on
the device, so that no process waits for its GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from resfuse.backends.dispatch import backend_for, through_dispatcher
from resfuse.layout import as_result, empty_result
from resfuse.ops import recompute
from resfuse.ops.bn_act import _fake_statistics
from resfuse.ops.library import define, run_kernel
from resfuse.ops.recompute import Saved
from resfuse.types import BatchNorm

Group = Any
"""A ProcessGroup; while compiling, its name."""


def statistics(input: Tensor, bn: BatchNorm, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, invstd, count) over the inputs of all processes, bit for bit the same on each; updates the running ones.

    One all-gather.  `count`, the number of values per channel, is a tensor of one element.
    """
    channels = input.shape[1]
    mean, m2, count = merge(_all_gather(_own_statistics(input), group).view(-1, 2 * channels + 1))
    if bn.running_mean is not None:
        _update(bn.running_mean, mean, bn.momentum)
    if bn.running_var is not None:
        _update(bn.running_var, m2 / (count - 1), bn.momentum)
    return mean, (m2 / count + bn.eps).rsqrt(), count


def merge(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, M2, count) of several sets from a row (mean, M2, count) for each; a set of no values may have any mean.

    Chan's formula for all of them at once; the first mean is taken off before the means are averaged, so that these
    lose nothing to their size.
    Source: Chan, Golub & LeVeque 1983, "Algorithms for Computing the Sample Variance", section 3.
    """
    channels = (parts.shape[1] - 1) // 2
    means, m2s, counts = parts.split((channels, channels, 1), dim=1)
    count = counts.sum(0)
    mean = means[0] + (counts * (means - means[0])).sum(0) / count
    m2 = m2s.sum(0) + (counts * (means - mean).square()).sum(0)
    return mean, m2, count


def _own_statistics(input: Tensor) -> Tensor:
    """(mean, M2, count) of this process as one vector, in float32 or wider."""
    channels = input.shape[1]
    if input.numel() == 0:
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        return torch.zeros(2 * channels + 1, dtype=dtype, device=input.device)
    mean, m2 = run_kernel("bn_statistics", input)
    return torch.cat((mean, m2, mean.new_full((1,), input.numel() // channels)))


def _update(running: Tensor, value: Tensor, momentum: float) -> None:
    running.copy_(torch.lerp(running.to(value.dtype), value, momentum))


def _all_gather(vector: Tensor, group: Group) -> Tensor:
    """The vectors of all processes, one after the other."""
    if torch.compiler.is_compiling():
        from torch.distributed import _functional_collectives as functional_collectives

        return functional_collectives.all_gather_tensor(vector, 0, group)
    gathered = vector.new_empty(vector.numel() * dist.get_world_size(group))
    dist.all_gather_into_tensor(gathered, vector, group)
    return gathered


def _all_reduce(vector: Tensor, group: Group) -> Tensor:
    """The sum over all processes; may be computed in place."""
    if torch.compiler.is_compiling():
        from torch.distributed import _functional_collectives as functional_collectives

        return functional_collectives.all_reduce(vector, "sum", group)
    dist.all_reduce(vector, group=group)
    return vector


def bn_apply(input: Tensor, *args: Any) -> Tensor:
    return run_kernel("bn_apply", input, *args)


def _run_backward_apply(grad_output: Tensor, input: Tensor, *vectors: Any, request: str | None) -> Tensor:
    """`bn_backward_apply` with averages in place of sums, whose count is then one."""
    if through_dispatcher():
        return torch.ops.resfuse.bn_backward_apply(grad_output, input, *vectors)
    chosen = backend_for("bn_backward_apply", input, request=request)
    return chosen.bn_backward_apply(grad_output, input, *vectors, 1)


# Registered operators return what their fakes promise: new tensors only, with the strides of `empty_result`.


def _apply(input: Tensor, *rest: Any) -> Tensor:
    return as_result(backend_for("bn_apply", input).bn_apply(input, *rest), input)


def _backward_reduce(grad_output: Tensor, input: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    chosen = backend_for("bn_backward_reduce", input)
    sum_g, sum_g_xhat, masked = chosen.bn_backward_reduce(grad_output, input, *rest)
    relu = rest[-1]
    return sum_g, sum_g_xhat, as_result(masked, input) if relu else input.new_empty(0)


def _backward_apply(grad_output: Tensor, input: Tensor, *rest: Any) -> Tensor:
    chosen = backend_for("bn_backward_apply", input)
    return as_result(chosen.bn_backward_apply(grad_output, input, *rest, 1), input)


define(
    "bn_statistics(Tensor input) -> (Tensor, Tensor)",
    lambda input: backend_for("bn_statistics", input).bn_statistics(input),
    lambda input: _fake_statistics(input, input.shape[1]),
)
define(
    "bn_apply(Tensor input, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, Tensor? residual, bool relu) "
    "-> Tensor",
    _apply,
    lambda input, *_: empty_result(input),
)
define(
    "bn_backward_reduce(Tensor grad_output, Tensor input, Tensor? output, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor invstd, bool relu) -> (Tensor, Tensor, Tensor)",
    _backward_reduce,
    lambda grad_output, input, output, weight, bias, mean, invstd, relu: (
        torch.empty_like(mean),
        torch.empty_like(mean),
        empty_result(input) if relu else input.new_empty(0),
    ),
)
define(
    "bn_backward_apply(Tensor grad_output, Tensor input, Tensor? weight, Tensor mean, Tensor invstd, "
    "Tensor mean_g, Tensor mean_g_xhat) -> Tensor",
    _backward_apply,
    lambda grad_output, input, *_: empty_result(input),
)


class SyncBNActFunction(torch.autograd.Function):
    """Normalisation by given statistics of all processes, whose dependence on the input enters the gradient.

    Saves the input, the weight, mean, invstd and count, and what `recompute.save` says.  The gradients of weight and
    bias are this process's own, as those of all other parameters are (DDP averages them).
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        mean: Tensor,
        invstd: Tensor,
        count: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        relu: bool,
        group: Group,
    ) -> Tensor:
        output = bn_apply(input, mean, invstd, weight, bias, residual, relu)
        ctx.group = group
        recompute.save(
            ctx, Saved(input, residual, None, None, weight, bias, mean, invstd, total_count=count), output, relu
        )
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        saved: Any = recompute.take(ctx)
        input, (weight, _, mean, invstd) = recompute.input_of(ctx, saved), saved.vectors
        args = (grad_output, input, saved.output, *saved.vectors, ctx.relu)
        grad_bias, grad_weight, masked = run_kernel("bn_backward_reduce", *args, request=ctx.request)
        masked = masked if ctx.relu else grad_output  # the registered operator returns new tensors only
        needs, grad_input = ctx.needs_input_grad, None
        if needs[0]:
            mean_g, mean_g_xhat = (
                _all_reduce(torch.cat((grad_bias, grad_weight)), ctx.group) / saved.total_count
            ).chunk(2)
            vectors = (weight, mean, invstd, mean_g, mean_g_xhat)
            grad_input = _run_backward_apply(masked, input, *vectors, request=ctx.request)
        return (
            grad_input,
            None,
            None,
            None,
            grad_weight if needs[4] else None,
            grad_bias if needs[5] else None,
            masked if needs[6] else None,
            None,
            None,
        )
