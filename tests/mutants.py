"""Mistakes planted one at a time, each of which the default tier must notice.

python -m tests.mutants                      # all of them, as a table; exits with 1 if one is missed
python -m tests.mutants --only stale,17      # those whose name contains a text, or with a number
python -m tests.mutants --list

Each runs in a copy of the tree, so that the checkout stays as it is, and is tested by the part of the suite that is
expected to notice.  A change of csrc/cpu is compiled there; csrc/cuda is executed by tests/emulator, which compiles what
has changed.  Before all, the tests in question must pass without any mistake.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.needs import ROOT


class Mutant(NamedTuple):
    """`old`, which `file` has once, replaced by `new`; `tests` are arguments of pytest."""

    name: str
    file: str
    old: str
    new: str
    tests: str

    def plant(self, tree: Path) -> None:
        path = tree / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.file} has {text.count(self.old)} times: {self.old!r}")
        path.write_text(text.replace(self.old, self.new))


MUTANTS = (
MUTANTS_HERE
)


def copied(folder: Path) -> Path:
    """A copy of the working tree, with the libraries that were built in it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    built = [str(path.relative_to(ROOT)) for path in (ROOT / "resfuse").glob("_*.abi3.so")]
    for name in [*filter(None, listed.split("\0")), *built, "resfuse/_build_info.json"]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (ROOT / "build" / "emulator").mkdir(parents=True, exist_ok=True)
    (folder / "build").mkdir()
    (folder / "build" / "emulator").symlink_to(ROOT / "build" / "emulator")  # objects, named by their contents
    return folder


def run(tree: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(tree), "RESFUSE_SKIP_CUDA_BUILD": "1"}
    return subprocess.run([sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True)


def pytest(tree: Path, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return run(tree, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests)


def outcome(mutant: Mutant) -> tuple[str, str]:
    """("caught", "missed" or "error", the end of the output)."""
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(Path(folder))
        mutant.plant(tree)
        if mutant.file.startswith("csrc/") and "cuda" not in mutant.file:
            built = run(tree, "setup.py", "-q", "build_ext", "--inplace")
            if built.returncode:
                return "error", built.stdout + built.stderr
        done = pytest(tree, mutant.tests.split())
    return {0: "missed", 1: "caught"}.get(done.returncode, "error"), done.stdout + done.stderr


def chosen(only: str) -> list[tuple[int, Mutant]]:
    numbered = list(enumerate(MUTANTS, 1))
    wanted = [text for text in only.split(",") if text]
    return [
        (number, mutant)
        for number, mutant in numbered
        if not wanted or any(text == str(number) or (not text.isdigit() and text in mutant.name) for text in wanted)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="NAME,...", help="numbers, or parts of names")
    parser.add_argument("--list", action="store_true", help="show them and run nothing")
    parser.add_argument("--trust", action="store_true", help="do not run the tests without a mistake first")
    arguments = parser.parse_args()
    mutants = chosen(arguments.only)
    if arguments.list or not mutants:
        for number, mutant in mutants:
            print(f"{number:3} {mutant.name:44} {mutant.file}")
        return int(not mutants)
    if not arguments.trust:
        with tempfile.TemporaryDirectory() as folder:
            done = pytest(copied(Path(folder)), sorted({test for _, m in mutants for test in m.tests.split()}))
        if done.returncode:
            print(done.stdout[-4000:] + done.stderr[-2000:])
            print("The tests fail without any mistake.")
            return 2
    missed = 0
    print(f"{'':3} {'mistake':44} {'file':36} {'outcome':8} {'s':>5}")
    for number, mutant in mutants:
        begin = time.perf_counter()
        word, output = outcome(mutant)
        missed += word != "caught"
        print(f"{number:3} {mutant.name:44} {mutant.file:36} {word:8} {time.perf_counter() - begin:5.0f}", flush=True)
        if word == "error":
            print(output[-3000:])
    print(f"{len(mutants) - missed} of {len(mutants)} caught")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
