"""Tables in the pages of docs/ that code has made: between two comments, `<!-- table: name -->` and `<!-- end -->`."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)


def tables_of(path: Path) -> dict[str, str]:
    """The tables that a page has, by name."""
    return {found[2]: found[0][len(found[1]) : -len(found[3])] for found in _TABLE.finditer(path.read_text())}


def write(path: Path, tables: Mapping[str, str]) -> None:
    """Put tables into a page, in place of those of the same names.

    Raises:
        ValueError: the page has no place for one of them; nothing is written then.
    """
    missing = tables.keys() - tables_of(path).keys()
    if missing:
        raise ValueError(f"{path} has no <!-- table: ... --> for {', '.join(sorted(missing))}")
    kept = tables_of(path) | tables
    path.write_text(_TABLE.sub(lambda found: found[1] + kept[found[2]] + found[3], path.read_text()))
    print(f"Wrote {path}", file=sys.stderr)
