"""Draw plots of what the benchmarks measured, beside their CSV files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import options, plots, speeds


def main(argv: Sequence[str] | None = None) -> int:
    """Draw; 1 where a file is none of the benchmarks' or matplotlib is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=options.summary(__doc__))
    parser.add_argument("csv", nargs="+", type=Path, help="files that the benchmarks wrote")
    args = parser.parse_args(argv)
    try:
        tables = {path: speeds.read_all([path]) for path in args.csv}
        for path, rows in tables.items():
            drawn = plots.draw(rows, path)
            print("\n".join(f"Wrote {plot}" for plot in drawn) or f"{path} has nothing to draw: nothing to compare")
    except (ImportError, ValueError) as error:
        print(f"Nothing more is drawn: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
