"""Does pieces, one after the other, within a time limit, and keeps account of what is done."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import process
from benchmarks.gpu.pieces import Piece, Step
from benchmarks.gpu.store import Store
from benchmarks.gpu.suite import UNFINISHED

ROOT = Path(__file__).resolve().parent.parent.parent
RESERVE = 8.0
"""Seconds that are kept for the files, and for processes to end."""
DONE, FAILED, LEFT, OUT = "done", "failed", "unfinished", "left out"
LEFT_LINE = re.compile(r"^(The time is up: left|Left for the next run)", re.MULTILINE)
"""What benchmarks.run and benchmarks.memory say where --limit ended them."""
TESTED = ("resfuse", "csrc", "tests")
STALE = ("suite", "sanitize")
"""Folders whose contents say nothing about other sources."""


class Runner:
    """The pieces on this machine."""

    def __init__(self, store: Store, device: str, quick: bool, limit: float, site: Path | None = None) -> None:
        """Prepare to do pieces.

        Args:
            store: where files are, and what is done.
            device: cuda or cpu.
            quick: rehearse: the smallest arguments that go through the same code.
            limit: seconds for all that is asked for.
            site: folder with more packages.
        """
        self._store, self._device, self._quick = store, device, quick
        self._limit, self._end = limit, time.monotonic() + limit
        self._site = site
        self._commit = commit()
        self._forget_tests()

    def do(self, pieces: Sequence[Piece], *, again: bool = False) -> None:
        """Do what is not done yet, or, if `again`, everything, as far as there is time for it."""
        if again:
            for piece in pieces:
                self._store.pieces.pop(piece.name, None)
        if not any(self._missing(piece) for piece in pieces if not piece.every_call):
            pieces = [piece for piece in pieces if self._missing(piece)]
        for piece in pieces:
            for step in piece.steps if piece.every_call else self._missing(piece):
                if self._left() < self._least(step):
                    continue  # another may be shorter
                known = self._store.pieces.setdefault(piece.name, {"steps": {}})
                known["steps"][step.name] = self._do(piece, step)
                self._store.save()

    def _missing(self, piece: Piece) -> list[Step]:
        """The steps that have not come to an end."""
        known = self._store.pieces.get(piece.name, {"steps": {}})["steps"]
        return [step for step in piece.steps if known.get(step.name, {}).get("status") not in (DONE, FAILED, OUT)]

    def _least(self, step: Step) -> float:
        """Seconds that have to be left: in a rehearsal little, and never more than a call that begins with it has."""
        return max(20.0, min(60 * (0.5 if self._quick else step.least), 0.9 * self._limit))

    def _do(self, piece: Piece, step: Step) -> dict[str, Any]:
        arguments = step.rehearsal if self._quick else step.arguments
        missing = [name for name in step.needs if not self._has(name)]
        if arguments is None or missing:
            return {"status": OUT, "why": f"needs {', '.join(missing)}" if missing else "of no use without a GPU"}
        limit = min(60 * step.minutes, self._left() - RESERVE)
        # benchmarks.run and the like end by themselves, in good order, before they are interrupted.
        words = {"work": self._store.work, "device": self._device, "limit": f"{limit - 5:.0f}"}
        command = [sys.executable, "-m", step.module, *(argument.format(**words) for argument in arguments)]
        print(f"{piece.name}: {step.name} (at most {limit / 60:.1f} minutes)", flush=True)
        log = self._store.work / "logs" / f"{piece.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write(f"\n$ {' '.join(command)}\n")
        finished = process.run(
            command, log=log, limit=limit, environment=self._environment(piece), folder=ROOT, beat=self._store.beat
        )
        return {
            "status": status(finished),
            "exit": finished.status,
            "seconds": round(finished.seconds, 1),
            "tail": finished.tail[-3000:],
        }

    def _environment(self, piece: Piece) -> Mapping[str, str]:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "120", "BENCH_COMMIT": self._commit}
        paths = [str(self._site)] if self._site else []
        environment["PYTHONPATH"] = os.pathsep.join([*paths, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        if piece.tables:
            environment["RESFUSE_TRITON_TABLES"] = str(self._store.work / "tables")
        if self._device == "cuda":
            environment.pop("TRITON_INTERPRET", None)
        return environment

    def _has(self, package: str) -> bool:
        in_site = self._site is not None and (self._site / package).is_dir()
        return in_site or importlib.util.find_spec(package) is not None

    def _left(self) -> float:
        return self._end - time.monotonic()

    def _forget_tests(self) -> None:
        """Outcomes of other sources are none of these: tests begin anew, measurements stay until they are repeated."""
        found = digest(TESTED)
        if self._store.state.setdefault("sources", found) != found:
            self._store.state["sources"] = found
            for name in ("build", "check", *STALE):
                self._store.pieces.pop(name, None)
            for name in STALE:
                shutil.rmtree(self._store.work / name, ignore_errors=True)
            print("The sources have changed since: what was tested is tested again.", flush=True)


def status(finished: process.Finished) -> str:
    """Of a step: done, failed, or unfinished, so that the same command goes on where it was stopped."""
    if finished.status is None or finished.status == UNFINISHED or LEFT_LINE.search(finished.tail):
        return LEFT
    return DONE if finished.status == 0 else FAILED


def digest(folders: Sequence[str]) -> str:
    """Of everything in these folders that is source text."""
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in (".py", ".h", ".cpp", ".inl", ".cu", ".cuh"):
                found.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def commit() -> str:
    """What measurements are filed under where the sources came without git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return f"src-{digest(('resfuse', 'csrc', 'benchmarks'))[:8]}"
    return done.stdout.strip()
