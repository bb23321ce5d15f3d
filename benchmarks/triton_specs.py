"""The Triton kernels that the layers of networks launch on a given GPU, listed without running any."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from resfuse.backends.triton import (
    add_relu,
    bn_act,
    configs,
    conv_bn_act,
    conv_bn_act_train,
    dgrad,
    heuristics,
    launch,
    wgrad,
)
from resfuse.backends.triton.grad_prologue import BatchNormGrad
from resfuse.backends.triton.launch import DeviceProperties, KernelSpec
from resfuse.backends.triton.problems import ConvConfig, ConvProblem, Kind, Precision
from resfuse.cli.tune_layers import tile_problem

_switch: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]


def conv_specs(problem: ConvProblem, device: DeviceProperties, config: ConvConfig | None = None) -> list[KernelSpec]:
    """What a convolution launches, with the configuration given or chosen.

    Forward in the form that takes the most registers, with a residual and a ReLU; gradients from a dz that is given and
    from one that is computed while it is loaded.
    """
    p = problem
    x, dz, w = (
        _nhwc(p, *shape) for shape in ((p.n, p.c, p.h, p.w), (p.n, p.k, p.oh, p.ow), (p.k, p.group_in, p.r, p.s))
    )
    z, residual, out = (torch.empty_like(dz) for _ in range(3))
    mean, var, weight, bias, sum_1, sum_2 = (torch.empty(p.k, device="meta") for _ in range(6))
    grad = BatchNormGrad(dz, z, out, weight, mean, var, sum_1, sum_2, p.n * p.oh * p.ow)
    norm = (mean, var, weight, bias, None, residual, True)
    geometry = (p.stride, p.padding, p.dilation, p.groups)
    calls: dict[Kind, Callable[[], None]] = {
        "forward": lambda: conv_bn_act.eval_forward(x, w, *norm, *geometry, 1e-5, out),
        "train": lambda: conv_bn_act_train.train_forward(x, w, *norm, *geometry, 0.1, 1e-5, z, out, sum_1, sum_2),
        "dgrad": lambda: dgrad.dgrad(dz, w, *geometry, x),
        "wgrad": lambda: wgrad.wgrad(dz, x, *geometry, w),
    }
    fused: dict[Kind, Callable[[], None]] = {
        "dgrad": lambda: dgrad.dgrad(grad, w, *geometry, x),
        "wgrad": lambda: wgrad.wgrad(grad, x, *geometry, w),
    }
    choice = contextlib.nullcontext() if config is None else configs.forced(p.kind, config)
    with launch.collected(device) as specs, float32_convolutions(p.precision), choice:
        calls[p.kind]()
        fused.get(p.kind, lambda: None)()
    return specs


def pointwise_specs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, memory_format: torch.memory_format, device: DeviceProperties
) -> list[KernelSpec]:
    """What add_relu, bn_act and the split verbs launch on one shape, with all that is optional and without."""
    x = torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=memory_format)
    v = torch.empty(shape[1], device="meta")
    count = x.numel() // shape[1]
    with launch.collected(device) as specs:
        add_relu.forward(x, x, x)
        add_relu.backward(x, x, x)
        bn_act.statistics(x, v, v)
        for y, residual, vector, relu in ((x, x, v, True), (None, None, None, False)):
            bn_act.train_forward(x, residual, x, vector, vector, vector, vector, v, v, 0.1, 1e-5, relu)
            for eps in (1e-5, None):
                bn_act.apply(x, residual, x, v, v, vector, vector, eps, relu)
            for batch_statistics in (True, False):
                for dx in (x, None):
                    bn_act.backward(x, x, y, vector, v, v, dx, residual, v, v, batch_statistics)
                bn_act.backward_apply(x, x, y, vector, v, v, v, v, x, count if batch_statistics else None)
    return specs


def shared_memory_bound(problem: ConvProblem, spec: KernelSpec) -> int:
    """Shared memory of a convolution kernel as heuristics, and the size of a cooperative grid, have it; else 0."""
    if "BLOCK_K" not in spec.constants:
        return 0
    block_m, block_n, block_k = (spec.constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    config = ConvConfig(block_m, block_n, block_k, spec.num_warps, spec.num_stages)
    return heuristics.shared_memory(tile_problem(problem), config)


def every_spec(
    problems: Iterable[ConvProblem], device: DeviceProperties, *, tables: bool
) -> Iterator[tuple[ConvProblem, KernelSpec]]:
    """What the heuristics choose for the problems, and with `tables` everything that a table may choose."""
    for problem in dict.fromkeys(problems):
        choices: list[ConvConfig | None] = [None]
        if tables:
            choices += configs.every_config(tile_problem(problem), device)
        for config in choices:
            for spec in conv_specs(problem, device, config):
                yield problem, spec


@contextmanager
def float32_convolutions(precision: Precision) -> Iterator[None]:
    """Set torch's own switch for the arithmetic of float32 convolutions."""
    before = _switch.fp32_precision
    _switch.fp32_precision = precision
    try:
        yield
    finally:
        _switch.fp32_precision = before


def _nhwc(problem: ConvProblem, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=problem.dtype, device="meta", memory_format=torch.channels_last)
