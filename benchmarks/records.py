"""The one CSV schema of all benchmarks: a row per quantity measured.  README.md explains the columns."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import datetime
import importlib.metadata
import os
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import resfuse
from benchmarks.measure import Quantiles, quantiles
from resfuse.processor import processor_name

ROOT = Path(__file__).resolve().parent.parent
CEILINGS = "device"
"""The level of the rows that hold what the machine reached in a run."""


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What a result depends on besides the code that ran."""

    device: str
    threads: int
    versions: str
    commit: str
    date: str


class Roofline(NamedTuple):
    """What a case costs on paper: the fused plan, the same for all providers, so that their fractions compare."""

    bytes: int
    flops: int
    seconds: float
    """At the ceilings of the machine; 0 where they are not known."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One row.  Ratios are not stored: they follow from rows of the same case and run."""

    level: str
    name: str
    provider: str
    mode: str
    shape: str
    dtype: str
    layout: str
    metric: str
    p20: float
    p50: float
    p80: float
    samples: int
    unit: str
    conditions: Conditions
    bytes: int | None = None
    """Of device memory that the case moves, read and written, where every operation that fits is fused."""
    flops: int | None = None
    """Of the case; of a training step backward too."""
    roofline: float | None = None
    """Of a time: the time that these bytes and FLOPs take at the ceilings of the same run, divided by the median."""

    @property
    def quantiles(self) -> Quantiles:
        return Quantiles(self.p20, self.p50, self.p80)

    @property
    def case(self) -> tuple[str, ...]:
        """What the providers of one comparison have in common."""
        conditions = self.conditions
        key = (self.level, self.name, self.mode, self.shape, self.dtype, conditions.device, str(conditions.threads))
        # Ceilings belong to the run that they were measured in, whose other rows may be kept while newer ones come.
        return (*key, conditions.date) if self.level == CEILINGS else key


@dataclasses.dataclass(frozen=True)
class Subject:
    """What the quantities of one measurement belong to: the first columns of its rows."""

    level: str
    name: str
    provider: str
    mode: str
    shape: str
    dtype: str
    layout: str

    def record(
        self, metric: str, values: Sequence[float], unit: str, conditions: Conditions, cost: Roofline | None = None
    ) -> Record:
        """The row for the values that one quantity had; `cost` is what the case costs on paper."""
        spread = quantiles(values)
        roofline = cost.seconds / spread.p50 if cost and cost.seconds and unit == "s" and spread.p50 > 0 else None
        return Record(
            **dataclasses.asdict(self), metric=metric, **spread._asdict(), samples=len(values), unit=unit,
            conditions=conditions, bytes=cost.bytes if cost else None, flops=cost.flops if cost else None,
            roofline=roofline,
        )  # fmt: skip


ADDED = ("bytes", "flops", "roofline")
"""Columns that may be empty, and that older files do not have."""
COLUMNS = (
    *(field.name for field in dataclasses.fields(Record) if field.name not in ("conditions", *ADDED)),
    *ADDED,
    *(field.name for field in dataclasses.fields(Conditions)),
)


def current_conditions(device: torch.device, threads: int, packages: Iterable[str] = ()) -> Conditions:
    """Those of this machine, now; `packages` are distributions that count besides torch and resfuse, if installed."""
    backends = ", ".join(resfuse.available_backends())
    versions = {"torch": torch.__version__, "resfuse": f"{resfuse.__version__} ({backends})"}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.setdefault(name, importlib.metadata.version(name))
    return Conditions(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        threads=threads,
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        commit=_commit(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def shape_text(shape: Sequence[int]) -> str:
    """16x3x224x224."""
    return "x".join(map(str, shape))


def dtype_text(dtype: torch.dtype) -> str:
    """float32."""
    return str(dtype).removeprefix("torch.")


def read(path: Path) -> list[Record]:
    """All rows of a file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [_parse(row) for row in csv.DictReader(file)]


def update(path: Path, records: Sequence[Record]) -> None:
    """Write rows into a file, in place of those that it has of the same cases.

    A case's rows therefore always come from one run, in which its providers took turns.
    """
    replaced = {record.case for record in records}
    rows = [*(record for record in read(path) if record.case not in replaced), *records]
    used = {record.conditions.date for record in rows if record.level != CEILINGS}
    rows = [record for record in rows if record.level != CEILINGS or record.conditions.date in used]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and then put in place: a run that is stopped meanwhile leaves the file as it was.
    with tempfile.NamedTemporaryFile("w", newline="", dir=path.parent, suffix=".tmp", delete=False) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(_cells(record) for record in rows)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def _cells(record: Record) -> list[str]:
    values = {name: getattr(record, name) for name in COLUMNS if hasattr(record, name)}
    values |= dataclasses.asdict(record.conditions)
    return [_cell(values[name]) for name in COLUMNS]


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():  # bytes and counts lose no digits, however often they are read
        return str(int(value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _parse(row: dict[str, str]) -> Record:
    conditions = {field.name: row.pop(field.name) for field in dataclasses.fields(Conditions)}
    numbers = {name: float(row.pop(name)) for name in Quantiles._fields}
    added = {name: row.pop(name, None) or None for name in ADDED}
    return Record(
        **row | numbers | {"samples": int(row["samples"])},  # type: ignore[arg-type]
        bytes=None if added["bytes"] is None else int(float(added["bytes"])),
        flops=None if added["flops"] is None else int(float(added["flops"])),
        roofline=None if added["roofline"] is None else float(added["roofline"]),
        conditions=Conditions(**conditions | {"threads": int(conditions["threads"])}),  # type: ignore[arg-type]
    )


def _commit() -> str:
    """Of the repository, with a plus where files differ from it; empty outside of one.

    A copy of the files without a repository, on a GPU machine, is told by BENCH_COMMIT.
    """
    if "BENCH_COMMIT" in os.environ:
        return os.environ["BENCH_COMMIT"]
    git = ("git", "-C", str(ROOT))
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", ".", ":!benchmarks/results"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BENCH_COMMIT", "")
    return commit.stdout.strip() + ("+" if changed.stdout else "")
