"""What a machine reached in the run whose rows are looked at."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from benchmarks.records import CEILINGS, Conditions, Record


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What a machine reached in a run: no operation can be faster than these let it."""

    bandwidth: float
    """B/s of a large copy, bytes read and written; 0 where it was not measured."""
    rates: Mapping[str, float]
    """FLOP/s of a large matrix product, by dtype."""

    def attainable(self, intensity: float, dtype: str) -> float:
        """FLOP/s at so many FLOPs per byte."""
        return min(self.rates[dtype], self.bandwidth * intensity)


def ceilings(rows: Iterable[Record], conditions: Conditions) -> Ceilings:
    """Those of one run: the same machine, the same beginning."""
    mine = [row for row in rows if row.level == CEILINGS and _run(row.conditions) == _run(conditions)]
    return Ceilings(
        bandwidth=next((row.p50 for row in mine if row.unit == "B/s"), 0.0),
        rates={row.dtype: row.p50 for row in mine if row.unit == "FLOP/s"},
    )


def _run(conditions: Conditions) -> tuple[object, ...]:
    return conditions.device, conditions.threads, conditions.date
