"""Plots of what the benchmarks measured, each with its conditions below.

`python -m benchmarks.plots CSV...` writes, beside each file, what it has the values for:

- `<file>.png`: ratios to eager PyTorch;
- `<file>-roofline.png`: FLOP/s against FLOPs per byte;
- `<file>-latency.png`: time per step and images per second against the batch;
- `<file>-peak.png`: peak memory of a training step against the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.plots import batches, ratios, roofline
from benchmarks.records import Record

KINDS: dict[str, Callable[[Sequence[Record], Path], bool]] = {
    "": ratios.draw,
    "-roofline": roofline.draw,
    "-latency": batches.draw_latency,
    "-peak": batches.draw_memory,
}
"""By what is added to a file's name."""


def draw(rows: Sequence[Record], path: Path) -> list[Path]:
    """Draw all plots that rows have the values for.

    Args:
        rows: of one file, from any number of machines; each machine gets charts of its own.
        path: the CSV file, or what it would be called; its folder gets the plots.

    Returns:
        The files that were written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    targets = [(make, path.with_name(f"{path.stem}{suffix}.png")) for suffix, make in KINDS.items()]
    return [target for make, target in targets if make(rows, target)]
