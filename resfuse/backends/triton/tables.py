"""Tables of measured configurations: one JSON file per device name, the user's own before those of the package.

    {"version": 1, "device": "NVIDIA H200", "triton": "3.6.0",
     "entries": [{"problem": {"kind": "forward", "dtype": "bfloat16", "n": 32, ...},
                  "config": {"block_m": 128, "block_n": 64, ...}, "microseconds": 12.3}, ...]}

Problem and config hold the fields of `ConvProblem` and `ConvConfig`.  `python -m resfuse tune` writes such a file.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from resfuse.backends.triton.config import KINDS, PRECISIONS, ConvConfig, ConvProblem, DeviceProperties, every_config

logger = logging.getLogger("resfuse")

VERSION = 1
SHIPPED = Path(__file__).parent / "tables"
FARTHEST = math.log(8)
"""The nearest shape counts up to here: the factors by which M, N and K of the GEMMs differ multiply to at most 8."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TableError(ValueError):
    """A file that is not a table of this version."""


class Entry(NamedTuple):
    """The fastest configuration and its time."""

    config: ConvConfig
    microseconds: float


Entries = dict[ConvProblem, Entry]


def user_folder() -> Path:
    """The folder of the user's tables: RESFUSE_TRITON_TABLES, or resfuse/triton in the user's cache directory."""
    if folder := os.environ.get("RESFUSE_TRITON_TABLES"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resfuse" / "triton"


def file_name(device: str) -> str:
    """The name of a device's table: `nvidia-h200.json`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def canonical(problem: ConvProblem) -> ConvProblem:
    """The problem without a precision where that has no effect, as tables have it."""
    return problem if problem.dtype == torch.float32 else problem._replace(precision="ieee")


def lookup(problem: ConvProblem, device: DeviceProperties) -> ConvConfig | None:
    """The configuration measured for this problem, or for the nearest one of its family, or None."""
    tables = _tables(device.name)
    if not tables:
        return None
    problem, allowed = canonical(problem), set(every_config(problem, device))
    for table in tables:
        if (entry := table.get(problem)) is not None and entry.config in allowed:
            return entry.config
    near = [
        (sum(abs(math.log(a / b)) for a, b in zip(other.gemm, problem.gemm, strict=True)), entry.config)
        for table in tables
        for other, entry in table.items()
        if _family(other) == _family(problem) and entry.config in allowed
    ]
    distance, config = min(near, key=lambda item: item[0], default=(math.inf, None))
    return config if distance <= FARTHEST else None


def forget() -> None:
    """Read the tables again when they are needed next."""
    _tables.cache_clear()


@functools.lru_cache
def _tables(device: str) -> tuple[Entries, ...]:
    """The tables found for a device.  A bad one costs a warning, never a training step."""
    found = []
    for path in (user_folder() / file_name(device), SHIPPED / file_name(device)):
        try:
            found.append(read(path, device))
        except FileNotFoundError:
            continue
        except (TableError, OSError) as error:
            logger.warning("%s is not used: %s", path, error)
    return tuple(found)


def read(path: Path, device: str) -> Entries:
    """The entries of a device's table.

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
    entries = {}
    for index, entry in enumerate(content["entries"]):
        try:
            config = ConvConfig(**entry["config"])  # `lookup` passes over one that does not fit
            entries[canonical(_problem(entry["problem"]))] = Entry(config, float(entry["microseconds"]))
        except (LookupError, TypeError, ValueError) as error:
            raise TableError(f"entry {index}: {type(error).__name__}: {error}") from None
    return entries


def write(path: Path, device: str, entries: Entries) -> None:
    """Write a table; whoever reads the file meanwhile finds the old or the new one, whole."""
    lines = ",\n".join(
        "  " + json.dumps({
            "problem": {**problem._asdict(), "dtype": str(problem.dtype).removeprefix("torch.")},
            "config": entry.config._asdict(),
            "microseconds": entry.microseconds,
        })
        for problem, entry in entries.items()
    )  # fmt: skip
    head = json.dumps({"version": VERSION, "device": device, "triton": importlib.metadata.version("triton")})
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


def _problem(fields: dict[str, Any]) -> ConvProblem:
    pairs = {name: (int(fields[name][0]), int(fields[name][1])) for name in ("stride", "padding", "dilation")}
    problem = ConvProblem(**{**fields, **pairs, "dtype": _DTYPES[fields["dtype"]]})
    sizes = (*problem[2:9], problem.groups)
    if problem.kind not in KINDS or problem.precision not in PRECISIONS or any(type(size) is not int for size in sizes):
        raise TypeError(f"not a convolution: {fields}")
    if min(*sizes, *problem.stride, *problem.dilation) < 1 or min(problem.gemm) < 1 or problem.c % problem.groups:
        raise ValueError(f"impossible sizes: {fields}")
    return problem
