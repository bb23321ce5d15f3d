"""Count everything in results/static.csv again and show what differs; --write takes it over."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.options import summary


def main(argv: Sequence[str] | None = None) -> int:
    """0 where nothing differs or the table was written, 1 where something does."""
    args = _parse(argv)
    _interpret_triton()
    from benchmarks.static import groups, table

    before = table.read(args.table)
    kept: list[table.Row] = []
    differing = False
    for group in groups.GROUPS.values():
        known = [row for row in before if row.group == group.name]
        reason = groups.reason_against(group, known, comparing=not args.write)
        if reason is not None:
            print(f"{group.name}: left as it is, {reason}")
            kept += known
            continue
        found = group.rows()
        changes = table.differences(known, found)
        differing |= bool(changes)
        print(f"{group.name}: {len(found)} rows, {len(changes)} differ")
        for change in changes if known else []:
            print(f"  {change}")
        kept += found
    if args.write:
        table.write(kept, args.table)
        print(f"Wrote {args.table}")
        return 0
    if differing:
        print(f"If this is meant: {table.COMMAND}, and commit {args.table.name} with the reason")
    return int(differing)


def _interpret_triton() -> None:
    """What the Triton kernels are launched as is listed by the interpreter's process, where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    from benchmarks.static.table import TABLE

    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=summary(__doc__))
    parser.add_argument("--write", action="store_true", help="write what is found in place of what the table has")
    parser.add_argument("--table", type=Path, default=TABLE, help="CSV (default %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
