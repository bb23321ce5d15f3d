"""Write a page about all results of a folder: aims, machines, tables by level, and where resfuse is behind."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import options, plots, speeds
from benchmarks.records import Record
from benchmarks.result_page import page

PAGE = "report.md"


def main(argv: Sequence[str] | None = None) -> int:
    """Write page and plots; 1 where the folder has no results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.summary", description=options.summary(__doc__))
    parser.add_argument(
        "folder", nargs="*", type=Path, default=[options.RESULTS],
        help=f"where CSV files are; the first one gets {PAGE} (default {options.RESULTS})",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        written = write(args.folder)
    except ValueError as error:
        print(f"No report: {error}", file=sys.stderr)
        return 1
    print("\n".join(f"Wrote {path}" for path in written))
    return 0


def write(folders: Sequence[Path]) -> list[Path]:
    """Draw all plots of some folders' CSV files, and write the page that shows them into the first of the folders.

    Without matplotlib there are no plots, and the page says so.

    Returns:
        What was written, the page last.

    Raises:
        ValueError: there is no CSV file of the benchmarks in any of them, or one that can not be read.
    """
    tables: dict[Path, list[Record]] = {}
    for folder in folders:
        files = speeds.result_files(folder) if folder.is_dir() else []
        tables |= {path: speeds.read_all([path]) for path in files}
    if not tables:
        names = ", ".join(map(str, folders))
        raise ValueError(f"no CSV files that the benchmarks wrote in {names}")
    drawn: list[Path] = []
    remark = ""
    try:
        for path, rows in tables.items():
            drawn += plots.draw(rows, path)
    except ImportError as error:
        remark = f"Plots were left out: {error}."
    folders[0].mkdir(parents=True, exist_ok=True)
    path = folders[0] / PAGE
    links = [os.path.relpath(plot, folders[0]) for plot in drawn]
    path.write_text(page([row for rows in tables.values() for row in rows], links, remark))
    return [*drawn, path]


if __name__ == "__main__":
    raise SystemExit(main())
