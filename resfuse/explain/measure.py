"""How long single operators take on a device of this machine, on random tensors of the shapes that a model has."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, cuda

from resfuse.backends import dispatch as registry
from resfuse.explain.operators import function_for
from resfuse.tracing import Call

Run = Callable[[], object]

_WARMUP = 2
_FEWEST, _MOST = 5, 50
_SECONDS = 0.2  # of samples, per operator
_SHORTEST = 1e-3  # s between two events on a GPU
_MOST_PASSES = 32
_ASSUMED_CACHE = 32 << 20
_MOST_SETS = 8
_MOST_BYTES = 2 << 30  # of all sets; two are always made


class Stopwatch:
    """Times the calls of a model; equal calls only once."""

    def __init__(self, device: torch.device, cache: int, request: str | None, backward: bool) -> None:
        """Prepare for one device.

        Args:
            device: of this machine.
            cache: B of its last-level cache, 0 if unknown.
            request: the backend to ask for, None for automatic choice.
            backward: gradients too.
        """
        self._device, self._request, self._backward = device, request, backward
        self._cache = cache or _ASSUMED_CACHE
        self._known: dict[Any, float] = {}

    def seconds(self, call: Call) -> float:
        """The median time of such a call, and of its gradients."""
        key = (call.target, call.requires_grad, _frozen(call.arguments))
        if key not in self._known:
            with (
                registry.use_backend(self._request),
                torch.autocast(self._device.type, enabled=False),  # its casts are calls of their own
                torch.inference_mode(False),
                torch.set_grad_enabled(self._backward),
            ):
                runs = self._runs(call)
                self._known[key] = time_on_gpu(runs, self._device) if self._device.type == "cuda" else time_on_cpu(runs)
        return self._known[key]

    def _runs(self, call: Call) -> list[Run]:
        """The call on several sets of tensors: by the time that one comes again, the caches hold others."""
        size = sum(_nbytes(value) for value in call.arguments.values())
        count = min(_MOST_SETS, 1 + -(-2 * self._cache // max(size, 1)), max(2, _MOST_BYTES // max(size, 1)))
        generator = torch.Generator(self._device).manual_seed(0)
        return [self._run(call, generator) for _ in range(max(2, count))]

    def _run(self, call: Call, generator: torch.Generator) -> Run:
        arguments = {name: self._random(name, value, generator) for name, value in call.arguments.items()}
        leaves = [
            arguments[name].requires_grad_()
            for name in call.arguments
            if self._backward and name in call.requires_grad and arguments[name].is_floating_point()
        ]
        forward = function_for(call)
        if not leaves:
            return lambda: forward(arguments)
        with torch.no_grad():
            gradient = torch.randn_like(first_tensor(forward(arguments)))

        def forward_and_backward() -> object:
            output = first_tensor(forward(arguments))
            return torch.autograd.grad(output, leaves, gradient, allow_unused=True)

        return forward_and_backward

    def _random(self, name: str, value: Any, generator: torch.Generator) -> Any:
        """Data of the strides of a fake tensor, or of a list of them."""
        if isinstance(value, list | tuple):
            return [self._random(name, item, generator) for item in value]
        if not isinstance(value, Tensor):
            return value
        tensor = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=self._device)
        if not value.is_floating_point():
            return tensor.zero_()
        if name == "running_var":
            return tensor.uniform_(0.5, 1.5, generator=generator)
        return tensor.normal_(generator=generator)


def first_tensor(output: Any) -> Tensor:
    """The output, or the first of several."""
    return output if isinstance(output, Tensor) else output[0]


def time_on_cpu(runs: list[Run]) -> float:
    """Seconds of a run: the median over calls that take turns."""
    for run in runs * _WARMUP:
        run()
    samples: list[float] = []
    until = time.perf_counter() + _SECONDS
    while len(samples) < _FEWEST or (len(samples) < _MOST and time.perf_counter() < until):
        run = runs[len(samples) % len(runs)]
        started = time.perf_counter()
        run()
        samples.append(time.perf_counter() - started)
    return statistics.median(samples)


def time_on_gpu(runs: list[Run], device: torch.device) -> float:
    """Seconds of a run on the GPU: the median over replays of a CUDA graph of all runs, or of queued rounds of them."""
    with cuda.device(device):
        return _time_on_current_gpu(runs)


def _time_on_current_gpu(runs: list[Run]) -> float:
    stream = cuda.Stream()
    stream.wait_stream(cuda.current_stream())
    with cuda.stream(stream):
        for run in runs * _WARMUP:
            run()
    cuda.current_stream().wait_stream(stream)
    cuda.synchronize()
    replay = _repeated(runs)
    once = statistics.median(_elapsed(replay, _FEWEST))
    passes = 1 if once >= _SHORTEST else min(_MOST_PASSES, math.ceil(_SHORTEST / max(once, 1e-6)))
    if passes > 1:  # so that neither a launch of the graph nor the clock's resolution counts
        replay = _repeated(runs * passes)
    samples = max(_FEWEST, min(_MOST, int(_SECONDS / (once * passes)) if once else _MOST))
    return statistics.median(_elapsed(replay, samples)) / (len(runs) * passes)


def _repeated(runs: list[Run]) -> Run:
    """All runs as one CUDA graph or, where they can not be captured, one after the other from Python."""

    def run_all() -> None:
        for run in runs:
            run()

    replay = _captured(run_all)
    if replay is None:
        return run_all
    replay()
    return replay


def _elapsed(replay: Run, count: int) -> list[float]:
    """Seconds of each of so many replays, queued without waiting."""
    begins, ends = ([cuda.Event(enable_timing=True) for _ in range(count)] for _ in range(2))
    for begin, end in zip(begins, ends, strict=True):
        begin.record()
        replay()
        end.record()
    cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in zip(begins, ends, strict=True)]


def _captured(run_all: Run) -> Run | None:
    """The replay of a CUDA graph; None if a run waits for the GPU, or does something else that graphs do not allow."""
    graph = cuda.CUDAGraph()
    with contextlib.suppress(RuntimeError):
        with cuda.graph(graph):
            run_all()
        return graph.replay
    cuda.synchronize()
    return None


def _nbytes(value: Any) -> int:
    if isinstance(value, list | tuple):
        return sum(_nbytes(item) for item in value)
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _frozen(value: Any) -> Any:
    """What of arguments decides how long a call takes, hashable."""
    if isinstance(value, Mapping):
        return tuple((name, _frozen(item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    return (tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else value
