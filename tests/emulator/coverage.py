"""Lines of csrc/cuda that the cases of tests.emulator.cases run, by gcov:

python -m tests.emulator.coverage
"""

from __future__ import annotations

import collections
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.emulator import build
from tests.emulator.run import run

Lines = dict[str, dict[int, int]]
"""{file: {line: how often it ran}}"""


def measure() -> Lines:
    """Over all instances of a template, in whatever file of kernels they are."""
    library = build.library(build.COVERAGE)
    counts: Lines = collections.defaultdict(dict)
    with tempfile.TemporaryDirectory() as scratch:
        for backend in ("cuda_emulator", "sm90_emulator"):
            done = run(build.COVERAGE, library, backend, "--seed", "0", "1", environment={"GCOV_PREFIX": scratch})
            if done.returncode not in (0, 2):  # 2: not available here
                raise RuntimeError(done.stdout + done.stderr)
        for data in Path(scratch).rglob("*.gcda"):
            shutil.copy(build.OUT / "objects" / data.with_suffix(".gcno").name, data.parent)
            gcov = ["gcov", "--json-format", "--stdout", str(data)]
            answer = subprocess.run(gcov, cwd=scratch, capture_output=True, text=True, check=True).stdout
            for file in json.loads(answer)["files"]:
                _, found, name = file["file"].rpartition("csrc/cuda/")
                if not found:
                    continue
                lines = counts[os.path.normpath(found + name)]
                for line in file["lines"]:
                    number = line["line_number"]
                    lines[number] = lines.get(number, 0) + line["count"]
    return dict(sorted(counts.items()))


def report(counts: Lines) -> tuple[float, str]:
    """(percent of all lines that ran, a row per file with the lines that never ran)."""
    rows, total, ran = [f"{'file':36} {'lines':>5} {'run':>5}  not run"], 0, 0
    for file, lines in counts.items():
        missed = sorted(number for number, count in lines.items() if count == 0)
        total, ran = total + len(lines), ran + len(lines) - len(missed)
        rows.append(f"{file:36} {len(lines):5} {len(lines) - len(missed):5}  {', '.join(map(str, missed))}")
    percent = 100 * ran / max(total, 1)
    return percent, "\n".join([*rows, f"{percent:.1f} % of {total} lines"])


if __name__ == "__main__":
    print(report(measure())[1])
