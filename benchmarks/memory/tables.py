"""The memory tables: as rows of text, for a terminal or for a page."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.memory import plans
from benchmarks.memory.account import EAGER, Account
from benchmarks.memory.networks import Network
from benchmarks.memory.plans import Kept

MEGA = 1e6


class Table(NamedTuple):
    """A title, and rows of as many cells as there are columns; all but the first column are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """As a Markdown table, without the title."""
        head = (self.columns, ("---", *("--:" for _ in self.columns[1:])))
        return "\n".join("| " + " | ".join(row) + " |" for row in (*head, *self.rows))

    def show(self) -> None:
        """Print: by rich where it is installed."""
        if importlib.util.find_spec("rich") is None:
            print(f"\n{self.title}")
            for row in (self.columns, *self.rows):
                print("  ".join(f"{cell:<22}" if index == 0 else f"{cell:>12}" for index, cell in enumerate(row)))
            return
        from rich.console import Console

        from benchmarks import report

        table = report.new_table(self.title, self.columns)
        for row in self.rows:
            table.add_row(*row)
        report.show_table(Console(highlight=False), table)


def megabytes(count: float) -> str:
    """In MB (10^6), three digits or all those before the point."""
    value = count / MEGA
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def peak_table(
    network: Network, dtype: str, accounts: Mapping[str, Account], batches: Sequence[int],
    measured: Mapping[tuple[str, int], int],
) -> Table:  # fmt: skip
    """A model's providers: what they keep, and peaks, predicted and, on the row below, measured."""
    rows = []
    for provider, found in accounts.items():
        peaks = (megabytes(found.peak(batch)) for batch in batches)
        rows.append((provider, megabytes(found.saved.per_image), *_versus(found, accounts), *peaks))
        there = {batch: measured[provider, batch] for batch in batches if (provider, batch) in measured}
        if there:
            found_more = {batch: peak - found.peak(batch) for batch, peak in there.items()}
            for what, figures in (("  measured", there), ("  beyond prediction", found_more)):
                rows.append((what, "", "", *(_cell(figures.get(batch)) for batch in batches)))
    title = f"{network.name}, training step, {dtype}: MB kept per image, and peak MB by batch"
    return Table(title, ("provider", "kept", "ratio", *map(str, batches)), tuple(rows))


def shares_text(found: Account, batch: int) -> str:
    """What the peak consists of at some batch, in words."""
    kept = found.saved.at(batch)
    rest = found.peak(batch) - 2 * found.parameters - found.buffers - kept
    weights, buffers, fixed = map(megabytes, (found.parameters, found.buffers, found.saved.fixed))
    return (
        f"batch {batch}: parameters and momentum {weights} MB each, buffers {buffers} MB; kept {megabytes(kept)} MB, "
        f"{fixed} MB of it whatever the batch (statistics, weights cast by autocast); gradients, transients "
        f"at the peak {megabytes(rest)} MB"
    )


def block_table(dtype: str, batch: int, accounts: Mapping[str, Mapping[str, Account]]) -> Table:
    """Blocks, with what each provider keeps for a batch."""
    providers = list(dict.fromkeys(name for found in accounts.values() for name in found))
    rows = []
    for block, found in accounts.items():
        rows.append((block, *(megabytes(found[name].saved.at(batch)) for name in providers)))
    return Table(f"Kept by a block in training, batch {batch}, {dtype}: MB", ("block", *providers), tuple(rows))


def plan_table(dtype: str, kept: Mapping[str, tuple[Kept, ...]]) -> Table:
    """What the fused step keeps now and would keep by each plan: MB per image, and the part of now's."""
    rows = []
    for name, tensors in kept.items():
        counts = [plan(tensors) for plan in plans.PLANS.values()]
        cells = (megabytes(counts[0]), *(f"{megabytes(count)} ({count / counts[0]:.2f})" for count in counts[1:]))
        rows.append((name, *cells))
    return Table(f"Kept per image, {dtype}: MB, by plan", ("network", *plans.PLANS), tuple(rows))


def _cell(count: int | None) -> str:
    return "-" if count is None else megabytes(count)


def _versus(found: Account, accounts: Mapping[str, Account]) -> tuple[str]:
    eager = accounts.get(EAGER)
    return (f"{found.saved.per_image / eager.saved.per_image:.3f}" if eager else "-",)
