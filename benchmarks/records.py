"""The one CSV schema of all benchmarks: a row per quantity measured.  README.md explains the columns."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import importlib.metadata
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

import resfuse
from benchmarks.measure import Quantiles, quantiles
from resfuse.cli.info import processor_name

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What a result depends on besides the code that ran."""

    device: str
    threads: int
    versions: str
    commit: str
    date: str


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

    @property
    def quantiles(self) -> Quantiles:
        return Quantiles(self.p20, self.p50, self.p80)

    @property
    def case(self) -> tuple[str, ...]:
        """What the providers of one comparison have in common."""
        conditions = self.conditions
        return self.level, self.name, self.mode, self.shape, self.dtype, conditions.device, str(conditions.threads)


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

    def record(self, metric: str, values: Sequence[float], unit: str, conditions: Conditions) -> Record:
        """The row for the values that one quantity had."""
        spread = quantiles(values)
        return Record(
            **dataclasses.asdict(self), metric=metric, **spread._asdict(), samples=len(values), unit=unit,
            conditions=conditions,
        )  # fmt: skip


COLUMNS = (
    *(field.name for field in dataclasses.fields(Record) if field.name != "conditions"),
    *(field.name for field in dataclasses.fields(Conditions)),
)


def current_conditions(device: torch.device, threads: int, packages: Iterable[str] = ()) -> Conditions:
    """Those of this machine, now; `packages` are distributions that count besides torch and resfuse."""
    backends = ", ".join(resfuse.available_backends())
    versions = {"torch": torch.__version__, "resfuse": f"{resfuse.__version__} ({backends})"}
    versions |= {name: importlib.metadata.version(name) for name in packages if name not in versions}
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
    kept = [record for record in read(path) if record.case not in replaced]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(_cells(record) for record in [*kept, *records])


def _cells(record: Record) -> list[str]:
    values = {name: getattr(record, name) for name in COLUMNS if hasattr(record, name)}
    values |= dataclasses.asdict(record.conditions)
    return [f"{values[name]:.6g}" if isinstance(values[name], float) else str(values[name]) for name in COLUMNS]


def _parse(row: dict[str, str]) -> Record:
    conditions = {field.name: row.pop(field.name) for field in dataclasses.fields(Conditions)}
    numbers = {name: float(row.pop(name)) for name in Quantiles._fields}
    return Record(
        **row | numbers | {"samples": int(row["samples"])},  # type: ignore[arg-type]
        conditions=Conditions(**conditions | {"threads": int(conditions["threads"])}),  # type: ignore[arg-type]
    )


def _commit() -> str:
    """Of the repository, with a plus where files differ from it; empty outside of one."""
    git = ("git", "-C", str(ROOT))
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", ".", ":!benchmarks/results"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit.stdout.strip() + ("+" if changed.stdout else "")
