"""Tables of measured configurations: one JSON file per device name, the user's own before those of the package.

    {"version": 1, "device": "NVIDIA H200", "triton": "3.6.0",
     "entries": [{"problem": {"kind": "forward", "dtype": "bfloat16", "n": 32, ...},
                  "config": {"block_m": 128, "block_n": 64, ...}, "microseconds": 12.3}, ...]}

Problem and config hold the fields of `ConvProblem` and `ConvConfig`.  `python -m resfuse tune` writes such a file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from resfuse.backends.triton.devices import DeviceProperties
from resfuse.backends.triton.heuristics import every_config
from resfuse.backends.triton.problems import DTYPES, KINDS, PRECISIONS, ConvConfig, ConvProblem

logger = logging.getLogger("resfuse")

VERSION = 1
SHIPPED = Path(__file__).parent / "tables"
FARTHEST = math.log(8)
"""The nearest shape counts up to here: the factors by which M, N and K of the GEMMs differ multiply to at most 8."""

_PAIRS = ("stride", "padding", "dilation")
_POSITIVE = ("n", "h", "w", "c", "k", "r", "s", "groups")


class TableError(ValueError):
    """A file that is not a table of this version."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """The configuration that was fastest, and its time."""

    config: ConvConfig
    microseconds: float


@dataclasses.dataclass
class Table:
    """What was measured on one kind of device."""

    device: str
    triton: str
    entries: dict[ConvProblem, Entry] = dataclasses.field(default_factory=dict)


def user_folder() -> Path:
    """Where the user's tables are: RESFUSE_TRITON_TABLES, or resfuse/triton in the user's cache directory."""
    if folder := os.environ.get("RESFUSE_TRITON_TABLES"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resfuse" / "triton"


def file_name(device: str) -> str:
    """The name of a device's table: `nvidia-h200.json`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def lookup(problem: ConvProblem, device: DeviceProperties) -> ConvConfig | None:
    """The configuration measured for this problem, or for the nearest one of its family; None if there is none."""
    tables = _tables(device.name)
    if not tables:
        return None
    allowed = set(every_config(problem, device))
    for table in tables:
        if (entry := table.get(canonical(problem))) is not None and entry.config in allowed:
            return entry.config
    nearest, config = FARTHEST, None
    for table in tables:
        for candidate, entry in table.items():
            if _family(candidate) == _family(problem) and entry.config in allowed:
                distance = _distance(candidate, problem)
                if distance < nearest or (config is None and distance <= nearest):
                    nearest, config = distance, entry.config
    return config


def forget() -> None:
    """Read the tables again when they are needed next."""
    _tables.cache_clear()


def read(path: Path) -> Table:
    """The table in a file.

    Raises:
        TableError: it is not JSON, or not a table, or one of another version; the message says which entry is wrong.
        OSError: it can not be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TableError(f"not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise TableError(f"not a table of version {VERSION}")
    if not isinstance(content.get("device"), str) or not isinstance(content.get("entries"), list):
        raise TableError("device or entries are missing")
    table = Table(content["device"], str(content.get("triton")))
    for index, entry in enumerate(content["entries"]):
        try:
            microseconds = float(entry["microseconds"])
            table.entries[_problem(entry["problem"])] = Entry(_config(entry["config"]), microseconds)
        except (KeyError, TypeError, ValueError) as error:
            raise TableError(f"entry {index}: {type(error).__name__}: {error}") from None
    return table


def write(path: Path, table: Table) -> None:
    """Write a table so that whoever reads the file meanwhile finds the old or the new one, whole."""
    entries = [
        {
            "problem": {**dataclasses.asdict(problem), "dtype": str(problem.dtype).removeprefix("torch.")},
            "config": dataclasses.asdict(entry.config),
            "microseconds": entry.microseconds,
        }
        for problem, entry in table.entries.items()
    ]
    lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
    head = json.dumps({"version": VERSION, "device": table.device, "triton": table.triton})
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f'{head[:-1]}, "entries": [\n{lines}\n]}}\n')
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@functools.lru_cache
def _tables(device: str) -> tuple[dict[ConvProblem, Entry], ...]:
    """The tables there are for a device.  A bad one costs a warning, never a training step."""
    found = []
    for path in (user_folder() / file_name(device), SHIPPED / file_name(device)):
        try:
            table = read(path)
        except FileNotFoundError:
            continue
        except (TableError, OSError) as error:
            logger.warning("%s is not used: %s", path, error)
            continue
        if table.device != device:
            logger.warning("%s is not used: it is of %s, not of %s", path, table.device, device)
            continue
        found.append({canonical(problem): entry for problem, entry in table.entries.items()})
    return tuple(found)


def canonical(problem: ConvProblem) -> ConvProblem:
    """The problem as tables have it: without a precision where that has no effect."""
    return problem if problem.dtype == torch.float32 else dataclasses.replace(problem, precision="ieee")


def _family(problem: ConvProblem) -> tuple[Any, ...]:
    """What the nearest shape must have in common."""
    precision = problem.precision if problem.dtype == torch.float32 else None
    kernel = (problem.r, problem.s, problem.stride, problem.dilation, problem.groups > 1)
    return (problem.kind, problem.dtype, precision, *kernel)


def _distance(one: ConvProblem, other: ConvProblem) -> float:
    pairs = ((one.gemm_m, other.gemm_m), (one.gemm_n, other.gemm_n), (one.gemm_k, other.gemm_k))
    return sum(abs(math.log(a / b)) for a, b in pairs)


def _problem(fields: dict[str, Any]) -> ConvProblem:
    values = dict(fields)
    values["dtype"] = _one_of(getattr(torch, _text(values["dtype"]), None), DTYPES)
    _one_of(values["kind"], KINDS)
    _one_of(values["precision"], PRECISIONS)
    for name in _PAIRS:
        first, second = values[name]
        values[name] = (_integer(first, name), _integer(second, name))
    for name in _POSITIVE:
        if _integer(values[name], name) < 1:
            raise ValueError(f"{name} is {values[name]}")
    problem = ConvProblem(**values)
    if min(*problem.stride, *problem.dilation) < 1 or min(problem.padding) < 0:
        raise ValueError("stride, dilation or padding is too small")
    if min(problem.oh, problem.ow) < 1 or problem.c % problem.groups or problem.k % problem.groups:
        raise ValueError("no such convolution")
    return problem


def _config(fields: dict[str, Any]) -> ConvConfig:
    config = ConvConfig(**fields)
    for name, value in fields.items():
        if type(value) is not (bool if name == "persistent" else int) or int(value) < (name != "persistent"):
            raise ValueError(f"{name} is {value!r}")
    return config


def _one_of(value: Any, allowed: Iterable[Any]) -> Any:
    if value not in allowed:
        raise ValueError(f"{value!r} is none of {', '.join(map(str, allowed))}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


def _integer(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}")
    return value
