"""Memory of a training step: the bytes kept for backward, and the peak of a process that runs it."""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import functools
import gc
import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks import models, report, results
from benchmarks.case import DTYPES, Setting
from benchmarks.harness import say
from benchmarks.providers import PROVIDERS
from benchmarks.steps import make_step

EAGER, COMPILED, FUSED, RECOMPUTED = "eager_channels_last", "inductor", "resfuse", "resfuse_recompute"
BATCHES = (2, 4)
"""Two points make a line; one image would leave batch norms at 1x1 pixels without a variance."""
PARTITION = "aot_eager_decomp_partition"
"""torch.compile's backend that decomposes and partitions as Inductor does, and generates no code."""


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


def kept(name: str, provider: str, dtype: torch.dtype, size: int | None = None) -> tuple[float, float]:
    """(fixed, per image) bytes that a training step keeps, from two small batches run on the CPU.

    Fixed are the statistics and the weights that autocast has cast.

    Args:
        name: of `benchmarks.models`.
        provider: `EAGER`, `COMPILED`, `FUSED` or `RECOMPUTED`.
        dtype: of the activations; other dtypes than float32 run under autocast.
        size: height and width of the images; by default those that the network is made for.
    """
    counts = []
    for batch in BATCHES:
        module, step = training_step(name, provider, batch, Setting("train", dtype, "cpu", 1), size)
        step()  # compiles, and makes the momentum
        counts.append(saved_bytes(step, [*module.parameters(), *module.buffers()]))
    per_image = (counts[1] - counts[0]) / (BATCHES[1] - BATCHES[0])
    return counts[0] - BATCHES[0] * per_image, per_image


def training_step(
    name: str, provider: str, batch: int, setting: Setting, size: int | None
) -> tuple[nn.Module, Callable[[], object]]:
    """A new network and its training step by a provider; on a CPU the compiled one without Inductor's code."""
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
    return module, functools.partial(step, images, labels)


def measured_peak(name: str, provider: str, batch: int, setting: Setting, size: int | None) -> int:
    """The most memory that a training step takes beyond what there was before it: parameters, momentum and images.

    CUDA's allocator tells, or the resident set of this process on a CPU.
    """
    module, step = training_step(name, provider, batch, setting, size)
    small = [tensor[: BATCHES[0]] for tensor in step.args]  # type: ignore[attr-defined]
    for _ in range(3):  # compiles, makes the momentum, lets cuDNN try its algorithms
        step() if setting.device != "cpu" else step.func(*small)  # type: ignore[attr-defined]
    module.zero_grad(set_to_none=True)
    if setting.device == "cpu":
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _resident("VmRSS") - _resident("LazyFree")  # the pool's pages of the small steps, which are free
        step()
        return _resident("VmHWM") - before
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _resident(key: str) -> int:
    """Bytes of this process that are resident now (VmRSS), were at most (VmHWM), or may be taken from it (LazyFree)."""
    lines = [line for name in ("status", "smaps_rollup") for line in Path("/proc/self", name).read_text().splitlines()]
    return int(dict(line.split(":", 1) for line in lines)[key].split()[0]) * 1024


def in_a_process(function: Callable[..., int], *arguments: object) -> int:
    """The result of a function in a process of its own, whose memory nothing else has used."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
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
    add("--provider", nargs="+", default=[EAGER, COMPILED, FUSED, RECOMPUTED], help="default %(default)s")
    add("--peak", action=argparse.BooleanOptionalAction, default=gpu, help="run steps too, each in its own process")
    add("--device", default="cuda" if gpu else "cpu", help="of the steps that are run (default %(default)s)")
    add("--output", type=Path, default=results.RESULTS, metavar="DIR", help="where memory.csv is (default %(default)s)")
    args = parser.parse_args(argv)
    conditions = results.conditions(args.device, torch.get_num_threads())
    for name, dtype in itertools.product(args.model, args.dtype):
        setting = Setting("train", DTYPES[dtype], args.device, torch.get_num_threads())
        rows, table = [], {}
        for provider in args.provider:
            fixed, per_image = kept(name, provider, DTYPES[dtype], args.size)
            line = table[report.label(provider)] = {"kept MB per image": per_image / 1e6}
            for batch in args.batch:
                quantities = {"saved_bytes": fixed + batch * per_image}
                try:
                    if args.peak:
                        peak = in_a_process(measured_peak, name, provider, batch, setting, args.size)
                        quantities["peak_memory"], line[f"peak GB, batch {batch}"] = peak, peak / 1e9
                except Exception as error:  # too large a batch must not lose the others
                    say(f"{name}, {provider}, batch {batch}: {type(error).__name__}: {error}".splitlines()[0])
                case = models.cases([name], batch, args.size)[0]._replace(op="memory")
                rows += [results.row(case, setting, provider, key, "B", [value]) for key, value in quantities.items()]
        results.update(args.output / "memory.csv", [row | conditions for row in rows])
        say(f"{name}, training step, {dtype}")
        say(pd.DataFrame(table).to_string(float_format=lambda value: f"{value:.4g}"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
