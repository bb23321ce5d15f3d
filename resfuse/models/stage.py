"""Stage: residual blocks in sequence, with optional activation checkpointing."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_checkpointed

from resfuse.nn.lazy import evaluated, force
from resfuse.nn.sequential import FusedSequential, sequential_forward
from resfuse.ops.recompute import recomputed


class Stage(FusedSequential):
    """A Sequential of residual blocks; in inference a block may write its output over an input without other readers.

    Shapes: those of its blocks, each taking the output of the one before.

    Equivalent to `torch.nn.Sequential(*blocks)`, whose state_dict keys it has.

    Args:
        blocks: the modules.
        checkpoint: checkpoint every N blocks, 0 for never: where gradients are recorded, only the inputs of these
            segments are saved, and backward recomputes the rest (`torch.utils.checkpoint`; Chen et al. 2016,
            arXiv:1604.06174).  Gradients and running statistics are the same: updates by the recomputation are
            discarded.  `torch.compile`, which decides itself what to save, ignores it.
        recompute: that of the network, for the segments.

    Raises:
        ValueError: `checkpoint` is negative.
    """

    def __init__(self, blocks: Iterable[nn.Module], checkpoint: int = 0, recompute: bool = False) -> None:
        super().__init__(*blocks)
        if checkpoint < 0:
            raise ValueError(f"checkpoint: expected a number of blocks, 0 for none, got {checkpoint}")
        self.checkpoint, self.recompute = int(checkpoint), recompute

    @evaluated
    def forward(self, input: Tensor) -> Any:
        blocks = list(self._modules.values())
        if not self.checkpoint or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return sequential_forward(blocks, input)
        run = recomputed(_run) if self.recompute else _run
        for start in range(0, len(blocks), self.checkpoint):
            segment = blocks[start : start + self.checkpoint]
            input = run_checkpointed(
                functools.partial(run, segment),
                force(input),
                use_reentrant=False,
                context_fn=functools.partial(_contexts, segment),
            )
        return input


def _run(blocks: Sequence[nn.Module], input: Tensor) -> Tensor:
    return force(sequential_forward(blocks, input))


def _contexts(blocks: Sequence[nn.Module]) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """Contexts of the forward and of its recomputation."""
    return nullcontext(), _TemporaryBuffers(blocks)


class _TemporaryBuffers(ExitStack):
    """Replaces the buffers of some modules by copies, so that updates to them are discarded; may be entered again."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.modules = modules

    def __enter__(self) -> _TemporaryBuffers:
        for module in (module for root in self.modules for module in root.modules()):
            buffers = module._buffers
            self.callback(buffers.update, buffers.copy())
            buffers.update({name: buffer.clone() for name, buffer in buffers.items() if buffer is not None})
        return super().__enter__()
