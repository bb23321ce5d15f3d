"""All tasks on all sides: are the results correct, and how do the times compare?"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from benchmarks.compare import jobs, turns
from benchmarks.compare.statistics import SLOWER, Ratio, verdict
from benchmarks.compare.tasks import Task
from benchmarks.measure import Quantiles, quantiles

BASE, NOW, CONTROL = "base", "now", "base again"
WRONG = "wrong"


class Contender(turns.Side, Protocol):
    """A side that is told what to run."""

    def prepare(self, job: Path) -> dict[str, Tensor]:
        """Take over a job's file; what it computes for the first batch."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A task on both sides."""

    task: Task
    base: Quantiles
    """Seconds per call, of the rounds."""
    now: Quantiles
    ratio: Ratio
    """now / base"""
    control: Ratio | None
    """Of two processes of BASE, if there were two."""
    wrong: tuple[str, ...] = ()
    """What is wrong with the results, and of which side."""

    @property
    def verdict(self) -> str:
        return WRONG if self.wrong else verdict(self.ratio, self.control)

    def fails(self, over: float | None) -> bool:
        """Whether results are wrong, or it is slower, beyond the noise and by more than a part `over`."""
        return bool(self.wrong) or (over is not None and self.verdict == SLOWER and self.ratio.quantiles.p50 > 1 + over)


def compare(
    tasks: Iterable[Task], sides: Mapping[str, Contender], rounds: int, limit: float, threads: int,
    begin: Callable[[Task], None] = lambda task: None, advance: Callable[[], None] = lambda: None,
) -> Iterator[Comparison]:  # fmt: skip
    """One after the other.

    Args:
        tasks: what to run.
        sides: `BASE`, `NOW` and perhaps `CONTROL`.
        rounds: turns of every side, per task.
        limit: seconds of warm-up, per task and side.
        threads: of the CPU, for all but calls of which host time counts.
        begin, advance: called before each task, and after each turn.
    """
    with tempfile.TemporaryDirectory(prefix="resfuse-compare-job-") as folder:
        for task in tasks:
            begin(task)
            job, path = jobs.make_job(task), Path(folder, "job.pt")
            job.save(path, threads)
            results = {name: side.prepare(path) for name, side in sides.items()}
            wrong = tuple(f"{name}: {text}" for name, result in results.items() for text in job.objections(result))
            yield _comparison(task, turns.take_turns(sides, rounds, limit, advance), wrong)


def _comparison(task: Task, seconds: Mapping[str, list[float]], wrong: tuple[str, ...]) -> Comparison:
    base, now = seconds[BASE], seconds[NOW]
    control = Ratio.of(seconds[CONTROL], base) if CONTROL in seconds else None
    return Comparison(task, quantiles(base), quantiles(now), Ratio.of(now, base), control, wrong)
