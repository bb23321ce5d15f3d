"""Compile the Triton kernels of residual networks, and show their registers, spills, shared memory and occupancy.

On any machine: every kernel that the heuristics choose for the layers of the given networks, at all batch sizes (powers
of two), for each GPU generation; with --tables also those that a table may choose.  Writes a CSV too, a row per kernel.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import triton_compile
from benchmarks.options import DTYPES, RESULTS, summary
from benchmarks.triton_compile import CACHE, DEVICES, Job, Usage
from resfuse.backends.triton import INTERPRETED
from resfuse.backends.triton.launch import KernelSpec
from resfuse.backends.triton.problems import KINDS, Precision
from resfuse.cli.tune import describe
from resfuse.cli.tune_layers import layer_problems

MODELS = ("resnet18", "resnet50", "cifar_resnet")
BATCHES = tuple(2**exponent for exponent in range(10))
TF32 = "tf32"
POINTWISE = "pointwise"
FLAGS = ("SPLIT", "PERSISTENT", "PACK_ROW", "PACK_TAPS")


@dataclasses.dataclass(frozen=True)
class Row:
    """A kernel, what it was compiled for and from, and what it needs."""

    capability: int
    kernel: str
    dtype: str
    layer: str
    """One of those that launch it."""
    tile: str
    flags: str
    num_stages: int
    cooperative: bool
    shared_bound: int
    """What the heuristics take for the shared memory of a convolution kernel; 0 for the others."""
    usage: Usage


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if INTERPRETED:
        print("TRITON_INTERPRET is set: this process can not compile kernels", file=sys.stderr)
        return 2
    console = Console(highlight=False)
    with console.status("listing the kernels"):
        layers = dict(_jobs(args))
    usages, errors = triton_compile.compile_all(layers, args.jobs, console, cache=args.cache)
    rows = [row_of(job, *layers[job], usage) for job, usage in usages.items()]
    by_target = sorted(rows, key=_target)
    for (capability, dtype), group in itertools.groupby(by_target, key=_target):
        console.print(_table(f"sm_{capability}, {dtype}: the most that any layer needs", list(group)))
    for job, error in errors.items():
        console.print(f"[red]sm_{job.capability} {job.name}, {layers[job][0]}:[/] {escape(error)}", soft_wrap=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write(args.output, rows)
    console.print(f"{len(rows)} kernels, a row each in {args.output}; {len(errors)} could not be compiled")
    return 1 if errors else 0


def write(path: Path, rows: Iterable[Row]) -> None:
    """A CSV, a line per kernel."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*_names(Row)[:-1], *_names(Usage)])
        for row in rows:
            writer.writerow([getattr(row, name) for name in _names(Row)[:-1]] + list(dataclasses.astuple(row.usage)))


def read(path: Path) -> list[dict[str, str]]:
    """What `write` wrote, column -> text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.triton_resources", description=summary(__doc__))
    add = parser.add_argument
    add("--model", nargs="+", default=list(MODELS), metavar="NAME", help=f"default {' '.join(MODELS)}")
    add("--arch", type=int, nargs="+", choices=tuple(DEVICES), default=list(DEVICES), help="default 80 90 100")
    add("--dtype", nargs="+", choices=(*DTYPES, TF32), default=["bfloat16"], help="default bfloat16")
    add("--kind", nargs="+", choices=(*KINDS, POINTWISE), default=[*KINDS, POINTWISE], help="default all")
    add("--batch", type=int, nargs="+", default=list(BATCHES), metavar="N", help="default 1 2 4 ... 512")
    add("--tables", action="store_true", help="also everything that tables may choose")
    add("--quick", action="store_true", help="of every configuration, one layer")
    add("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default %(default)s)")
    add("--output", type=Path, default=RESULTS / "triton" / "resources.csv", help="CSV (default %(default)s)")
    add("--cache", type=Path, default=CACHE, help="where results are kept (default %(default)s)")
    return parser


def _jobs(args: argparse.Namespace) -> Iterator[tuple[Job, tuple[str, int]]]:
    """(kernel, (a layer, bound of the shared memory)) of everything asked for, each kernel once."""
    seen = set()
    for capability, dtype in itertools.product(args.arch, args.dtype):
        for layer, spec, bound in _specs(args, capability, dtype):
            job = Job.of(capability, spec)
            identity = _configuration(job) if args.quick else job
            if identity not in seen:
                seen.add(identity)
                yield job, (layer, bound)


def _specs(args: argparse.Namespace, capability: int, dtype: str) -> Iterator[tuple[str, KernelSpec, int]]:
    """(layer, kernel, bound of its shared memory)."""
    from benchmarks.triton_specs import every_spec, pointwise_specs, shared_memory_bound

    device, torch_dtype = DEVICES[capability], DTYPES.get(dtype, torch.float32)
    precision: Precision = "tf32" if dtype == TF32 else "ieee"
    kinds = [kind for kind in args.kind if kind != POINTWISE]
    for model in args.model:
        problems = layer_problems(model, args.batch, torch_dtype, kinds=kinds, precision=precision)
        for problem, spec in every_spec(problems, device, tables=args.tables):
            yield describe(problem), spec, shared_memory_bound(problem, spec)
    if POINTWISE in args.kind and dtype != TF32:
        for model, memory_format in itertools.product(args.model, (torch.channels_last, torch.contiguous_format)):
            for p in layer_problems(model, args.batch, torch_dtype, kinds=["forward"]):
                for spec in pointwise_specs((p.n, p.k, p.oh, p.ow), torch_dtype, memory_format, device):
                    yield f"{p.n}x{p.oh}x{p.ow}x{p.k} {str(memory_format)[6:]}", spec, 0


def _configuration(job: Job) -> tuple[object, ...]:
    """What is compiled once of each with --quick: tiles, options, and which operands there are; not shapes."""
    constants = dict(job.constants)
    tile = tuple(constants.get(name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", *FLAGS, "PRECISION"))
    absent = tuple(name for name, value in job.constants if value is None)
    options = (job.num_warps, job.num_stages, job.cooperative)
    return job.capability, job.name, job.signature[0], tile, absent, options


def row_of(job: Job, layer: str, shared_bound: int, usage: Usage) -> Row:
    constants = dict(job.constants)
    blocks = [str(value) for name, value in job.constants if name.startswith("BLOCK")]
    flags = [name for name in FLAGS if constants.get(name)]
    flags += [f"{name} {constants[name]}" for name in ("SPLIT_K", "PACK_GROUPS") if constants.get(name, 1) > 1]
    flags += ["GIVEN"] if "z_ptr" in constants and job.name != "conv_bn_act_train_kernel" else []
    dtype = "tf32" if constants.get("PRECISION") == TF32 else job.signature[0][1].removeprefix("*")
    return Row(
        job.capability, job.name, dtype, layer, "x".join(blocks), " ".join(flags), job.num_stages, job.cooperative,
        shared_bound, usage,
    )  # fmt: skip


def _table(title: str, rows: Sequence[Row]) -> Table:
    """A line per kernel and tile."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("kernel", style="cyan", no_wrap=True)
    for heading in ("tile", "warps", "stages", "of", "regs", "spill", "shared", "occ.", "mma"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.pad_edge, table.padding = False, (0, 1, 0, 0)

    def case(row: Row) -> tuple[str, str, int, int]:
        return row.kernel, row.tile, row.usage.warps, row.num_stages

    for key, found in itertools.groupby(sorted(rows, key=case), key=case):
        usages = [row.usage for row in found]
        spill = max(usage.spill for usage in usages)
        table.add_row(
            key[0].removesuffix("_kernel"), *map(str, key[1:]), str(len(usages)),
            str(max(usage.registers for usage in usages)), f"[bold red]{spill}[/]" if spill else "0",
            str(max(usage.shared for usage in usages)), str(min(usage.occupancy for usage in usages)),
            " ".join(sorted({usage.mma.partition(".")[0] for usage in usages})),
        )  # fmt: skip
    return table


def _target(row: Row) -> tuple[int, str]:
    return row.capability, row.dtype


def _names(record: type) -> list[str]:
    return [field.name for field in dataclasses.fields(record)]


if __name__ == "__main__":
    sys.exit(main())
