"""The account of a training step: what it holds for a batch of any size, from two small batches run on the CPU."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.memory import counting
from benchmarks.memory.networks import Network
from benchmarks.providers import PROVIDERS
from benchmarks.providers.base import Setting, Step, in_layout
from benchmarks.providers.steps import make_step

EAGER, COMPILED, FUSED = "eager_channels_last", "inductor", "resfuse"
PROVIDER_NAMES = (EAGER, COMPILED, FUSED)
BATCHES = (2, 4)
"""Two points make a line; one image would leave batch norms at 1x1 pixels without a variance."""
PARTITION = "aot_eager_decomp_partition"
"""torch.compile's backend that decomposes and partitions as Inductor does, and generates no code."""


_BATCH_NORMS = ("native_batch_norm", "bn_train_forward", "bn_backward_apply")
Timeline = list[tuple[str, int]]


class Line(NamedTuple):
    """Bytes as a function of the batch: fixed + images * per_image."""

    fixed: float
    per_image: float

    def at(self, batch: int) -> int:
        return round(self.fixed + batch * self.per_image)

    @classmethod
    def through(cls, values: Sequence[int]) -> Line:
        """The values at the two `BATCHES`."""
        (low, high), (first, last) = BATCHES, values
        slope = (last - first) / (high - low)
        return cls(first - low * slope, slope)


@dataclasses.dataclass(frozen=True)
class Account:
    """The bytes of a training step of one network by one provider in one dtype."""

    parameters: int
    """Gradients and momentum, all of the parameters' dtype, need as much each; a block has no momentum here."""
    buffers: int
    input: Line
    """Images and labels; a block's input and the gradient of its output."""
    saved: Line
    """Kept for backward: activations per image; fixed are statistics and weights cast by autocast."""
    timeline: tuple[Line, ...]
    """Everything alive, after each operator of the step."""

    def peak(self, batch: int) -> int:
        """The most that is alive at once, workspace within operators left out."""
        return max(line.at(batch) for line in self.timeline)

    def largest_batch(self, limit: int) -> int:
        """The largest batch whose `peak` is at most `limit` bytes; 0 if even the fixed part is more."""
        if any(line.fixed > limit for line in self.timeline):
            return 0
        growing = [line for line in self.timeline if line.per_image > 0]
        batch = min(math.floor((limit - line.fixed) / line.per_image) for line in growing)
        return batch if self.peak(batch) <= limit else batch - 1  # `at` rounds


class _Run(NamedTuple):
    """A provider's step of one of the two batches."""

    module: nn.Module
    arguments: tuple[Tensor, ...]
    step: functools.partial[object]

    @property
    def own(self) -> list[Tensor]:
        return [*self.module.parameters(), *self.module.buffers()]


def account(network: Network, provider: str, dtype: torch.dtype) -> Account:
    """Count a network's training step, run for two small batches on the CPU.

    Args:
        network: on its full extent; its parameters are float32, and other dtypes run under autocast.
        provider: one of `PROVIDER_NAMES`.
        dtype: float32 or bfloat16.

    What a compiled step keeps is counted; what it computes with cannot be on a CPU without running the code that
    Inductor generates there, so its timeline is eager's with the difference of what is kept.

    Raises:
        ValueError: an unknown provider.
        RuntimeError: the batches run different batch norms, so that no lines can be laid through them.
    """
    saved, inputs, timelines = [], [], []
    for run in _runs(network, provider, dtype):
        saved.append(counting.saved_bytes(run.step, run.own))
        inputs.append(_bytes(run.arguments))
        if provider != COMPILED:
            timelines.append(counting.live_bytes(run.step, [*run.own, *run.arguments]))
    parameters, buffers = _bytes(run.module.parameters()), _bytes(run.module.buffers())
    kept, input = Line.through(saved), Line.through(inputs)
    if provider != COMPILED:
        return Account(parameters, buffers, input, kept, _lines(*timelines))
    eager = account(network, EAGER, dtype)
    difference = Line(kept.fixed - eager.saved.fixed, kept.per_image - eager.saved.per_image)
    # Where nothing is kept the difference has no place: in the update, which needs state and gradients at least.
    update = _sum(Line(parameters * (3 if network.level == "model" else 2) + buffers, 0.0), input)
    return Account(parameters, buffers, input, kept, (*(_sum(line, difference) for line in eager.timeline), update))


def kept_line(network: Network, provider: str, dtype: torch.dtype) -> Line:
    """What a step keeps for backward: `account(...).saved`, without the rest.

    Raises:
        ValueError: an unknown provider.
    """
    return Line.through([counting.saved_bytes(run.step, run.own) for run in _runs(network, provider, dtype)])


def _runs(network: Network, provider: str, dtype: torch.dtype) -> Iterator[_Run]:
    """A step for each of `BATCHES`, which has run once: it is compiled, and its weights are packed."""
    if provider not in PROVIDER_NAMES:
        raise ValueError(f"provider: expected one of {', '.join(PROVIDER_NAMES)}, got {provider!r}")
    setting = Setting("train", dtype, torch.device("cpu"), torch.get_num_threads(), level=network.level)
    for batch in BATCHES:
        module, given = network.make(), arguments(network, batch, setting)
        run = _Run(module, given, functools.partial(prepare(module, provider, given, setting), *given))
        run.step()
        yield run


def prepare(module: nn.Module, provider: str, arguments: tuple[Tensor, ...], setting: Setting) -> Step:
    """The provider's training step of a new module; on a CPU the compiled one without Inductor's code."""
    if provider == COMPILED and setting.device.type == "cpu":
        torch._dynamo.reset()
        compiled = torch.compile(in_layout(module, "channels_last"), backend=PARTITION, dynamic=False)
        return make_step(compiled, setting)
    return PROVIDERS[provider].prepare(module, arguments[:1], setting)


def arguments(network: Network, batch: int, setting: Setting) -> tuple[Tensor, ...]:
    """Of a step: images and labels, or a block's input and the gradient of its output, in channels_last."""
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = torch.randn(shape, generator=generator).to(setting.device, dtype)
        return tensor.contiguous(memory_format=torch.channels_last)

    if network.level == "model":
        labels = torch.randint(network.classes, (batch,), generator=generator).to(setting.device)
        return random(network.shape(batch), torch.float32), labels
    # What the block before leaves and the block after returns: in autocast's dtype.
    input = random(network.shape(batch), setting.dtype).requires_grad_()
    with torch.no_grad(), torch.device("meta"):
        output = network.make()(torch.empty(network.shape(batch))).shape
    return input, random(tuple(output), setting.dtype)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _sum(first: Line, second: Line) -> Line:
    return Line(first.fixed + second.fixed, first.per_image + second.per_image)


def _lines(small: Timeline, large: Timeline) -> tuple[Line, ...]:
    """A line for each operator of the step; or, where batches differ in them, for each segment.

    Backends choose by size how a convolution is run, and then operators do not correspond one to one.  The most that is
    alive in a segment may belong to another operator in another batch: the line is then a little too low.
    """
    if [name for name, _ in small] == [name for name, _ in large]:
        pairs = zip((alive for _, alive in small), (alive for _, alive in large), strict=True)
    else:
        segments = _segments(small), _segments(large)
        if len(segments[0]) != len(segments[1]):
            raise RuntimeError(f"batches of {BATCHES[0]} and {BATCHES[1]} run different batch norms")
        pairs = zip(*segments, strict=True)
    return tuple(dict.fromkeys(map(Line.through, pairs)))


def _segments(timeline: Timeline) -> list[int]:
    """The most that is alive from one batch norm to the next; the optimiser's update is a segment of its own."""
    update = max((i for i, (name, _) in enumerate(timeline) if "convolution_backward" in name), default=-1) + 1
    found, running = [], 0
    for index, (name, alive) in enumerate(timeline):
        running = max(running, alive)
        if index + 1 == update or any(norm in name for norm in _BATCH_NORMS):
            found.append(running)
            running = 0
    return [*found, running]
