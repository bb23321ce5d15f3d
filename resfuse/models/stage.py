"""Stage: blocks one after the other, whose activations can be computed again in backward instead of being kept."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_checkpointed

from resfuse.nn.sequential import sequential_forward, sequential_item


class Stage(nn.Sequential):
    """A Sequential of residual blocks; in inference a block may write its output over its input, which nobody else has.

    Shapes: those of its blocks, each of which takes what the one before returned.

    Equivalent to `torch.nn.Sequential(*blocks)`, whose state_dict keys it has.

    Args:
        blocks: the modules.
        checkpoint: 0, or a number of blocks: where gradients are recorded, only the input of every so many blocks is
            kept, and backward computes the rest again (`torch.utils.checkpoint`; Chen et al. 2016, arXiv:1604.06174).
            Gradients are the same, and so are running statistics: what a batch norm does when it is run again is
            forgotten.  `torch.compile`, which decides itself what to keep, ignores it.

    Raises:
        ValueError: `checkpoint` is negative.
    """

    def __init__(self, blocks: Iterable[nn.Module], checkpoint: int = 0) -> None:
        super().__init__(*blocks)
        if checkpoint < 0:
            raise ValueError(f"checkpoint: expected a number of blocks, 0 for none, got {checkpoint}")
        self.checkpoint = int(checkpoint)

    def __getitem__(self, index: Any) -> Any:
        return sequential_item(self, index)

    def forward(self, input: Tensor) -> Tensor:
        blocks = list(self._modules.values())
        if not self.checkpoint or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return sequential_forward(blocks, input)
        for start in range(0, len(blocks), self.checkpoint):
            segment = blocks[start : start + self.checkpoint]
            input = run_checkpointed(
                functools.partial(sequential_forward, segment),
                input,
                use_reentrant=False,
                context_fn=functools.partial(_contexts, segment),
            )
        return input


def _contexts(blocks: Sequence[nn.Module]) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """What the forward and what its repetition run in."""
    return nullcontext(), _BuffersAside(blocks)


class _BuffersAside:
    """Copies stand in for the buffers of some modules, so that what is done to them is without effect."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self.originals: list[tuple[nn.Module, str, Tensor]] = []

    def __enter__(self) -> None:
        for root in self.modules:
            for module in root.modules():
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        self.originals.append((module, name, buffer))
                        module._buffers[name] = buffer.clone()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for module, name, buffer in self.originals:
            module._buffers[name] = buffer
        self.originals.clear()
