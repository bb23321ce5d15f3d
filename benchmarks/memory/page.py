"""Write the tables of docs/memory.md: takes minutes, as every network is run and compiled."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks import pages
from benchmarks.memory import networks, plans
from benchmarks.memory.account import COMPILED, EAGER, FUSED, Line, account, kept_line
from benchmarks.memory.tables import Table, megabytes, plan_table
from benchmarks.records import ROOT

PAGE = ROOT / "docs" / "memory.md"
PEAKS, BATCHES, LIMITS = "resnet50", (32, 64, 128, 256), (16, 24, 80, 141)
"""Of the tables of peaks: network, batches, and memories in GB (10^9 bytes)."""
DTYPE = torch.bfloat16
TITLES = {EAGER: "eager", COMPILED: "torch.compile", FUSED: "resfuse"}
KEPT_COLUMNS = ("network", *TITLES.values(), "torch.compile / eager", "resfuse / eager")


def kept_row(name: str, compiled: Line) -> tuple[str, ...]:
    """A network's row: MB per image.

    Those of eager and resfuse are counted from the shapes; `tests/test_memory.py` holds runs of both to them.
    """
    kept = plans.now(plans.kept_tensors(networks.model(name), DTYPE))
    cells = (kept, compiled.per_image, kept)
    return name, *map(megabytes, cells), *(f"{count / kept:.2f}" for count in cells[1:])


def kept_table(names: Sequence[str]) -> str:
    """What each provider keeps."""
    rows = tuple(kept_row(name, kept_line(networks.model(name), COMPILED, DTYPE)) for name in names)
    return Table("", KEPT_COLUMNS, rows).markdown()


def peak_rows(providers: Sequence[str]) -> list[tuple[str, ...]]:
    """The peaks by batch, and the largest batches, of each provider."""
    rows = []
    for provider in providers:
        found = account(networks.model(PEAKS), provider, DTYPE)
        peaks = (f"{found.peak(batch) / 1e9:.2f}" for batch in BATCHES)
        rows.append((TITLES[provider], *peaks, *(str(found.largest_batch(limit * 10**9)) for limit in LIMITS)))
    return rows


def peak_table() -> str:
    """Of all providers."""
    columns = ("", *(f"batch {batch}" for batch in BATCHES), *(f"in {limit} GB" for limit in LIMITS))
    return Table("", columns, tuple(peak_rows(list(TITLES)))).markdown()


def plans_table() -> str:
    """The plans, of every network."""
    kept = {name: plans.kept_tensors(networks.model(name), DTYPE) for name in networks.NAMES}
    return plan_table("bfloat16", kept).markdown()


def shares_table() -> str:
    """What the kept bytes of one network consist of."""
    kept = plans.kept_tensors(networks.model(PEAKS), DTYPE)
    shares: dict[str, int] = {}
    for tensor in kept:
        shares[tensor.role] = shares.get(tensor.role, 0) + tensor.bytes
    rows = ((role, megabytes(size), f"{size / plans.now(kept):.1%}") for role, size in shares.items())
    return Table("", ("role", "MB per image", "part"), tuple(rows)).markdown()


if __name__ == "__main__":
    pages.write(
        PAGE,
        {"kept": kept_table(networks.NAMES), "peaks": peak_table(), "plans": plans_table(), "shares": shares_table()},
    )
