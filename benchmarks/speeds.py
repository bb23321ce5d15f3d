"""What measured rows say about each other: comparisons, ratios, the best peer and geometric means.

Nothing here prints or draws: `report` (terminal), `markdown` and `plots` do, from what this finds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks import records
from benchmarks.providers import BASELINE, BASELINE_CHANNELS_LAST
from benchmarks.records import CEILINGS, Conditions, Record

TIME, GRAPH_TIME, LEFT_OUT = "time", "graph_time", "left_out"
"""Metrics: seconds per call; the same by replaying a CUDA graph; 1 for a provider that failed or was wrong."""
OURS = "resfuse"
"""The provider whose speed is in question: the automatic choice of backends."""
BASELINES = (BASELINE_CHANNELS_LAST, BASELINE)
"""What a ratio refers to, the first of them that took part."""
GPUS = ("NVIDIA", "Tesla", "AMD Instinct")
"""How the names of GPUs begin."""
LEVELS = ("model", "block", "layer", "op")
"""In the order of their weight to a user."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What the providers of one case did in one run, in turns: quantities that can be held against each other."""

    first: Record
    """Any row of it: level, name, mode, shape, dtype and conditions are the same in all."""
    rows: Mapping[str, Mapping[str, Record]]
    """By provider and metric."""
    graphed: bool = False
    """Whether times are those of replayed CUDA graphs; a provider that was not captured has the time of its calls,
    because it captures graphs itself or has nothing to gain from them."""

    @property
    def batch(self) -> int:
        """Images of the input."""
        return int(self.first.shape.partition("x")[0])

    @property
    def image(self) -> str:
        """Shape of one image: 3x224x224."""
        return self.first.shape.partition("x")[2]

    @property
    def times(self) -> dict[str, Record]:
        """The times per call, by provider."""
        names = (GRAPH_TIME, TIME) if self.graphed else (TIME,)
        first = {
            provider: next((found[name] for name in names if name in found), None)
            for provider, found in self.rows.items()
        }
        return {provider: row for provider, row in first.items() if row}

    @property
    def peers(self) -> list[str]:
        """Providers with a time that are not resfuse in some form."""
        return [provider for provider in self.times if not is_ours(provider)]

    @property
    def best_peer(self) -> str | None:
        """The fastest of the peers, eager PyTorch among them."""
        return min(self.peers, key=lambda provider: self.times[provider].p50, default=None)

    @property
    def base(self) -> str | None:
        """What ratios against eager refer to."""
        return next((provider for provider in BASELINES if provider in self.times), None)

    @property
    def timed(self) -> bool:
        """Whether there are times, of calls or of graphs."""
        return any(TIME in found or GRAPH_TIME in found for found in self.rows.values())

    @property
    def views(self) -> list[Comparison]:
        """This by calls, and by graphs where any were captured; by graphs alone where calls were not timed beside."""
        captured = [found for found in self.rows.values() if GRAPH_TIME in found]
        if not captured:
            return [self]
        by_graphs = dataclasses.replace(self, graphed=True)
        return [self, by_graphs] if any(TIME in found for found in captured) else [by_graphs]

    def median(self, provider: str, metric: str = TIME) -> float | None:
        """p50 of a quantity, by default of the time; None where it was not measured."""
        found = self.times.get(provider) if metric == TIME else self.rows.get(provider, {}).get(metric)
        return found.p50 if found else None

    def speed(self, provider: str, against: str | None) -> float | None:
        """How many times as fast a provider is as another; None where one of them has no time."""
        mine = self.median(provider)
        other = self.median(against) if against else None
        return other / mine if mine and other else None

    def against_best_peer(self) -> float | None:
        """The speed of resfuse relative to that of its fastest peer."""
        return self.speed(OURS, self.best_peer)


def on_gpu(conditions: Conditions) -> bool:
    """Whether the device that rows are of is a GPU; told by its name."""
    return conditions.device.startswith(GPUS)


def is_ours(provider: str) -> bool:
    """Whether that is resfuse, in whatever layout, by whatever backend or behind a compiler."""
    return provider == OURS or provider.startswith(f"{OURS}_")


def read_all(paths: Iterable[Path]) -> list[Record]:
    """The rows of several files, one after another.

    Raises:
        ValueError: a file has not the columns of `benchmarks.records`.
    """
    rows: list[Record] = []
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is not a file")
        try:
            rows += records.read(path)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} has not the columns of a benchmark ({error})") from error
    return rows


def result_files(folder: Path) -> list[Path]:
    """The benchmarks' CSV files in a folder; others, such as lists of kernels' registers, are passed over."""
    return [path for path in sorted(folder.glob("*.csv")) if is_result(path)]


def is_result(path: Path) -> bool:
    """Whether a file has the columns of the benchmarks."""
    with path.open(newline="") as file:
        header = file.readline().strip().split(",")
    return {"level", "provider", "metric", "p50", "device"} <= set(header)


def comparisons(rows: Sequence[Record]) -> list[Comparison]:
    """One for each case, of its latest run; rows of ceilings belong to none.

    Runs that took times and runs that took something else, such as memory, do not replace each other.
    """
    latest: dict[tuple[object, ...], Comparison] = {}
    for one in runs(rows):
        key = (*one.first.case, one.timed)
        if key not in latest or latest[key].first.conditions.date <= one.first.conditions.date:
            latest[key] = one
    return list(latest.values())


def runs(rows: Sequence[Record]) -> list[Comparison]:
    """One for each run of each case, in their order."""
    grouped: dict[tuple[object, ...], dict[str, dict[str, Record]]] = {}
    for row in rows:
        if row.level != CEILINGS:
            key = (row.level, row.name, row.mode, row.shape, row.dtype, row.conditions)
            grouped.setdefault(key, {}).setdefault(row.provider, {})[row.metric] = row
    return [Comparison(next(iter(next(iter(found.values())).values())), found) for found in grouped.values()]


def views(found: Iterable[Comparison]) -> list[Comparison]:
    """All by calls, each followed by itself by graphs where there are any."""
    return [view for one in found for view in one.views]


def select(found: Iterable[Comparison], **wanted: str) -> list[Comparison]:
    """Those whose rows have these values: `select(found, level="model", dtype="bfloat16")`."""
    return [one for one in found if all(getattr(one.first, name) == value for name, value in wanted.items())]


def geometric_mean(ratios: Iterable[float | None]) -> float | None:
    """Of the ratios that are known; None where none is."""
    known = [ratio for ratio in ratios if ratio]
    return math.exp(math.fsum(map(math.log, known)) / len(known)) if known else None


def by_level(found: Iterable[Comparison]) -> list[Comparison]:
    """Models first, operators last; otherwise in the order in which they came."""
    return sorted(found, key=lambda one: LEVELS.index(one.first.level) if one.first.level in LEVELS else len(LEVELS))
