"""The table: one row per quantity, how it is read and written, and what differs between two of them."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.options import RESULTS

TABLE = Path(__file__).resolve().parent.parent.parent / RESULTS / "static.csv"
COMMAND = "python -m benchmarks.static --write"


@dataclasses.dataclass(frozen=True)
class Row:
    """A quantity of which less is better."""

    group: str
    """What is counted, and where: "launches cpu"."""
    level: str
    """op, block, model or kernel."""
    name: str
    mode: str
    """inference, train, or frozen: gradients with running statistics; "" for kernels."""
    phase: str
    """forward, backward, or both added up: step; "" for kernels."""
    provider: str
    """As in the other tables: resfuse, eager_channels_last."""
    value: int
    detail: str
    """What the value is made of, for whoever reads the difference; part of what is compared."""
    toolchain: str
    """What else the value depends on: "torch 2.11", or "" for nothing.  With another one it is not compared."""

    @property
    def key(self) -> tuple[str, ...]:
        return self.group, self.level, self.name, self.mode, self.phase, self.provider

    def __str__(self) -> str:
        return ", ".join(part for part in self.key if part)


@dataclasses.dataclass(frozen=True)
class Difference:
    """A row that is not what the table says; None where one side has no such row."""

    before: Row | None
    now: Row | None

    @property
    def kind(self) -> str:
        """worse, better, changed (the value is the same, but made of something else), new or gone."""
        if self.before is None:
            return "new"
        if self.now is None:
            return "gone"
        if self.now.value == self.before.value:
            return "changed"
        return "worse" if self.now.value > self.before.value else "better"

    def __str__(self) -> str:
        row = self.now or self.before
        sides = [f"{when} {_shown(side)}" for when, side in (("before", self.before), ("now", self.now))]
        return f"{self.kind}: {row}: {', '.join(sides)}"


def read(path: Path = TABLE) -> list[Row]:
    """All rows of a table; none where there is no file.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}, got {reader.fieldnames}")
        return [Row(**line | {"value": int(line["value"])}) for line in reader]  # type: ignore[arg-type]


def write(rows: Iterable[Row], path: Path = TABLE) -> None:
    """Replace the file."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(dataclasses.astuple(row) for row in rows)


def differences(table: Sequence[Row], found: Sequence[Row]) -> list[Difference]:
    """In the order of `found`, then what it does not have.

    Raises:
        ValueError: two rows have the same key.
    """
    before, now = _by_key(table), _by_key(found)
    keys = [*now, *(key for key in before if key not in now)]
    pairs = ((before.get(key), now.get(key)) for key in keys)
    return [Difference(*pair) for pair in pairs if _content(pair[0]) != _content(pair[1])]


def _by_key(rows: Sequence[Row]) -> dict[tuple[str, ...], Row]:
    found = {row.key: row for row in rows}
    if len(found) < len(rows):
        twice = next(row for row in rows if found[row.key] is not row)
        raise ValueError(f"two rows are {twice}")
    return found


def _content(row: Row | None) -> tuple[int, str] | None:
    return None if row is None else (row.value, row.detail)


def _shown(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{row.value} ({row.detail})" if row.detail else str(row.value)


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))
