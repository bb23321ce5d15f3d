"""compute-sanitizer's four tools over every kernel: `python -m benchmarks.gpu.sanitize --output DIR`.

Several jobs run at a time; each is one tool, one backend and one dtype of `tests.sanitized`.  Those that an earlier
call brought to an end are not repeated.  Without a GPU one job runs, of the reference and without a tool, to try this.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools import cubin
from benchmarks.gpu import process
from benchmarks.gpu.suite import UNFINISHED
from benchmarks.options import summary

ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
DTYPES = ("bfloat16", "float32", "float16")
RESULTS = "sanitize.json"
FOUND = 99
"""Exit status of compute-sanitizer where it has found something."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What one process runs."""

    tool: str
    backend: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.tool} {self.backend} {self.dtype}"

    def command(self, program: str | None) -> list[str]:
        """The command line; without a program that watches if there is none."""
        watched = [sys.executable, "-m", "tests.sanitized", self.backend, self.dtype]
        if program is None:
            return watched
        return [program, "--tool", self.tool, "--error-exitcode", str(FOUND), *watched]


def jobs(device: str) -> list[Job]:
    """Those that say most first: csrc's kernels, then Triton's; bfloat16 has the paths that all dtypes have."""
    if device == "cpu":
        return [Job("no tool", "reference", "float32")]
    return [Job(tool, backend, dtype) for backend in ("cuda", "triton") for dtype in DTYPES for tool in TOOLS]


def verdict(finished: process.Finished) -> dict[str, object]:
    """{"status": "passed" | "found" | "failed" | "unfinished", "seconds", "text"} of a job that ended."""
    problems = re.search(r"^(\d+) problems$", finished.tail, re.MULTILINE)
    text = ""
    if finished.status is None:
        status = "unfinished"
    elif finished.status == 0 and problems is not None:
        status, text = "passed", problems[0]
    else:
        status = "found" if finished.status == FOUND else "failed"
        marked = [line for line in finished.tail.splitlines() if "=========" in line and line.strip("= ")]
        text = "\n".join(marked or finished.tail.splitlines()[-5:])[-3000:]
    return {"status": status, "seconds": round(finished.seconds, 1), "text": text}


def run(
    wanted: Sequence[Job], known: dict[str, dict[str, object]], output: Path, limit: float, workers: int,
    program: str | None, environment: Mapping[str, str],
) -> None:  # fmt: skip
    """Run jobs until the limit; `known` and the file of results get each verdict at once."""
    end = time.monotonic() + limit

    def one(job: Job) -> tuple[Job, process.Finished] | None:
        remaining = end - time.monotonic()
        if remaining < 5:
            return None
        log = output / f"{str(job).replace(' ', '-')}.log"
        log.unlink(missing_ok=True)
        command = job.command(program)
        return job, process.run(command, log=log, limit=remaining, environment=environment, folder=ROOT, grace=3)

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for future in concurrent.futures.as_completed([pool.submit(one, job) for job in wanted]):
            if (ended := future.result()) is not None:
                known[str(ended[0])] = verdict(ended[1])
                (output / RESULTS).write_text(json.dumps(known, indent=1) + "\n")


def lines(known: Mapping[str, Mapping[str, object]], wanted: Sequence[Job]) -> list[str]:
    """One line per job that has not passed, and one for the others."""
    passed = [name for name, one in known.items() if one["status"] == "passed"]
    found = [f"{len(passed)} of {len(wanted)} jobs passed: {', '.join(passed) or 'none'}"]
    for job in wanted:
        one = known.get(str(job), {"status": "not started", "text": ""})
        if one["status"] != "passed":
            found.append(f"  {job}: {one['status']} {str(one['text']).replace(chr(10), ' | ')}"[:300])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if all jobs passed, 1 if one found something, 75 if some are left."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.sanitize", description=summary(__doc__))
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="verdicts and logs")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--limit", type=float, default=450.0, metavar="SECONDS", help="default %(default)g")
    parser.add_argument("--workers", type=int, metavar="N", help="default: two fewer than cores, 14 at most")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    program = cubin.tool("compute-sanitizer") if args.device == "cuda" else None
    if program is None and args.device == "cuda":
        print("compute-sanitizer is neither on PATH nor in a toolkit", file=sys.stderr)
        return 2
    results = args.output / RESULTS
    known = json.loads(results.read_text()) if results.exists() else {}
    wanted = jobs(args.device)
    missing = [job for job in wanted if known.get(str(job), {}).get("status") not in ("passed", "found", "failed")]
    # An allocation of its own per tensor: what lies beyond one then belongs to nobody.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "EMU_OFF": "1", "OMP_NUM_THREADS": "1"}
    workers = args.workers or max(1, min(14, len(os.sched_getaffinity(0)) - 2))
    run(missing, known, args.output, args.limit, workers, None if program is None else str(program), environment)
    print("\n".join(lines(known, wanted)))
    statuses = [known.get(str(job), {}).get("status") for job in wanted]
    if any(status in ("found", "failed") for status in statuses):
        return 1
    return 0 if all(status == "passed" for status in statuses) else UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
