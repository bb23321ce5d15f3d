"""The provider's side of a worker: one provider at work on one workload after the other."""

from __future__ import annotations

import gc
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import graphs, launches, measure
from benchmarks.measure import Sample
from benchmarks.providers import PROVIDERS, Provider, Setting
from benchmarks.workload import Workload, collect, first_results, needs_gradient

INPUTS = 4
"""Batches that take turns, at least."""
MOST_INPUTS = 64
COLD = 3
"""The batches of a part of a model are together at least this many times as large as the GPU's L2 cache."""
SHORT = 2e-4
"""Seconds per call under which calls on a GPU are timed together: an event between two takes microseconds."""
HOST_CALLS = 20
KEPT = 2 << 30
"""Bytes of GPU memory that a waiting provider may hold beside what is in use: the others need room too."""


class Findings(NamedTuple):
    """What is not a time per call."""

    peak_memory: int
    launches: int | None
    host_seconds: list[float] | None


class Runner:
    """Serves the requests of `benchmarks.worker.Worker`."""

    def __init__(self, provider: str) -> None:
        self._provider: Provider = PROVIDERS[provider]
        self._job: _Job | None = None

    def prepare(self, path: Any) -> dict[str, float]:
        self.release()
        self._job = _Job(self._provider, Workload.load(path))
        return self._job.errors

    def warm_up(self, limit: float) -> float:
        return self._current.warm_up(limit)

    def run(self, calls: int, lead_in: bool) -> list[Sample]:
        return self._current.run(calls, lead_in)

    def finish(self) -> Findings:
        return self._current.finish()

    def release(self) -> None:
        self._job = None
        torch._dynamo.reset()  # what was compiled holds on to weights
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def _current(self) -> _Job:
        assert self._job is not None, "prepare comes first"
        return self._job


class _Job:
    """A provider's step on a workload, ready to be timed."""

    def __init__(self, provider: Provider, workload: Workload) -> None:
        setting = workload.setting
        self._device = setting.device
        torch.set_num_threads(setting.threads)
        if setting.device.index is not None:
            torch.cuda.set_device(setting.device)  # events and graphs are of the current one
        torch.backends.cudnn.benchmark = True  # let cuDNN try its algorithms, for all providers alike
        module = workload.module()
        inputs = workload.batch(0)[: len(workload.case.inputs)]
        examples = tuple(tensor.detach() for tensor in inputs)
        step = provider.prepare(module, examples, setting)
        if setting.mode == "train":
            module.train()
        batches = [converted(provider, workload, index) for index in range(rotation(workload))]
        self.errors = workload.errors(first_results(step, module, batches[0], workload))
        self._plain = measure.cycle(batches, step)
        self._call, self._steps = self._plain, 1
        if setting.graph:
            captured = graphs.capture(step, batches, setting.level != "model", recorder(setting))
            self._call, self._steps = captured.call, captured.steps
            if setting.mode == "train" and setting.level == "model":
                restore(module, workload.state)  # the steps before the capture have trained it
            results = collect(captured.first(), module, batches[0], setting)
            self.errors = workload.errors(results)
        self._seconds = math.inf

    def warm_up(self, limit: float) -> float:
        seconds = measure.warm_up(self._call, self._device, limit)
        measure.reset_peak_memory(self._device)
        self._seconds = seconds
        return seconds

    def run(self, calls: int, lead_in: bool) -> list[Sample]:
        if lead_in:
            self._call()
        found = measure.call_samples(self._call, calls, self._device, self._seconds < SHORT)
        if self._device.type == "cuda" and torch.cuda.memory_reserved() - torch.cuda.memory_allocated() > KEPT:
            torch.cuda.empty_cache()
        return [Sample(*(value / self._steps for value in sample)) for sample in found]

    def finish(self) -> Findings:
        """Of calls as they are: of a graph the step that was captured is called once more."""
        output = self._plain()
        if not all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(output)):
            raise ArithmeticError("the result is no longer finite: what was timed is not a model at work")
        peak = measure.peak_memory(self._plain, self._device)
        if self._device.type != "cuda":
            return Findings(peak, None, None)
        host = measure.host_seconds(self._plain, HOST_CALLS, self._device)
        return Findings(peak, launches.count_launches(self._plain, self._device), host)


def rotation(workload: Workload) -> int:
    """How many batches take turns: on a GPU so many that what a part of a model reads is not in the L2 cache."""
    setting = workload.setting
    if setting.device.type != "cuda" or setting.level == "model":
        return INPUTS
    cache = torch.cuda.get_device_properties(setting.device).L2_cache_size
    elements = sum(math.prod(shape) for shape in (*workload.case.inputs, workload.output_shape))
    return batches_beyond(cache, elements * setting.dtype.itemsize)


def batches_beyond(cache: int, size: int) -> int:
    """How many batches of `size` bytes are together `COLD` times as large as a cache."""
    return min(MOST_INPUTS, max(INPUTS, math.ceil(COLD * cache / size)))


def converted(provider: Provider, workload: Workload, index: int) -> tuple[Any, ...]:
    """A step's arguments in the form that the provider wants."""
    count, setting = len(workload.case.inputs), workload.setting
    batch = workload.batch(index)
    inputs = [provider.convert(tensor.detach()) for tensor in batch[:count]]
    if needs_gradient(workload.case, setting):
        inputs = [tensor.requires_grad_() for tensor in inputs]
    rest = [provider.convert(tensor) if tensor.dim() == 4 else tensor for tensor in batch[count:]]
    return *inputs, *rest


def restore(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Give a module the values of its parameters and buffers again, in the same memory."""
    own = module.state_dict()
    for name, tensor in state.items():
        own[name].copy_(tensor)


def recorder(setting: Setting) -> graphs.Record:
    """What captures graphs on the setting's device.

    Raises:
        ValueError: it is not a GPU.
    """
    if setting.device.type != "cuda":
        raise ValueError(f"graph: expected a GPU, got device {setting.device}")
    return graphs.cuda_recorder()


def _tensors(output: Any) -> list[Tensor]:
    return [torch.as_tensor(part) for part in (output if isinstance(output, tuple) else (output,))]
