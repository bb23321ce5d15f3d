"""The last lines of a call, which say what is known so far."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu import outcomes
from benchmarks.gpu.pieces import PIECES, Piece
from benchmarks.gpu.runner import DONE, FAILED, LEFT, OUT

LONGEST = 40
"""Lines."""
SILENT = ("check", "suite")
"""Pieces whose failures are listed by test."""


def lines(known: Mapping[str, Any], work: Path) -> list[str]:
    """At most 40: what is done, which tests failed, how the aims stand, what is left.

    Args:
        known: of each piece, by name, as `Store.pieces` has it.
        work: the folder of the pieces' files.
    """
    found = []
    for piece in PIECES:
        if piece.name in known:
            found += _piece(piece, known[piece.name]["steps"])
    found += _suite(work)
    found += _aims(work)
    left = [piece.name for piece in PIECES if state(piece, known) == LEFT]
    found.append(f"left: {', '.join(left)}; the same command goes on there" if left else "nothing is left")
    if len(found) > LONGEST:
        found = [*found[: LONGEST - 2], f"... {len(found) - LONGEST + 1} more lines in summary.txt", found[-1]]
    return found


def state(piece: Piece, known: Mapping[str, Any]) -> str:
    """Of a piece, in one word."""
    steps = known.get(piece.name, {"steps": {}})["steps"]
    statuses = [steps.get(step.name, {}).get("status", LEFT) for step in piece.steps]
    for worst in (LEFT, FAILED):
        if worst in statuses:
            return worst
    return OUT if all(status == OUT for status in statuses) else DONE


def _piece(piece: Piece, steps: Mapping[str, Any]) -> list[str]:
    seconds = sum(one.get("seconds", 0) for one in steps.values())
    found = [f"{state(piece, {piece.name: {'steps': steps}}):<10} {piece.name}: {piece.what} ({seconds:.0f} s)"]
    for name, one in steps.items():
        if one["status"] == OUT:
            found.append(f"  {name}: left out, {one['why']}")
        elif one["status"] == FAILED and piece.name not in SILENT:
            last = [line for line in one["tail"].splitlines() if line.strip()][-3:]
            found.append(f"  {name}: exit status {one['exit']}: {' | '.join(last)}"[:300])
    return found


def _suite(work: Path) -> list[str]:
    share = work / "suite"
    return [f"tests: {line}" if not index else line for index, line in enumerate(_outcomes(share))]


def _outcomes(share: Path) -> list[str]:
    return outcomes.lines(outcomes.merge(share)) if share.is_dir() else []


def _aims(work: Path) -> list[str]:
    """How the aims stand, with tables and without; nothing where nothing was measured."""
    found = []
    for folder in ("bench", "untuned"):
        if files := sorted((work / folder).glob("model-*.csv")):
            try:
                found += [f"aim ({folder}): {line}" for line in _outcomes_of(files)]
            except Exception as error:  # resfuse may not even import: all else is worth being told, then more than ever
                found.append(f"aims ({folder}): not read, {type(error).__name__}: {error}"[:200])
    return found


def _outcomes_of(files: list[Path]) -> list[str]:
    from benchmarks import aims, speeds

    reached = [one for one in aims.outcomes(speeds.read_all(files)) if one.measured is not None]
    return [f"{one.aim.text}: {one.text}, {one.verdict}" for one in reached]
