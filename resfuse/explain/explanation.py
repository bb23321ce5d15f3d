"""The result of `explain`: what it found, and how that is shown."""

from __future__ import annotations

import dataclasses

from resfuse.explain import table
from resfuse.explain.facts import Facts


@dataclasses.dataclass(frozen=True)
class Explanation(Facts):
    """The result of `resfuse.explain`.  `print` shows a table, `rich.print` a coloured one."""

    def __str__(self) -> str:
        return table.text(self)

    def __rich__(self) -> table.Rich:
        """The same table for `rich.print`."""
        return table.Rich(self)
