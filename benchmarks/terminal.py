"""What a run prints: by rich where that is installed, in plain lines where it is not (a bare GPU machine)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from benchmarks.records import Conditions, Record

COLORS = {"note": "yellow", "failure": "red", "detail": "dim"}


class Terminal:
    """Lines, tables and progress."""

    def __init__(self) -> None:
        self._console: Any = None
        if importlib.util.find_spec("rich") is not None:
            from rich.console import Console

            self._console = Console(highlight=False)

    def say(self, text: str, kind: str = "") -> None:
        """A line: plain, a "note", a "failure" or a "detail"."""
        if self._console is None:
            print(text, flush=True)
        else:
            self._console.print(text, style=COLORS.get(kind), markup=False, soft_wrap=True)

    def conditions(self, conditions: Conditions) -> None:
        """What the results depend on, before they come."""
        self.say(f"{conditions.device}, {conditions.threads} threads, commit {conditions.commit or 'unknown'}")
        self.say(conditions.versions)

    def results(self, rows: Sequence[Record]) -> None:
        """The tables of one case, and a word where its times scatter too much."""
        if self._console is None:
            for row in rows:
                if row.metric in ("time", "graph_time"):
                    self.say(plain_line(row))
            return
        from benchmarks import report

        for table in report.case_tables(rows):
            report.show_table(self._console, table)
        report.warn_if_restless(self._console, [row for row in rows if row.metric in ("time", "graph_time")])

    def pairs(self, title: str, rows: Sequence[Record], unit: str, scale: float) -> None:
        """A table of two providers, resfuse the second, and a word where they scatter too much."""
        if self._console is None:
            self.say(title)
            for row in rows:
                self.say(f"{row.name}, {row.mode}: {row.provider} {row.p50 * scale:.3g} {unit}")
            return
        from benchmarks import report

        report.show_table(self._console, report.pair_table(title, rows, unit, scale))
        report.warn_if_restless(self._console, rows)

    def progress(self) -> Progress:
        """A context whose `begin` and `advance` show how far a case is."""
        return Progress(self._console)


class Progress:
    """Progress bars of one case, which vanish when it is done; nothing without rich."""

    def __init__(self, console: Any) -> None:
        self._bars: Any = None
        if console is not None:
            from rich import progress

            columns = (
                progress.TextColumn("{task.description}"), progress.BarColumn(20), progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
            )  # fmt: skip
            self._bars = progress.Progress(*columns, console=console, transient=True)
        self._task: Any = None

    def begin(self, what: str, total: int) -> None:
        """The next thing to do, in so many steps."""
        if self._bars is not None:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._task = self._bars.add_task(what, total=total)

    def advance(self) -> None:
        """One of them is done."""
        if self._bars is not None:
            self._bars.advance(self._task)

    def __enter__(self) -> Progress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()


def plain_line(row: Record) -> str:
    """A time without a table."""
    scatter = (row.p80 - row.p20) / row.p50 if row.p50 else 0.0
    roofline = "" if row.roofline is None else f", {row.roofline:.0%} of roofline"
    return (
        f"{row.name}, {row.mode}, {row.shape}, {row.dtype}: {row.provider} {row.metric} {row.p50 * 1e3:.4g} ms "
        f"(spread {scatter:.0%}{roofline})"
    )
