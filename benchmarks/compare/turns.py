"""Sides that take turns, so that whatever disturbs the machine hits all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

SHORTEST_TURN = 0.25
"""Seconds that a turn lasts at least; shorter calls are repeated."""
MOST_CALLS = 2000


class Side(Protocol):
    """One of the processes."""

    def warm_up(self, limit: float) -> float:
        """Run until times no longer fall, for at most `limit` seconds; the seconds of a call."""

    def run(self, calls: int) -> float:
        """Seconds per call, of that many: the median."""


def take_turns(
    sides: Mapping[str, Side], rounds: int, limit: float, advance: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds per call of every side in every round.

    Args:
        sides: at least one.
        rounds: how often each has its turn.
        limit: seconds of warm-up, for each.
        advance: called after each turn.
    """
    slowest = max(side.warm_up(limit) for side in sides.values())
    calls = calls_of_a_turn(slowest)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(rounds):
        for name in order_of(index, list(sides)):
            seconds[name].append(sides[name].run(calls))
            advance()
    return seconds


def calls_of_a_turn(seconds: float) -> int:
    """How many calls of so many seconds make a turn; all sides make the same."""
    return max(1, min(MOST_CALLS, math.ceil(SHORTEST_TURN / max(seconds, 1e-9))))


def order_of(index: int, names: list[str]) -> list[str]:
    """Who comes when in a round: everyone is first, and behind everyone else, as often as the others."""
    shift = index // 2 % len(names)
    rotated = names[shift:] + names[:shift]
    return rotated[::-1] if index % 2 else rotated
