"""A provider in a process of its own.

Allocators, thread pools and compilers of one provider must not disturb another: what the C library's allocator gives
back to the system, for one, depends on everything that the process has freed before.  The processes take turns; those
that wait do nothing.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import measure
from benchmarks.measure import Sample
from benchmarks.providers import PROVIDERS
from benchmarks.workload import Workload, first_results


class ProviderError(RuntimeError):
    """A provider failed; the message holds its traceback."""


class _Failure(NamedTuple):
    traceback: str


class Worker:
    """The caller's side.  Use as a context manager, or `close` it."""

    def __init__(self, provider: str, workload: Path) -> None:
        """Start the process; `errors` waits until it is prepared."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, provider, workload), daemon=False)
        self._process.start()
        theirs.close()

    def errors(self) -> dict[str, float]:
        """Wait for the provider and run it once; relative errors of what it computed."""
        return self._ask("errors")

    def warm_up(self, limit: float) -> float:
        """Call until the time per call is stable, for at most `limit` seconds; returns it."""
        return self._ask("warm_up", limit)

    def run(self, calls: int, lead_in: bool) -> list[Sample]:
        """Time that many calls, after one that does not count if `lead_in`."""
        return self._ask("run", calls, lead_in)

    def peak_memory(self) -> int:
        """Bytes that were in use at the most since the warm-up."""
        return self._ask("peak_memory")

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):  # it may have ended already
            self._connection.send(None)
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ask(self, method: str, *args: Any) -> Any:
        try:
            self._connection.send((method, *args))
            reply = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(timeout=10)
            raise ProviderError(f"its process ended with code {self._process.exitcode}") from error
        if isinstance(reply, _Failure):
            raise ProviderError(reply.traceback)
        return reply


def _serve(connection: Connection, provider: str, workload: Path) -> None:
    try:
        runner = _Runner(provider, workload)
        while (request := connection.recv()) is not None:
            method, *args = request
            connection.send(getattr(runner, method)(*args))
    except (EOFError, KeyboardInterrupt):
        pass  # the caller is gone
    except Exception:
        connection.send(_Failure(traceback.format_exc()))


class _Runner:
    """The provider's side."""

    def __init__(self, provider: str, path: Path) -> None:
        self._workload = Workload.load(path)
        setting = self._workload.setting
        torch.set_num_threads(setting.threads)
        torch.backends.cudnn.benchmark = True  # let cuDNN try its algorithms, for all providers alike
        model = self._workload.model()
        self._parameter = next(model.parameters())
        chosen = PROVIDERS[provider]
        self._step = chosen.prepare(model, self._workload.batches[0][0], setting)
        self._batches = [(chosen.convert(images), *rest) for images, *rest in self._workload.batches]
        self._call = measure.cycle(self._batches, self._step)
        self._device = setting.device

    def errors(self) -> dict[str, float]:
        return self._workload.errors(
            first_results(self._step, self._parameter, self._batches[0], self._workload.setting)
        )

    def warm_up(self, limit: float) -> float:
        seconds = measure.warm_up(self._call, self._device, limit)
        measure.reset_peak_memory(self._device)
        return seconds

    def run(self, calls: int, lead_in: bool) -> list[Sample]:
        if lead_in:
            self._call()
        return measure.call_samples(self._call, calls, self._device)

    def peak_memory(self) -> int:
        if not all(math.isfinite(value) for value in torch.as_tensor(self._call()).flatten().tolist()):
            raise ArithmeticError("the result is no longer finite: what was timed is not a model at work")
        return measure.peak_memory(self._device)
