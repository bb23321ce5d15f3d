"""A command with a time limit, whose whole family of processes ends with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

POLL = 0.2
"""Seconds."""
GRACE = 10.0
"""Seconds that a command has, after its limit, to write what it has."""


class Finished(NamedTuple):
    """How a command ended."""

    status: int | None
    """Its exit status, negative for a signal; None where its time was over."""
    seconds: float
    tail: str
    """The end of what it printed."""


def run(
    command: Sequence[str],
    *,
    log: Path,
    limit: float,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    beat: Callable[[], None] = lambda: None,
    grace: float = GRACE,
) -> Finished:
    """Run a command; what it prints is appended to a file.

    Args:
        command: program and arguments.
        log: the file.
        limit: seconds until it is interrupted, as by Ctrl-C.  After `grace` more it is killed.
        environment: its variables; None: those of this process.
        folder: where it runs; None: here.
        beat: called several times per second while it runs.
        grace: seconds.

    Raises:
        OSError: the program can not be started.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with log.open("ab") as output:
        start = output.tell()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=folder, env=environment,
            start_new_session=True,
        )  # fmt: skip
    interrupted = False
    try:
        while process.poll() is None:
            elapsed = time.monotonic() - begin
            if elapsed > limit and not interrupted:
                interrupted = True
                _signal(process, signal.SIGINT)
            if elapsed > limit + grace:
                break
            beat()
            time.sleep(POLL)
    finally:
        _signal(process, signal.SIGKILL)  # also what it left behind
        process.wait()
    with log.open("rb") as output:
        output.seek(max(start, log.stat().st_size - 8000))
        tail = output.read().decode(errors="replace")
    return Finished(None if interrupted else process.returncode, time.monotonic() - begin, tail)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)  # it leads a session of its own
