"""Synchronised batch norm by the four split kernels: several processes, each with a part of a batch, as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resfuse.backends import dispatch
from tests.contract import Call, Results


def merge(parts: Sequence[tuple[int, Tensor, Tensor]]) -> tuple[int, Tensor, Tensor]:
    """(count, mean, M2) of several sets, by Chan's formula: what the processes of a group do with each other's."""
    count, mean, m2 = parts[0]
    for other_count, other_mean, other_m2 in parts[1:]:
        total, delta = count + other_count, other_mean - mean
        mean = mean + delta * other_count / total
        m2 = m2 + other_m2 + delta.square() * count * other_count / total
        count = total
    return count, mean, m2


def invstd_of(count: int, m2: Tensor, eps: float = 1e-5) -> Tensor:
    return (m2 / count + eps).rsqrt()


def results(backend: str, call: Call, grad_output: Tensor, shares: Sequence[slice]) -> Results:
    """Output and gradients of a bn_act in training, each process with its share of the images."""
    run, relu = dispatch.backend(backend), call.options.get("activation", "relu") == "relu"
    input, residual, weight, bias = (call.tensors.get(name) for name in ("input", "residual", "weight", "bias"))
    assert input is not None and residual is not None
    values = input.numel() // input.shape[1] // input.shape[0]
    statistics = [(len(input[share]) * values, *run.bn_statistics(input[share])) for share in shares]
    count, mean, m2 = merge(statistics)
    invstd = invstd_of(count, m2, call.options.get("eps", 1e-5))
    outputs = [run.bn_apply(input[share], mean, invstd, weight, bias, residual[share], relu) for share in shares]
    masks = outputs if relu else [None] * len(shares)
    sums = [
        run.bn_backward_reduce(grad_output[share], input[share], mask, weight, bias, mean, invstd, relu)
        for share, mask in zip(shares, masks, strict=True)
    ]
    sum_g, sum_g_xhat = (torch.stack(part).sum(0) for part in list(zip(*sums, strict=True))[:2])
    grads = [
        run.bn_backward_apply(masked, input[share], weight, mean, invstd, sum_g, sum_g_xhat, count)
        for share, (_, _, masked) in zip(shares, sums, strict=True)
    ]
    found = {
        "output": torch.cat(outputs),
        "grad_input": torch.cat(grads),
        "grad_residual": torch.cat([masked for _, _, masked in sums]),
    }
    return found | ({} if weight is None else {"grad_weight": sum_g_xhat, "grad_bias": sum_g})
