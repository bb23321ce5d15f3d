"""What is compared: the tasks, their tensors, and what a correct result is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.compare import tasks
from benchmarks.compare.tasks import HOST, MODEL, OP, Task, Tensors
from benchmarks.workload import SLACK
from resfuse import contract
from resfuse.calibration import calibrate_

INPUTS = 4
"""Batches that take turns."""
CALIBRATION = 4
DEFAULT_BATCHES = {("cpu", "inference"): (1, 16), ("cpu", "train"): (8,), ("cuda", "inference"): (1, 128), ("cuda", "train"): (256,)}  # fmt: skip  # noqa: E501
OP_BATCH = {"cpu": 8, "cuda": 128}

# name, channels, size, channels_out, kernel, residual: layers of ResNet-50's first stage
_OPERATORS = (
    ("conv_bn_act 3x3", 64, 56, 64, 3, False),
    ("conv_bn_act 1x1 + residual", 64, 56, 256, 1, True),
    ("bn_act", 256, 56, 0, 1, False),
    ("add_relu", 256, 56, 0, 1, True),
)
_TINY = 32, 7


def model_tasks(
    models: Iterable[str], modes: Iterable[str], batches: Sequence[int], dtypes: Iterable[torch.dtype], device: str,
    size: int,
) -> Iterator[Task]:  # fmt: skip
    """The steps of models; of no `batches`, those that suit the device and the mode."""
    for name in models:
        for mode in modes:
            for batch in batches or DEFAULT_BATCHES[device, mode]:
                for dtype in dtypes:
                    yield Task(MODEL, name, mode, dtype, device, (batch, 3, size, size))


def micro_tasks(modes: Iterable[str], dtypes: Iterable[torch.dtype], device: str, *, scale: int = 1) -> Iterator[Task]:
    """Single operators: on large tensors (`scale` times smaller, for tests), and their host time on tiny ones."""
    for mode in modes:
        for dtype in dtypes:
            for name, channels, size, out, kernel, residual in _OPERATORS:
                large = (max(1, OP_BATCH[device] // scale), channels, max(1, size // scale), max(1, size // scale))
                yield Task(OP, name, mode, dtype, device, large, out, kernel, residual)
            for name, _, _, out, kernel, residual in _OPERATORS:
                tiny, extent = _TINY
                # Of a 1x1 convolution more images: of few, eager and oneDNN take another way than for large ones.
                batch = 16 if out and kernel == 1 else 2
                yield Task(
                    HOST, name, mode, dtype, device, (batch, tiny, extent, extent), out and tiny, kernel, residual
                )


@dataclasses.dataclass(frozen=True)
class Job:
    """A task with its tensors, and what float64 computes of them."""

    task: Task
    tensors: Tensors
    batches: list[tuple[Tensor, ...]]
    exact: Tensors
    eager_errors: dict[str, float]

    def save(self, path: Path, threads: int) -> None:
        """What a side reads; calls of which host time counts have one thread."""
        used = 1 if self.task.kind == HOST else threads
        job = {"task": self.task, "tensors": self.tensors, "batches": self.batches, "threads": used}
        torch.save(job, path)

    def errors(self, results: Mapping[str, Tensor]) -> dict[str, float]:
        """Relative distance of each quantity from float64, by the norm."""
        return {name: contract.relative_error(results[name], exact) for name, exact in self.exact.items()}

    def limit(self, quantity: str) -> float:
        """The largest error of a result that is correct: the contract's, with the benchmarks' slack."""
        floor = contract.floor_of(self.task.dtype, self.task.device, convolution=True)
        return SLACK * (self.eager_errors[quantity] + floor)

    def objections(self, results: Mapping[str, Tensor]) -> list[str]:
        """What is wrong with results; empty where they are correct."""
        found = self.errors(results)
        return [f"{name} is off by {error:.1e}" for name, error in found.items() if not error <= self.limit(name)]


def make_job(task: Task) -> Job:
    """The same tensors at every call."""
    generator = torch.Generator().manual_seed(0)
    tensors, output_shape = _operands(task, generator) if task.kind != MODEL else _state(task, generator)
    batches = [_batch(task, output_shape, generator) for _ in range(INPUTS)]
    exact = _computed(*tasks.in_double(task, tensors, batches[:1]))
    job = Job(task, tensors, batches, exact, eager_errors={})
    return dataclasses.replace(job, eager_errors=job.errors(_computed(task, tensors, batches[:1])))


def _computed(task: Task, tensors: Tensors, batches: list[tuple[Tensor, ...]]) -> Tensors:
    """What eager PyTorch computes for the first batch."""
    if not task.trains:
        batches = [tuple(tensor[: tasks.CHECKED] for tensor in batch) for batch in batches]
        if task.residual:
            tensors = tensors | {"residual": tensors["residual"][: tasks.CHECKED]}
    step, moved, quantities = tasks.prepare(task, tensors, batches, fused=False)
    found = tasks.snapshot(quantities(step(*moved[0])))
    if task.device == "cuda":
        del step, moved, quantities
        torch.cuda.empty_cache()  # the sides need the memory
    return found


def _state(task: Task, generator: torch.Generator) -> tuple[Tensors, tuple[int, ...]]:
    torch.manual_seed(0)
    model = tasks.build_model(task.name).to(task.device)
    images = torch.randn(min(CALIBRATION, task.shape[0] + 1), *task.shape[1:], generator=generator)
    calibrate_(model, images.to(task.device))
    state = {name: value.cpu() for name, value in model.to(task.parameter_dtype).state_dict().items()}
    with torch.no_grad():
        classes = model(images[:1].to(task.device, task.parameter_dtype)).shape[1]
    return state, (task.shape[0], classes)


def _operands(task: Task, generator: torch.Generator) -> tuple[Tensors, tuple[int, ...]]:
    """By the names that the operators have for them."""
    size, channels, *extent = task.shape
    out = task.channels_out or channels
    shape = (size, out, *extent)
    found: Tensors = {}
    if task.channels_out:
        fan_in = channels * task.kernel**2
        weight = torch.randn(out, channels, task.kernel, task.kernel, generator=generator) * math.sqrt(2 / fan_in)
        found["conv_weight"] = weight.to(task.dtype).contiguous(memory_format=torch.channels_last)
    if not task.name.startswith("add_relu"):
        for name in ("running_mean", "running_var", "weight", "bias"):
            found[name] = torch.rand(out, generator=generator) + 0.5
    if task.residual:
        residual = torch.randn(shape, generator=generator).to(task.dtype)
        found["residual"] = residual.contiguous(memory_format=torch.channels_last)
    return found, shape


def _batch(task: Task, output_shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
    images = torch.randn(task.shape, generator=generator).to(task.parameter_dtype)
    if not task.trains:
        return (images,)
    if task.kind == MODEL:
        return images, torch.randint(output_shape[1], (task.shape[0],), generator=generator)
    return images, torch.randn(output_shape, generator=generator).to(task.dtype)
