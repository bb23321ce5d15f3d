"""Runs the cases of tests.emulator.cases in a process that has one variant of the library:

python -m tests.emulator.run --variant tsan --seed 1 2 -k "conv train bf16"
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.emulator import build


def run(
    variant: build.Variant, library: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The cases, with arguments of their own, in a process of its own; what a sanitizer finds ends it."""
    own = {"EMU_LIBRARY": str(library), "OMP_NUM_THREADS": "1", **build.sanitizer_environment(variant)}
    command = [sys.executable, "-m", "tests.emulator.cases", *arguments]
    environment = {**os.environ, **own, **(environment or {})}
    done = subprocess.run(command, cwd=build.ROOT, env=environment, capture_output=True, text=True)
    done.stderr = build.with_lines(done.stderr, library)
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=build.VARIANTS, default="plain")
    options, arguments = parser.parse_known_args()
    chosen = build.VARIANTS[options.variant]
    result = run(chosen, build.library(chosen), *arguments)
    print(result.stdout + result.stderr, end="")
    sys.exit(result.returncode)
