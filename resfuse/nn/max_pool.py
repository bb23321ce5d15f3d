"""Max pooling in fused forwards: in training one that keeps bytes (`resfuse.ops.max_pool`), else PyTorch's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse.backends import reference
from resfuse.backends.dispatch import backend_for
from resfuse.layout import pool_output_size
from resfuse.nn.fused_call import global_hooks, must_decompose, unobserved
from resfuse.ops.max_pool import MOST_POSITIONS, MaxPoolFunction
from resfuse.types import Pair, Pooling

_max_pool2d, _pool_forward = F.max_pool2d, nn.MaxPool2d.forward


def pooled(f: Any, *args: Any, **options: Any) -> Any:
    """`f(*args, **options)`, where `f` may be a `MaxPool2d` or `F.max_pool2d`, with all of its rules."""
    pooling = pooling_of(f, *args, **options)
    if pooling is None or global_hooks() or not _keeps_bytes(args[0], pooling):
        return f(*args, **options)
    return MaxPoolFunction.apply(args[0], pooling)


def pooling_of(f: Any, *args: Any, **options: Any) -> Pooling | None:
    """What `f(*args, **options)` pools by, if it is PyTorch's max pooling; None if it must be called."""
    if F.max_pool2d is not _max_pool2d:
        return None
    if type(f) is nn.MaxPool2d:
        if len(args) == 1 and not options and unobserved(f) and nn.MaxPool2d.forward is _pool_forward:
            return _pooling(f.kernel_size, f.stride, f.padding, f.dilation, f.ceil_mode, f.return_indices)
    elif f is _max_pool2d and args:
        return _pooling(*args[1:], **options)
    return None


def _keeps_bytes(input: Any, pooling: Pooling) -> bool:
    """True if a backward is to come, nothing observes PyTorch's operator, and a backend has kernels of its own."""
    return (
        isinstance(input, Tensor)
        and input.requires_grad
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not must_decompose(input)
        and input.dim() == 4
        and input.stride(1) == 1 < input.shape[1]  # NCHW is PyTorch's
        and input.is_contiguous(memory_format=torch.channels_last)
        and pooling.kernel_size[0] * pooling.kernel_size[1] <= MOST_POSITIONS
        and min(pool_output_size(input.shape, pooling)) > 0
        and backend_for("max_pool_forward", input) is not reference
    )


def _pooling(
    kernel_size: Any = None,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: Any = False,
    return_indices: Any = False,
) -> Pooling | None:
    """The settings, None if PyTorch has to check or interpret them."""
    kernel, steps, edges, gaps = map(_pair, (kernel_size, stride or kernel_size, padding, dilation))
    if return_indices or kernel is None or steps is None or edges is None or gaps is None:
        return None
    halves = zip(edges, kernel, strict=True)
    if min(*kernel, *steps, *gaps) < 1 or not all(0 <= 2 * edge <= size for edge, size in halves):
        return None
    return Pooling(kernel, steps, edges, gaps, bool(ceil_mode))


def _pair(size: Any) -> Pair | None:
    if type(size) is int:
        return size, size
    pair = tuple(size) if type(size) in (tuple, list) else ()
    return pair if len(pair) == 2 and all(type(number) is int for number in pair) else None
