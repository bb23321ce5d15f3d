"""CUDA graphs of steps: captured once, replayed when they are timed, so that no time on the host is in the figures."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

WARMUP = 3
"""Calls before the capture, on a stream of their own, as `torch.cuda.graph` wants it: what happens once, such as the
choice of algorithms and the making of the optimiser's state, is then behind."""

Replay = Callable[[], object]
Record = Callable[[Callable[[], Any]], tuple[Replay, Any]]
"""Captures what a function does -> (what does it again, what the function returned: the same memory at each replay)."""


class Captured(NamedTuple):
    """Steps that can be replayed."""

    call: Callable[[], object]
    """Replays one graph, the next one each time."""
    steps: int
    """Calls of the step in one graph."""
    first: Callable[[], Any]
    """Replays the graph of the first batch and returns what its first step returns."""


def capture(step: Callable[..., Any], batches: Sequence[tuple[Any, ...]], together: bool, record: Record) -> Captured:
    """Record a step on each of the batches, whose tensors stay where they are.

    Args:
        step: what is called.
        batches: its arguments; they take turns, so that the L2 cache does not hold what is read.
        together: one graph with a step on every batch, for steps so short that the launch of a graph would count;
            otherwise a graph for each batch.
        record: `cuda_recorder()`, or what stands for it in a test.
    """
    groups = [list(batches)] if together else [[batch] for batch in batches]
    # The first batch comes last, so that the gradients on the parameters afterwards are those of its graph.
    recorded = [record(functools.partial(_run, step, group)) for group in reversed(groups)][::-1]
    turns = itertools.cycle([replay for replay, _ in recorded])
    replay_first, outputs = recorded[0]

    def first() -> Any:
        replay_first()
        return outputs[0]

    return Captured(lambda: next(turns)(), len(groups[0]), first)


def cuda_recorder() -> Record:
    """Records CUDA graphs, which all take their memory from one pool."""
    pool = torch.cuda.graph_pool_handle()

    def record(function: Callable[[], Any]) -> tuple[Replay, Any]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            outputs = function()
        return graph.replay, outputs

    return record


def _run(step: Callable[..., Any], batches: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [step(*batch) for batch in batches]
