"""What the processes that shared the suite found, in one file and in a few lines."""

from __future__ import annotations

import collections
import dataclasses
import json
from pathlib import Path
from typing import Any

from tests import sharing

FAILED = ("failed", "error")
MERGED = "suite.json"
MOST_FAILURES, MOST_REASONS, MOST_SLOW = 15, 6, 3


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcomes of a suite."""

    counts: dict[str, int]
    failures: list[dict[str, Any]]
    """Test, reason and report of each that did not pass."""
    skipped: list[tuple[str, int]]
    """Reasons, most frequent first."""
    slowest: list[tuple[str, float]]
    """Test and seconds."""
    left: int
    """Tests that have no outcome yet, of those that the last run was about."""

    @property
    def run(self) -> int:
        return sum(self.counts.values())


def merge(share: Path) -> Report:
    """The outcomes that lie in a folder; they are also written to `suite.json` there."""
    found = sharing.outcomes(share)
    collected = share / sharing.COLLECTED
    names = json.loads(collected.read_text()) if collected.exists() else []
    every = [*found.values()]
    reasons = collections.Counter(one["reason"] for one in every if one["outcome"] == "skipped")
    slowest = sorted(every, key=lambda one: one["seconds"], reverse=True)[:20]
    report = Report(
        counts=dict(collections.Counter(one["outcome"] for one in every)),
        failures=sorted((one for one in every if one["outcome"] in FAILED), key=lambda one: one["test"]),
        skipped=reasons.most_common(),
        slowest=[(one["test"], one["seconds"]) for one in slowest],
        left=sum(name not in found for name in names),
    )
    (share / MERGED).write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")
    return report


def lines(report: Report) -> list[str]:
    """For a terminal: counts, failures, why tests were skipped, the slowest."""
    counts = ", ".join(f"{count} {name}" for name, count in sorted(report.counts.items())) or "no test was run"
    found = [f"{counts}{f', {report.left} left' if report.left else ''}"]
    for failure in report.failures[:MOST_FAILURES]:
        found.append(f"  FAILED {failure['test']}: {failure['reason']}"[:220])
    if len(report.failures) > MOST_FAILURES:
        found.append(f"  ... and {len(report.failures) - MOST_FAILURES} more, in {MERGED}")
    found += [f"  skipped {count}: {reason}"[:160] for reason, count in report.skipped[:MOST_REASONS]]
    slow = ", ".join(f"{test.rpartition('/')[2]} {seconds:.0f} s" for test, seconds in report.slowest[:MOST_SLOW])
    return [*found, f"  slowest: {slow}"] if slow else found
