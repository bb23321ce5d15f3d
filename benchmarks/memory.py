"""Memory of a training step: what is kept for backward, the peak that follows for any batch, and the measured peak."""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import math
import multiprocessing
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import models, report, results
from benchmarks.case import DTYPES, Case, Setting
from benchmarks.harness import say
from benchmarks.providers import PROVIDERS
from benchmarks.steps import make_step
from benchmarks.worker import resident_peak

EAGER, COMPILED, FUSED = "eager_channels_last", "inductor", "resfuse"
BATCHES = (2, 4)
"""Two points make a line; one image would leave batch norms at 1x1 pixels without a variance."""
PARTITION = "aot_eager_decomp_partition"
"""torch.compile's backend that decomposes and partitions as Inductor does, and generates no code."""


class Line(NamedTuple):
    """Bytes as a function of the batch: fixed + images * per_image."""

    fixed: float
    per_image: float

    def at(self, batch: int) -> int:
        """Bytes of a batch."""
        return round(self.fixed + batch * self.per_image)

    @classmethod
    def through(cls, values: Sequence[int]) -> Line:
        """The line through the values at the two `BATCHES`."""
        slope = (values[1] - values[0]) / (BATCHES[1] - BATCHES[0])
        return cls(values[0] - BATCHES[0] * slope, slope)


class Account(NamedTuple):
    """The bytes of a training step, counted for two small batches on the CPU."""

    saved: Line
    """Kept for backward."""
    alive: tuple[Line, ...]
    """All tensors that are alive, at the points of the step where this may be the most."""

    def peak(self, batch: int) -> int:
        """The most that is alive at once; workspace within operators is not in it."""
        return max(line.at(batch) for line in self.alive)

    def largest_batch(self, limit: int) -> int:
        """The largest batch whose `peak` is at most `limit` bytes."""
        fits = [
            (limit - line.fixed) / line.per_image if line.per_image > 0 else math.inf if line.fixed <= limit else 0
            for line in self.alive
        ]
        return max(0, math.floor(min(fits)))


def saved_bytes(step: Callable[[], object], own: Iterable[Tensor]) -> int:
    """Bytes that a training step keeps for backward, each storage once; `own` (parameters, buffers) do not count."""
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    storages: dict[int, torch.UntypedStorage] = {}  # kept alive: an address is not used twice

    @torch.compiler.disable
    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storage.nbytes() for storage in storages.values())


class LiveBytes(TorchDispatchMode):
    """Follows the storages of all tensors that operators return, from then until they are freed.

    Compiled code runs uncompiled in here.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self.total = 0
        self.timeline: list[tuple[str, int]] = []
        """After every operator its name and the bytes alive."""
        for tensor in tensors:
            self._follow(tensor)

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive and size:
            self._alive[key] = weakref.ref(storage, lambda _: self._forget(key)), size
            self.total += size

    def _forget(self, key: int) -> None:
        self.total -= self._alive.pop(key)[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf)
        self.timeline.append((func.name(), self.total))
        return result


def account(name: str, provider: str, dtype: torch.dtype, size: int | None = None) -> Account:
    """Count the training step of a network.

    The peak of a compiled step cannot be counted on a CPU without the code that Inductor generates there: its
    transients are taken from eager, with its own kept bytes.

    Args:
        name: of `benchmarks.models`.
        provider: `EAGER`, `COMPILED` or `FUSED`.
        dtype: of the activations; other dtypes than float32 run under autocast.
        size: height and width of the images; by default those that the network is made for.
    """
    saved, timelines = [], []
    for batch in BATCHES:
        module, step, arguments = _training(name, provider, batch, Setting("train", dtype, "cpu", 1), size)
        own = [*module.parameters(), *module.buffers()]
        step()  # compiles, and makes the momentum
        saved.append(saved_bytes(step, own))
        if provider != COMPILED:
            live = LiveBytes([*own, *arguments])
            with live:
                step()  # shows the optimiser's state, which was not in `own`
                live.timeline.clear()
                step()
            timelines.append(live.timeline)
    kept = Line.through(saved)
    if provider != COMPILED:
        return Account(kept, _lines(*timelines))
    eager = account(name, EAGER, dtype, size)
    fixed, per_image = (mine - other for mine, other in zip(kept, eager.saved, strict=True))
    parameters = sum(parameter.nbytes for parameter in module.parameters())
    # The update keeps no activations: there the difference has no place, but weights, gradients and momentum have.
    update = Line(3 * parameters, 0.0)
    return Account(kept, (*(Line(line.fixed + fixed, line.per_image + per_image) for line in eager.alive), update))


def _training(
    name: str, provider: str, batch: int, setting: Setting, size: int | None
) -> tuple[nn.Module, Callable[[], object], list[Tensor]]:
    """A new module, its training step by a provider, and the step's images and labels."""
    module = models.build(name).to(setting.device)
    (case,) = models.cases([name], batch, size)
    images = torch.randn(case.shapes[0], device=setting.device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=setting.device)
    if provider == COMPILED and setting.device == "cpu":
        torch.compiler.reset()
        laid_out = PROVIDERS[EAGER].in_layout(module)
        step = make_step(torch.compile(laid_out, backend=PARTITION, dynamic=False), setting)  # type: ignore[arg-type]
    else:
        step = PROVIDERS[provider].prepare(module, (images,), setting)
    return module, functools.partial(step, images, labels), [images, labels]


def _lines(small: list[tuple[str, int]], large: list[tuple[str, int]]) -> tuple[Line, ...]:
    """A line per operator or, where a backend runs the batches by different operators, per stretch of the step.

    A stretch ends with a batch norm, or with the gradient of the last convolution, before the update.
    """
    if [name for name, _ in small] == [name for name, _ in large]:
        pairs = zip((alive for _, alive in small), (alive for _, alive in large), strict=True)
    else:
        pairs = zip(_stretches(small), _stretches(large), strict=True)
    return tuple(dict.fromkeys(map(Line.through, pairs)))


def _stretches(timeline: list[tuple[str, int]]) -> list[int]:
    update = max((i for i, (name, _) in enumerate(timeline) if "convolution_backward" in name), default=-1) + 1
    found, most = [], 0
    for index, (name, alive) in enumerate(timeline):
        most = max(most, alive)
        if index + 1 == update or any(
            norm in name for norm in ("native_batch_norm", "bn_act_train", "conv_bn_act_train")
        ):
            found.append(most)
            most = 0
    return [*found, most]


def measured_peak(name: str, provider: str, batch: int, setting: Setting, size: int | None) -> int:
    """The most memory that a training step has: CUDA's allocator, or the resident set of this process on a CPU."""
    _, step, _ = _training(name, provider, batch, setting, size)
    for _ in range(3):  # compiles, makes the momentum, lets cuDNN try its algorithms
        step()
    if setting.device == "cpu":
        return resident_peak()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _in_a_process(function: Callable[..., int], *arguments: object) -> int:
    """The result of a function in a process of its own, whose memory nothing else has used."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables and write memory.csv."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", nargs="+", default=["resnet50"], help="default %(default)s")
    add("--dtype", nargs="+", choices=list(DTYPES), default=["bfloat16"], help="default %(default)s")
    add("--batch", nargs="+", type=int, default=[32, 64, 128, 256], help="default %(default)s")
    add("--size", type=int, help="height and width of the images (default: the network's own)")
    add("--provider", nargs="+", default=[EAGER, COMPILED, FUSED], help="default %(default)s")
    add("--limit-gb", nargs="+", type=float, default=[16, 24, 80, 141], help="print the largest batch in so many GB")
    add("--measure", action=argparse.BooleanOptionalAction, default=gpu, help="run steps too, each in its own process")
    add("--device", default="cuda" if gpu else "cpu", help="of the steps that are run (default %(default)s)")
    add("--output", type=Path, default=results.RESULTS, metavar="DIR", help="where memory.csv is (default %(default)s)")
    args = parser.parse_args(argv)
    conditions = results.conditions(args.device, torch.get_num_threads())
    for name in args.model:
        for dtype in args.dtype:
            rows, table = [], {}
            setting = Setting("train", DTYPES[dtype], args.device, torch.get_num_threads())
            for provider in args.provider:
                found = account(name, provider, DTYPES[dtype], args.size)
                line = {"kept MB per image": found.saved.per_image / 1e6}
                for batch in args.batch:
                    (case,) = models.cases([name], batch, args.size)
                    quantities = {"saved_bytes": found.saved.at(batch), "predicted_peak": found.peak(batch)}
                    line[f"peak GB at {batch}"] = found.peak(batch) / 1e9
                    if args.measure:
                        try:
                            peak = _in_a_process(measured_peak, name, provider, batch, setting, args.size)
                        except Exception as error:  # too large a batch must not lose the others
                            say(f"{name}, {provider}, batch {batch}: {type(error).__name__}: {error}".splitlines()[0])
                        else:
                            quantities["peak_memory"] = peak
                            line[f"measured at {batch}"] = peak / 1e9
                    rows += [
                        results.row(Case("memory", *case[1:]), setting, provider, metric, "B", [value])
                        for metric, value in quantities.items()
                    ]
                line |= {f"batch in {limit:g} GB": found.largest_batch(int(limit * 1e9)) for limit in args.limit_gb}
                table[report.label(provider)] = line
            results.update(args.output / "memory.csv", [row | conditions for row in rows])
            say(f"{name}, training step, {dtype}")
            say(pd.DataFrame(table).to_string(float_format=lambda value: f"{value:.4g}"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
