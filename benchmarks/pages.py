"""Tables in the pages of docs/ that code has made: between two comments, `<!-- table: name -->` and `<!-- end -->`."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

_TABLE = re.compile(r"(<!-- table: (\w+) -->)(.*?)(<!-- end -->)", re.DOTALL)


def tables_of(path: Path) -> dict[str, str]:
    """The tables that a page has, by name."""
    return {found[2]: found[3].strip("\n") for found in _TABLE.finditer(path.read_text())}


def write(path: Path, tables: Mapping[str, str]) -> None:
    """Put tables into a page, in place of those of the same names.

    Raises:
        ValueError: the page has no place for one of them; nothing is written then.
    """
    found = tables_of(path)
    missing = tables.keys() - found.keys()
    if missing:
        raise ValueError(f"{path} has no <!-- table: ... --> for {', '.join(sorted(missing))}")
    found |= tables
    path.write_text(_TABLE.sub(lambda part: f"{part[1]}\n{found[part[2]]}\n{part[4]}", path.read_text()))
    print(f"Wrote {path}", file=sys.stderr)
