"""The backward of conv_bn_act without dz in memory, where that moves fewer bytes.

dz, the gradient of the convolution's output, is what batch norm's backward writes and the convolution's two gradients
read.  They can compute it as they load its operands instead (`grad_prologue`): a write and some reads less, but more
operands than one, again for every tile of theirs.  So it pays for 1x1 convolutions of few input channels where only one
of the two gradients is wanted, or where batch norm is frozen, as detectors train it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resfuse.backends.triton import add_relu, bn_act, grad_plan
from resfuse.backends.triton.conv_plan import conv_problem
from resfuse.backends.triton.dgrad import dgrad
from resfuse.backends.triton.grad_prologue import BatchNormGrad
from resfuse.backends.triton.problems import Kind
from resfuse.backends.triton.wgrad import wgrad
from resfuse.layout import channels_last, conv_memory_format, like_strides

Pair = tuple[int, int]
Gradients = tuple[tuple[Tensor | None, Tensor | None, None], Tensor | None, Tensor | None, Tensor | None]

# Bytes that tiles read again come from L2, in this part of the time that memory takes.
_FROM_L2 = 0.5
# Beyond, the products take longer than the loads, and want operands that are copied while they are multiplied.
_MOST_READS = 4
# A predicted gain below this is not worth loads that can not run as far ahead.  (None of the three has been measured.)
_WORTH = 0.8


def conv_bn_act_backward(
    grad_output: Tensor,
    input: Tensor,
    conv_weight: Tensor,
    z: Tensor | None,
    output: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    training: bool,
    needs_conv: tuple[bool, bool, bool],
    needs_sums: bool,
    needs_residual_grad: bool,
) -> Gradients | None:
    """((grad_input, grad_conv_weight, None), grad_weight, grad_bias, grad_residual) as the separate verbs give them.

    None where these move fewer bytes, or where dz is needed itself: for the gradient of the convolution's bias, or in
    NCHW memory.  z is read with `training` or `needs_sums` (batch norm's own gradients) and may else be None.
    """
    conv = stride, padding, dilation, groups
    if needs_conv[2] or conv_memory_format(input, conv_weight) != torch.channels_last:
        return None
    kinds: tuple[Kind, Kind] = ("dgrad", "wgrad")
    wanted = [kind for kind, needed in zip(kinds, needs_conv[:2], strict=True) if needed]
    problems = [conv_problem(kind, input, conv_weight, *conv) for kind in wanted]
    reads = [grad_plan.reads_of_dz(problem, input.device) for problem in problems]
    needs_sums = needs_sums or training
    if not pays(reads, relu=output is not None, training=training, sums=needs_sums, residual=needs_residual_grad):
        return None

    dy, y = channels_last(grad_output), None if output is None else channels_last(output)
    z = dy if z is None else channels_last(z)  # any tensor of its shape: what it has part in is not needed then
    sum_g = sum_g_xhat = grad_residual = None
    if needs_residual_grad:
        grad_residual = torch.empty_like(dy) if y is not None else dy
    if needs_sums:
        sum_g, sum_g_xhat = torch.empty_like(mean), torch.empty_like(mean)
        masked = None if y is None else grad_residual
        bn_act.backward(dy, z, y, None, mean, invstd, None, masked, sum_g, sum_g_xhat, training)
    elif needs_residual_grad and y is not None:
        assert grad_residual is not None
        add_relu.backward(dy, y, grad_residual)
    if grad_residual is not None:  # masked already
        dy, y = grad_residual, None
    vectors = (None if weight is None else weight.contiguous()), mean, invstd
    count = z.numel() // z.shape[1] if training else None
    dz = BatchNormGrad(dy, z, y, *vectors, sum_g, sum_g_xhat, count)

    grad_input = grad_conv_weight = None
    if needs_conv[0]:
        dx = torch.empty_like(input, memory_format=torch.channels_last)
        dgrad(dz, channels_last(conv_weight.to(input.dtype)), *conv, dx)
        grad_input = like_strides(dx, input)
    if needs_conv[1]:
        dw = torch.empty_like(conv_weight, memory_format=torch.channels_last)
        wgrad(dz, channels_last(input), *conv, dw)
        grad_conv_weight = like_strides(dw, conv_weight)
    return (grad_input, grad_conv_weight, None), sum_g_xhat, sum_g, grad_residual


def pays(reads: list[int], *, relu: bool, training: bool, sums: bool, residual: bool) -> bool:
    """Whether computing dz where it is loaded takes clearly less time at the memory than writing it.

    Counted in passes over a tensor of dz's size.  `reads` says how often each of the wanted gradients loads dz: once
    from memory, the other times from L2.
    """
    if not reads or max(reads) > _MOST_READS:
        return False
    loads = sum(1 + (count - 1) * _FROM_L2 for count in reads)
    writes_g = residual and relu  # the gradient of the residual; then g is read instead of dy and y
    operands = (1 if writes_g or not relu else 2) + training
    reduction = 2 + relu + writes_g  # reads dy, z and y
    separate = reduction + (operands if training else 0) + 1 + loads
    masking = 3 if writes_g else 0  # reads dy and y, writes g
    return (reduction if sums else masking) + operands * loads < _WORTH * separate
