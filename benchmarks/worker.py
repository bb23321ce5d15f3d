"""A provider in a process of its own, so that its allocator, threads and compiler disturb no other provider.

The processes take turns; those that wait do nothing.  A process can also import the `resfuse` of another checkout, for
`benchmarks.compare`.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import resource
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
# `benchmarks` is this tree's, `resfuse` the given tree's: the package that is imported first stays.
PROGRAM = """
import sys
tree, root, descriptor, provider = sys.argv[1:]
sys.path[0] = tree
import resfuse
sys.path[0] = root
from benchmarks import worker
worker.serve(int(descriptor), provider)
"""
INPUTS = 4
"""Batches that take turns."""
FREE = 2 << 30
"""Bytes of GPU memory that a waiting process may keep beside what is in use."""


class ProviderError(RuntimeError):
    """A provider failed, or its results are wrong; the message says how, or holds its traceback."""


class UnsuitableError(ProviderError):
    """A provider is in order, but has nothing to offer for this case; the message says why."""


class Worker:
    """The caller's side.  Use as a context manager, or `close` it."""

    def __init__(self, provider: str, tree: Path = ROOT, threads: int = 0) -> None:
        """Start the process.

        Args:
            provider: a name in `benchmarks.providers.PROVIDERS`.
            tree: the checkout whose `resfuse` it imports.
            threads: of OpenMP, which reads them once, at start; 0 leaves them as they are.
        """
        self.provider = provider
        self._connection, theirs = Pipe()
        environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tree), str(ROOT), str(theirs.fileno()), provider],
            pass_fds=[theirs.fileno()], cwd=tree, env=environment,
            start_new_session=True,  # Ctrl-C is for the caller, which ends it
        )  # fmt: skip
        theirs.close()

    def ask(self, method: str, *arguments: object, timeout: float) -> Any:
        """Call a method of `Runner` over there.

        Raises:
            UnsuitableError: the provider has nothing to offer for the case.
            ProviderError: it failed, crashed, or took longer than `timeout` seconds; after the latter two the process
                is gone.
        """
        try:
            self._connection.send((method, arguments))
            if not self._connection.poll(timeout):
                self.kill()
                raise ProviderError(f"{method} took longer than {timeout:.0f} s")
            kind, reply = self._connection.recv()
        except (EOFError, OSError) as error:
            self.kill()
            raise ProviderError(f"its process ended with code {self._process.returncode}") from error
        if kind == "done":
            return reply
        raise (UnsuitableError if kind == "unsuitable" else ProviderError)(reply)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """End the process, whatever it does."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=0.2)  # one that has crashed keeps its own exit code
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End the process, which is idle."""
        with contextlib.suppress(OSError):
            self._connection.send(None)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        self.kill()
        self._connection.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill() if exception[0] else self.close()


def serve(descriptor: int, provider: str) -> None:
    """Answer requests until one is None or nobody asks any more."""
    connection, runner = Connection(descriptor), Runner(provider)
    with contextlib.suppress(EOFError, OSError):
        while (request := connection.recv()) is not None:
            method, arguments = request
            try:
                reply = "done", getattr(runner, method)(*arguments)
            except UnsuitableError as reason:
                reply = "unsuitable", str(reason)
            except Exception:
                reply = "failed", traceback.format_exc()
            connection.send(reply)


class Runner:
    """The provider's side: one workload after the other."""

    def __init__(self, provider: str) -> None:
        self._provider = provider
        self._calls: dict[str, Callable[[], object]] = {}

    def versions(self) -> dict[str, Any]:
        """The `resfuse` that was imported, and its backends."""
        import resfuse

        return {"path": str(Path(str(resfuse.__file__)).parent), "backends": resfuse.available_backends()}

    def prepare(self, path: Path, graph: bool = False) -> dict[str, float]:
        """Take over a workload in place of the one before.

        Args:
            path: a `Workload` by torch.save.
            graph: capture the step as a CUDA graph too.

        Returns:
            The relative error of every result against float64.
        """
        from benchmarks.providers import PROVIDERS
        from benchmarks.steps import named_results

        self.release()
        provider, workload = PROVIDERS[self._provider], torch.load(path, weights_only=False)
        setting = workload.setting
        self._device, self._threads = torch.device(setting.device), setting.threads
        torch.set_num_threads(setting.threads)
        torch.backends.cudnn.benchmark = True  # cuDNN tries its algorithms, for all providers alike
        module, inputs = workload.module(), workload.batch(0)[: len(workload.case.shapes)]
        step = provider.prepare(module, tuple(tensor.detach() for tensor in inputs), setting)
        module.train(setting.trains)
        # On a GPU do_bench empties the L2 cache before every call, so that one batch is enough.
        count = 1 if self._device.type == "cuda" else INPUTS
        batches = [tuple(provider.convert_leaf(tensor) for tensor in workload.batch(i)) for i in range(count)]
        errors = workload.errors(named_results(step(*batches[0]), module, workload.batch(0), setting))
        turns = itertools.cycle(batches)
        self._calls = {"time": lambda: step(*next(turns))}
        if graph:
            results, self._calls["graph_time"] = _captured(lambda: step(*batches[0]))
            errors = workload.errors(named_results(results, module, workload.batch(0), setting))
        return errors

    def prepare_overhead(self, name: str, mode: str, device: str) -> None:
        """Take over a tiny call of one operator, of which host time is measured."""
        from benchmarks import overhead

        torch.set_num_threads(1)
        self._device, self._threads = torch.device(device), 1
        fused, _ = overhead.calls(overhead.TINY[name], mode, torch.float32, device)
        self._calls = {"time": fused}

    def turn(self, seconds: float) -> dict[str, list[float]]:
        """Seconds per call, of calls that last about so many seconds together; at least one call."""
        found = {name: _times(call, self._device, self._threads, seconds) for name, call in self._calls.items()}
        if self._device.type == "cuda" and torch.cuda.memory_reserved() - torch.cuda.memory_allocated() > FREE:
            torch.cuda.empty_cache()
        return found

    def host_turn(self, calls: int) -> float:
        """Seconds per call of the calling thread."""
        from benchmarks import overhead

        return overhead.host_seconds(self._calls["time"], calls, self._device)

    def finish(self) -> int:
        """Peak memory in bytes: on a GPU what PyTorch allocates during a call, weights and inputs left out.

        On a CPU it is the resident set of the process.
        """
        call = self._calls["time"]
        if self._device.type != "cuda":
            call()
            return resident_peak()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def release(self) -> None:
        """Forget the workload, and what was compiled for it: torch.compile keys its code by the forward function."""
        self._calls = {}
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def resident_peak() -> int:
    """The largest resident set of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _times(call: Callable[[], object], device: torch.device, threads: int, seconds: float) -> list[float]:
    if device.type == "cuda":
        from triton.testing import do_bench

        return [ms / 1e3 for ms in do_bench(call, warmup=10, rep=max(1, int(seconds * 1e3)), return_mode="all")]
    from torch.utils.benchmark import Timer

    # The first call does not count: it brings back the caches that other processes have used since.
    timer = Timer("call()", globals={"call": call}, num_threads=threads)
    return timer.blocked_autorange(min_run_time=seconds).times


def _captured(step: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
    """(results of a replay, the replay) of a step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # algorithms are chosen and state is made before the capture
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    torch.cuda.synchronize()
    return results, graph.replay
