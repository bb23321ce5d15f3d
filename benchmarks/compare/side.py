"""A commit in a process of its own, which imports that tree's `resfuse` and nothing else of it."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.compare.trees import ROOT, Tree

# `benchmarks` is this tree's for every commit, `resfuse` the commit's: the package that is imported first stays.
PROGRAM = """
import sys
tree, ours, descriptor = sys.argv[1:]
sys.path[0] = ours
import benchmarks
sys.path[0] = tree
from benchmarks.compare import worker
worker.serve(tree, int(descriptor))
"""


class SideError(RuntimeError):
    """A process failed; the message has its traceback."""


class Failure(NamedTuple):
    """An answer of a process that failed."""

    traceback: str


class SideProcess:
    """The caller's end.  Use as a context manager, or `close` it."""

    def __init__(self, tree: Tree, threads: int) -> None:
        self.tree = tree
        self._connection, theirs = Pipe()
        # In a session of its own: Ctrl-C is for the caller, who ends it.
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tree.path), str(ROOT), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            cwd=tree.path,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            start_new_session=True,
        )
        theirs.close()

    def describe(self) -> dict[str, str]:
        """What it has imported, and which backends it found.

        Raises:
            SideError: it imported another `resfuse` than its tree's.
        """
        return self._ask("describe")

    def prepare(self, job: Path) -> dict[str, Tensor]:
        """Take over a job's file in place of the one before; what it computes for the first batch."""
        return torch.load(io.BytesIO(self._ask("prepare", str(job))))

    def warm_up(self, limit: float) -> float:
        return self._ask("warm_up", limit)

    def run(self, calls: int) -> float:
        return self._ask("run", calls)

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._connection.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> SideProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is not None and not issubclass(kind, Exception):  # Ctrl-C: it may be in the middle of a long step
            self._process.kill()
        self.close()

    def _ask(self, method: str, *arguments: object) -> Any:
        try:
            self._connection.send((method, *arguments))
            reply = self._connection.recv()
        except (EOFError, OSError) as error:
            code = self._process.wait()
            raise SideError(f"{self.tree.label}: its process ended with code {code}") from error
        if isinstance(reply, Failure):
            raise SideError(f"{self.tree.label}: {reply.traceback}")
        return reply
