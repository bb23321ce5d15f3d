"""A provider in a process of its own.

Allocators, thread pools and compilers of one provider must not disturb another: what the C library's allocator gives
back to the system, for one, depends on everything that the process has freed before.  The processes take turns; those
that wait do nothing.  A process serves one model, or, where cases are many and small, one after the other.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measure import Sample
from benchmarks.providers.base import UnsuitableError
from benchmarks.runner import Findings, Runner


class ProviderError(RuntimeError):
    """A provider failed, or its results are wrong; the message says how, or holds its traceback."""


class LateError(ProviderError):
    """A provider was not done in time."""


class NothingToOfferError(ProviderError):
    """A provider is in order, but not for this case; the message says why."""


class _Failure(NamedTuple):
    traceback: str
    unsuitable: bool = False


class Worker:
    """The caller's side.  Use as a context manager, or `close` it."""

    def __init__(self, provider: str) -> None:
        """Start the process."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, provider), daemon=False)
        self._process.start()
        theirs.close()

    def prepare(self, workload: Path, patience: float | None = None) -> dict[str, float]:
        """Take over a workload in place of the one before; the relative errors of what the provider computes.

        Raises:
            ProviderError: it failed.
            LateError: it took longer than `patience` seconds.
        """
        return self._ask("prepare", workload, patience=patience, what="it was not ready")

    def warm_up(self, limit: float) -> float:
        """Call until the time per call is stable, for at most `limit` seconds; returns it."""
        return self._ask("warm_up", limit)

    def run(self, calls: int, lead_in: bool) -> list[Sample]:
        """Time that many calls, after one that does not count if `lead_in`."""
        return self._ask("run", calls, lead_in)

    def finish(self) -> Findings:
        """What is found out once, after the times: memory, launches, time on the host."""
        return self._ask("finish")

    def release(self) -> None:
        """Forget the workload, and give back its memory."""
        self._ask("release")

    def end(self) -> None:
        """Tell the process to end, without waiting for it."""
        with contextlib.suppress(OSError):  # it may have ended already
            self._connection.send(None)

    def close(self) -> None:
        """End the process."""
        self.end()
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def kill(self) -> None:
        """End the process whatever it does."""
        self._process.kill()
        self.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ask(self, method: str, *args: Any, patience: float | None = None, what: str = "") -> Any:
        started = time.monotonic()
        try:
            self._connection.send((method, *args))
            if not self._connection.poll(patience):
                self._process.kill()
                raise LateError(f"{what} after {time.monotonic() - started:.0f} s")
            reply = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(timeout=10)
            raise ProviderError(f"its process ended with code {self._process.exitcode}") from error
        if isinstance(reply, _Failure):
            raise (NothingToOfferError if reply.unsuitable else ProviderError)(reply.traceback)
        return reply


def _serve(connection: Connection, provider: str) -> None:
    try:
        runner = Runner(provider)
        while (request := connection.recv()) is not None:
            method, *args = request
            try:
                reply = getattr(runner, method)(*args)
            except UnsuitableError as reason:
                reply = _Failure(str(reason), unsuitable=True)
            except Exception:
                reply = _Failure(traceback.format_exc())
            connection.send(reply)
    except (EOFError, KeyboardInterrupt):
        pass  # the caller is gone
    except Exception:
        connection.send(_Failure(traceback.format_exc()))
