"""Runs the cases of tests.emulator.cases in a process that has one variant of the library:

python -m tests.emulator.run --variant tsan --seed 1 --seed 2 -k "conv train bf16"
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.emulator import build


def run(
    variant: build.Variant,
    library: Path,
    seeds: Sequence[int],
    match: str = "",
    verbose: bool = False,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """The cases whose name has `match` in it, in a process of its own; what a sanitizer finds ends it."""
    own = {"EMU_LIBRARY": str(library), "OMP_NUM_THREADS": "1", **build.sanitizer_environment(variant)}
    arguments = [f"--seed={seed}" for seed in seeds] + ["-k", match, *["-v"] * verbose]
    command = [sys.executable, "-m", "tests.emulator.run", "--in-this-process", *arguments]
    environment = {**os.environ, **own, **(environment or {})}
    done = subprocess.run(command, cwd=build.ROOT, env=environment, capture_output=True, text=True)
    done.stderr = build.with_lines(done.stderr, library)
    return done


def _run_here(seeds: Sequence[int], match: str, verbose: bool) -> int:
    import torch

    from tests.emulator import backend, cases

    torch.set_num_threads(1)
    assert backend.unavailable_reason() is None
    failed = ran = 0
    start = time.perf_counter()
    for seed in seeds:
        for name, case in cases.cases():
            if match not in name:
                continue
            ran += 1
            begin = time.perf_counter()
            try:
                with backend.device(seed=seed):
                    case()
            except (AssertionError, RuntimeError) as error:
                failed += 1
                print(f"FAILED {name} (seed {seed}): {error}", flush=True)
            if verbose:
                print(f"{time.perf_counter() - begin:6.2f} s  {name} (seed {seed})", flush=True)
    print(f"{ran} cases, {failed} failed, {time.perf_counter() - start:.1f} s")
    return int(failed > 0 or ran == 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=build.VARIANTS, default="plain")
    parser.add_argument("--seed", type=int, action="append", help="0 runs all in order (repeatable)")
    parser.add_argument("-k", dest="match", default="", help="only cases with this in their name")
    parser.add_argument("-v", dest="verbose", action="store_true", help="how long each took")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    seeds = arguments.seed or [0]
    if arguments.in_this_process:
        return _run_here(seeds, arguments.match, arguments.verbose)
    variant = build.VARIANTS[arguments.variant]
    done = run(variant, build.library(variant), seeds, arguments.match, arguments.verbose)
    print(done.stdout + done.stderr, end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
