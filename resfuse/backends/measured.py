"""Tables of what `resfuse tune` measured: one JSON file per GPU, the user's own before those of the package.

    {"version": 2, "device": "NVIDIA H200", "measured_with": {"resfuse": "0.1.0", "torch": "2.11.0", "triton": "3.6.0"},
     "entries": [{"problem": {"kind": "forward", "dtype": "bfloat16", "n": 32, ...},
                  "microseconds": {"sm90": 41.2, "triton": 55.1, ...}, "left_out": {"cuda": "is wrong by 3.0e+00", ...},
                  "config": {"block_m": 128, "block_n": 64, ...}}, ...]}

`microseconds` and `left_out` are by backend; dispatch.py chooses by them.  `config` is the configuration of the triton
backend that took the time given there, for its plans.  Problem and config have the fields of `ConvProblem` and
`ConvConfig`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import resfuse
from resfuse.backends import first_contact
from resfuse.backends.triton.config import KINDS, PRECISIONS, ConvConfig, ConvProblem
from resfuse.types import Problem

logger = logging.getLogger("resfuse")

VERSION = 2
SHIPPED = Path(__file__).parent / "tables"
ENGINES = ("cuda", "triton", "sm90", "cudnn", "reference")
"""The backends that a table compares, in the order in which they are measured."""
FARTHEST = math.log(8)
"""A configuration counts up to here: the factors by which M, N and K of the GEMMs differ multiply to at most 8."""
FARTHEST_BATCH = 2
"""Times count for batches up to so many times as large or as small as the one that was measured."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TableError(ValueError):
    """A file that is not a table of this version."""


class Entry(NamedTuple):
    """The measurements of one problem."""

    microseconds: dict[str, float]
    """By backend."""
    left_out: dict[str, str]
    """Backend -> why it has no time."""
    config: ConvConfig | None
    """The fastest of the triton backend, None where it has no time."""


Entries = dict[ConvProblem, Entry]


class Table(NamedTuple):
    """The content of a file."""

    measured_with: dict[str, str | None]
    entries: Entries

    def outdated(self) -> str | None:
        """Why its times say nothing about this installation, or None."""
        others = [f"{name} {self.measured_with.get(name)}, not {now}" for name, now in versions().items()
                  if self.measured_with.get(name) != now]  # fmt: skip
        return f"measured with {' and '.join(others)}: run `resfuse tune` again" if others else None


@functools.cache
def versions() -> dict[str, str | None]:
    """What decides the times beside the GPU: these kernels, and those of PyTorch, with cuDNN, and Triton."""
    triton = [one.version for one in importlib.metadata.distributions(name="triton")]
    return {"resfuse": resfuse.__version__, "torch": str(torch.__version__), "triton": triton[0] if triton else None}


def user_folder() -> Path:
    """The folder of the user's tables: RESFUSE_TABLES, or resfuse/tables in the user's cache directory."""
    folder = os.environ.get("RESFUSE_TABLES")
    return Path(folder) if folder else first_contact.cache_folder() / "tables"


def file_name(device: str) -> str:
    """The name of a device's table: `nvidia-h200.json`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def canonical(problem: ConvProblem) -> ConvProblem:
    """The problem without a precision where that has no effect, as tables have it."""
    return problem if problem.dtype == torch.float32 else problem._replace(precision="ieee")


def conv_problem(problem: Problem) -> ConvProblem:
    """A `conv_bn_act_forward` as tables have it."""
    (n, c, h, w), weight_shape, convolution = problem.shape, problem.weight_shape, problem.convolution
    assert weight_shape is not None and convolution is not None
    k, _, r, s = weight_shape
    kind, precision = "train" if problem.training else "forward", "tf32" if problem.tf32 else "ieee"
    return ConvProblem(kind, problem.dtype, n, h, w, c, k, r, s, *convolution, precision, problem.residual)  # type: ignore[arg-type]


def lookup(problem: Problem) -> tuple[int, Entry] | None:
    """(batch, entry) of the layer measured at the nearest batch, on this kind of GPU and with these versions."""
    device = problem.device_name if problem.kernel == "conv_bn_act_forward" else None
    if device is None:
        return None
    wanted = conv_problem(problem)
    for table in _tables(device):
        batches = [
            other.n
            for other in table.entries
            if max(other.n, wanted.n) <= FARTHEST_BATCH * min(other.n, wanted.n)
            and other._replace(n=wanted.n) == wanted
        ]
        if batches and not table.outdated():
            batch = min(batches, key=lambda n: max(n, wanted.n) / min(n, wanted.n))
            return batch, table.entries[wanted._replace(n=batch)]
    return None


def configs(problem: ConvProblem, device: str) -> list[ConvConfig]:
    """The configurations measured for a problem, and for near ones of its family, the nearest first.

    A residual makes no difference, and the problem has none.  Any configuration is right in any version, and likely
    better than what a model predicts.
    """
    problem = canonical(problem)
    near = [
        (other._replace(residual=False) != problem, _distance(other, problem), entry.config)
        for table in _tables(device)
        for other, entry in table.entries.items()
        if entry.config is not None and _family(other) == _family(problem)
    ]
    return [config for _, far, config in sorted(near, key=lambda found: found[:2]) if far <= FARTHEST]


def forget() -> None:
    """Read the tables again when they are needed next."""
    _tables.cache_clear()


@functools.lru_cache
def _tables(device: str) -> tuple[Table, ...]:
    """The tables found for a device, as they were when the process first asked; a bad one costs a warning."""
    found = []
    for path in _paths(file_name(device)):
        try:
            table = read(path, device)
        except (TableError, OSError) as error:
            logger.warning("%s is not used: %s", path, error)
            continue
        if outdated := table.outdated():
            logger.warning("%s ranks no backends: %s", path, outdated)
        found.append(table)
    return tuple(found)


def _paths(pattern: str) -> Iterator[Path]:
    for folder in (user_folder(), SHIPPED):
        yield from sorted(folder.glob(pattern))


def listed() -> list[str]:
    """For people: every table on this machine, and what is in it or wrong with it."""
    found = []
    for path in _paths("*.json"):
        try:
            device = json.loads(path.read_text(encoding="utf-8"))["device"]
            table = read(path, device)
            used = table.outdated() or "backends are chosen by it"
            found.append(f"{device}, {len(table.entries)} problems: {used} ({path})")
        except (OSError, ValueError, LookupError, TypeError) as error:
            found.append(f"not used: {error} ({path})")
    return found


def read(path: Path, device: str) -> Table:
    """A device's table.

    Raises:
        TableError: not a table of this version and device; the message says what is wrong.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TableError(f"not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise TableError(f"not a table of version {VERSION}")
    if content.get("device") != device or not isinstance(content.get("entries"), list):
        raise TableError(f"a table for {content.get('device')}, not for {device}, or without entries")
    if not isinstance(measured_with := content.get("measured_with"), dict):
        raise TableError("it does not say what it was measured with")
    entries = {}
    for index, entry in enumerate(content["entries"]):
        try:
            entries[canonical(_problem(entry["problem"]))] = _entry(entry)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise TableError(f"entry {index}: {type(error).__name__}: {error}") from None
    return Table(measured_with, entries)


def write(path: Path, device: str, entries: Entries) -> None:
    """Write a table of these versions; whoever reads the file meanwhile finds the old or the new one, whole."""
    lines = ",\n".join(
        "  " + json.dumps({
            "problem": {**problem._asdict(), "dtype": str(problem.dtype).removeprefix("torch.")},
            **entry._asdict(),
            "config": entry.config and entry.config._asdict(),
        })
        for problem, entry in entries.items()
    )  # fmt: skip
    head = json.dumps({"version": VERSION, "device": device, "measured_with": versions()})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.write_text(f'{head[:-1]}, "entries": [\n{lines}\n]}}\n', encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _family(problem: ConvProblem) -> tuple[Any, ...]:
    """The fields that the nearest shape must have in common."""
    p = problem
    return p.kind, p.dtype, p.precision, p.r, p.s, p.stride, p.dilation, p.groups > 1


def _distance(one: ConvProblem, other: ConvProblem) -> float:
    return sum(abs(math.log(a / b)) for a, b in zip(one.gemm, other.gemm, strict=True))


def _entry(fields: dict[str, Any]) -> Entry:
    times = {name: float(time) for name, time in fields["microseconds"].items()}
    left_out = {name: str(reason) for name, reason in fields["left_out"].items()}
    if unknown := {*times, *left_out} - {*ENGINES}:
        raise ValueError(f"unknown backends: {', '.join(sorted(unknown))}")
    if not all(0 < time < math.inf for time in times.values()):
        raise ValueError(f"impossible times: {times}")
    config = fields["config"]  # plans pass over one that does not fit
    return Entry(times, left_out, None if config is None else ConvConfig(**config))


def _problem(fields: dict[str, Any]) -> ConvProblem:
    pairs = {name: (int(fields[name][0]), int(fields[name][1])) for name in ("stride", "padding", "dilation")}
    problem = ConvProblem(**{**fields, **pairs, "dtype": _DTYPES[fields["dtype"]]})
    sizes = (*problem[2:9], problem.groups)
    names = problem.kind in KINDS and problem.precision in PRECISIONS and type(problem.residual) is bool
    if not names or any(type(size) is not int for size in sizes):
        raise TypeError(f"not a convolution: {fields}")
    if min(*sizes, *problem.stride, *problem.dilation) < 1 or min(problem.gemm) < 1 or problem.c % problem.groups:
        raise ValueError(f"impossible sizes: {fields}")
    return problem
