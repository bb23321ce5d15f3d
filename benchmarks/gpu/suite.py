"""The test suite by several processes, within a limit: `python -m benchmarks.gpu.suite --share DIR -- tests -m ...`.

A test that hangs or crashes takes only its own process along, and counts as failed; its process is replaced.  The same
command goes on where an earlier one was stopped.  What follows `--` goes to pytest.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.gpu import outcomes
from benchmarks.options import summary
from tests import sharing

ROOT = Path(__file__).resolve().parent.parent.parent
UNFINISHED = 75
"""Exit status where time was too short; EX_TEMPFAIL of sysexits.h."""
MOST_REPLACED = 40
"""Processes that crashed or hung, after which the rest is given up."""
PATIENCE = 3
"""Times as long as any other a test may take that is marked slow."""
NORMAL = (0, 1, 5)
"""pytest's exit statuses: all passed, some failed, nothing was left to run."""


@dataclasses.dataclass
class Worker:
    """One of the processes, and the file that it writes."""

    name: str
    path: Path
    process: subprocess.Popen[bytes]

    def current(self) -> tuple[str, float, bool] | None:
        """The test that it is running, since when, and whether it is a slow one."""
        last = sharing.last_record(self.path)
        return (last["started"], last["at"], last["slow"]) if "started" in last else None


class Run:
    """One invocation: starts workers, replaces those that died."""

    def __init__(self, share: Path, arguments: Sequence[str], environment: Mapping[str, str], until: float) -> None:
        self.share, self._arguments, self._environment, self._until = share, arguments, environment, until
        self.workers: list[Worker] = []
        self.replaced = 0
        self.broken: list[str] = []
        """How processes ended that could not run any test."""
        self._generation = f"{int(time.time()):x}"
        shutil.rmtree(share / "claims", ignore_errors=True)
        (share / "claims").mkdir(parents=True)

    def start(self) -> None:
        """One more worker."""
        name = f"{self._generation}-{len(list(self.share.glob(f'{self._generation}-*.log')))}"
        command = [
            sys.executable, "-m", "pytest", "-p", "tests.sharing", f"--share={self.share}", f"--share-name={name}",
            f"--share-until={self._until}", "-c", str(ROOT / "pyproject.toml"), "-q", "-p", "no:cacheprovider",
            *self._arguments,
        ]  # fmt: skip
        with (self.share / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self._environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
        self.workers.append(Worker(name, self.share / f"{name}.jsonl", process))

    def step(self, per_test: float) -> bool:
        """Look after the workers once; whether any is left."""
        for worker in list(self.workers):
            status = worker.process.poll()
            current = worker.current()
            patience = per_test * (PATIENCE if current is not None and current[2] else 1)
            if status is None and current is not None and time.time() - current[1] > patience:
                self._replace(worker, f"hung: not over after {patience:.0f} s")
            elif status is not None and status not in NORMAL:
                how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
                self._replace(worker, f"crashed: {how}", known=status == sharing.LOST_DEVICE)
            elif status is not None:
                self.workers.remove(worker)
        return bool(self.workers)

    def stop(self) -> None:
        """End all workers; what they are running has no outcome then."""
        for worker in self.workers:
            worker.process.kill()
            worker.process.wait()
        self.workers.clear()

    def _replace(self, worker: Worker, reason: str, known: bool = False) -> None:
        worker.process.kill()
        worker.process.wait()
        self.workers.remove(worker)
        current = worker.current()
        if current is not None and not known:
            tail = (self.share / f"{worker.name}.log").read_text(errors="replace")[-3000:]
            record = {"test": current[0], "outcome": "failed", "reason": reason, "report": tail,
                      "seconds": round(time.time() - current[1], 3)}  # fmt: skip
            with worker.path.open("a") as file:
                file.write("\n" + json.dumps(record) + "\n")
        for claim in (self.share / "claims").iterdir():  # what it had claimed and not run is anyone's again
            if claim.read_text() == worker.name:
                claim.unlink()
        if not sharing.last_record(worker.path):  # nor would another one collect the tests
            log = (self.share / f"{worker.name}.log").read_text(errors="replace")
            self.broken.append(f"{reason}; its last words:\n{log[-1500:]}")
            return
        self.replaced += 1
        if self.replaced <= MOST_REPLACED and time.time() < self._until:
            self.start()


def environment(device: str, workers: int) -> dict[str, str]:
    """Of a worker: its share of the cores, and none of the plugins that this suite does not ask for."""
    cores = len(os.sched_getaffinity(0))
    found = {
        **os.environ,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONFAULTHANDLER": "1",
        "OMP_NUM_THREADS": str(max(1, cores // workers)),
        # Inductor would start as many processes as there are cores, for each of the workers.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    if device == "cuda":
        found.pop("TRITON_INTERPRET", None)
        found["EMU_OFF"] = "1"  # what the kernels compute on a CPU is known
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if all has passed, 1 if something has failed, 75 if time was too short."""
    begin = time.time()
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.suite", description=summary(__doc__))
    parser.add_argument("--share", type=Path, required=True, metavar="DIR", help="claims, outcomes and logs")
    parser.add_argument("--workers", type=int, metavar="N", help="default: two fewer than cores, 14 at most")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--limit", type=float, default=450.0, metavar="SECONDS", help="default %(default)g")
    parser.add_argument("--per-test", type=float, default=120.0, metavar="SECONDS", help="default %(default)g")
    parser.add_argument("arguments", nargs="*", help="of pytest")
    args = parser.parse_args(argv)
    workers = args.workers or max(1, min(14, len(os.sched_getaffinity(0)) - 2))
    share, end = args.share.resolve(), begin + args.limit
    run = Run(share, args.arguments, environment(args.device, workers), until=end - 15)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for _ in range(workers):
            run.start()
        while run.step(args.per_test) and time.time() < end:
            time.sleep(0.3)
    except KeyboardInterrupt:
        pass
    finally:
        run.stop()
    report = outcomes.merge(share)
    print("\n".join([*run.broken[:1], *outcomes.lines(report)]))
    if run.broken and not report.run:
        return 2
    if report.left:
        return UNFINISHED if time.time() >= end - 20 else 2
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
