"""Draw plots of what the benchmarks measured, beside their CSV files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import options, plots, speeds


def main(argv: Sequence[str] | None = None) -> int:
    """Draw; 1 where a file is not there or can not be read, or matplotlib is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=options.summary(__doc__))
    parser.add_argument("csv", nargs="+", type=Path, help="files that the benchmarks wrote; others are passed over")
    args = parser.parse_args(argv)
    try:
        for path in args.csv:
            drawn = plots.draw(speeds.read_all([path]), path) if speeds.is_result(path) else []
            print("\n".join(f"Wrote {plot}" for plot in drawn) or f"{path} has nothing to draw")
    except (ImportError, OSError, ValueError) as error:
        print(f"Nothing more is drawn: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
