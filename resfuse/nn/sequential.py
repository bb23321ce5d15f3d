"""`nn.Sequential.forward` with fused calls.

Each run of Conv2d-BatchNorm2d(-ReLU) or BatchNorm2d-ReLU becomes one call, and a residual block that follows another
one is told that its input has no other reader.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resfuse.nn.batch_norm import batch_norm_kind
from resfuse.nn.blocks import CHAINS, SEQUENTIAL_FORWARDS, Chain, class_forward, ends_unseen
from resfuse.nn.fused_call import bn_act, conv_bn_act, global_hooks, unobserved


class Run(NamedTuple):
    """Consecutive modules that one fused call can replace."""

    stop: int
    """Index of the first module after the run."""
    conv: nn.Module | None
    bn: nn.Module
    act: nn.Module | None


def run_at(modules: list[nn.Module], index: int) -> Run | None:
    """The run that begins at an index, judged by the modules' classes alone."""
    conv: nn.Module | None = modules[index]
    if type(conv) is nn.Conv2d:
        index += 1
    else:
        conv = None
    if index == len(modules) or batch_norm_kind(modules[index]) is None:
        return None
    bn = modules[index]
    index += 1
    if index < len(modules) and type(modules[index]) is nn.ReLU:
        return Run(index + 1, conv, bn, modules[index])
    return None if conv is None else Run(index, conv, bn, None)


def sequential_forward(modules: Iterable[nn.Module], input: Tensor) -> Tensor:
    """Compute what `nn.Sequential.forward` does, with one fused call per run."""
    modules, index = list(modules), 0
    unseen = False  # True if the input comes from a block and has no other reader
    while index < len(modules):
        module, run = modules[index], run_at(modules, index)
        if run is not None:
            index, conv, bn, act = run
            input = bn_act(bn, input, None, act) if conv is None else conv_bn_act(conv, bn, input, None, act)
            unseen = False
            continue
        chain = _chain(module)
        if chain is None or not unseen or type(input) is not Tensor:
            input = module(input)
        else:
            input = chain.forward(module, input)
        unseen = chain is not None and ends_unseen(module._modules[chain.bn], module._modules[chain.act])
        index += 1
    return input


class FusedSequential(nn.Sequential):
    """An `nn.Sequential` with fused calls; subclasses have constructors of their own."""

    def forward(self, input: Tensor) -> Tensor:
        return sequential_forward(self._modules.values(), input)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):  # which is a plain Sequential
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)


SEQUENTIAL_FORWARDS.add(FusedSequential.forward)


def _chain(module: nn.Module) -> Chain | None:
    """A block's entry in `CHAINS`, in inference; None for other modules and where the block itself must be called."""
    chain = CHAINS.get(class_forward(module))
    if chain is None or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    if not unobserved(module) or global_hooks() or torch._C._get_tracing_state() is not None:
        return None
    return chain if module._compiled_call_impl is None and chain.applies(module) else None
