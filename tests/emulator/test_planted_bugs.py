"""Bugs that CUDA kernels have, planted one at a time into a copy of csrc/cuda: the emulator catches every one.

Caught by `numbers`, under one of a few schedules; by `asan` or `tsan`, with a line of the file; or by the `emulator`
with a message of its own.  Those that show in the numbers under any schedule are in tests/mutants.py.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

from tests.emulator import build
from tests.emulator.run import run

pytestmark = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))
QUICK = ("grid_barrier_of_some_blocks", "terms_read_before_they_are_there")

SEEDS = ("--seed", "1", "2", "3")
CONVOLUTION, FORWARD, BACKWARD = ("conv_bf16.cu",), ("bn_act_forward.cu",), ("bn_act_backward.cu",)


@dataclasses.dataclass(frozen=True)
class Bug:
    """A pattern in a file of csrc/cuda, what stands there instead, and the cases that run it."""

    file: str
    pattern: str
    replacement: str
    caught_by: str
    cases: str
    files: tuple[str, ...]
    """Kernels that include the file."""
    message: str = ""
    """The emulator's own, or in the sanitizer's report."""

    @property
    def variant(self) -> build.Variant:
        return {"asan": build.ASAN, "tsan": build.TSAN}.get(self.caught_by, build.PLAIN)

    def plant(self, folder: Path) -> Path:
        """The library with the bug, built from a copy of csrc in `folder`."""
        csrc = folder / "csrc"
        shutil.copytree(build.CSRC, csrc)
        path = csrc / "cuda" / self.file
        path.write_text(re.sub(self.pattern, self.replacement, path.read_text()))
        return build.library(self.variant, csrc, self.files)


WAIT = r"copy_async_wait<T::kStages - 2>\(\);"
BUGS = {
    "missing_barrier": Bug(
        "conv_tile.cuh", rf"({WAIT}[^\n]*\n\s*)__syncthreads\(\);", r"\1", "numbers", "conv eval bf16 64x64",
        CONVOLUTION,
    ),
    "missing_barrier_is_a_race": Bug(
        "conv_tile.cuh", rf"({WAIT}[^\n]*\n\s*)__syncthreads\(\);", r"\1", "tsan", "conv eval bf16 64x64", CONVOLUTION,
        "data race",
    ),
    "lax_wait": Bug(
        "conv_tile.cuh", WAIT, "copy_async_wait<T::kStages - 1>();", "numbers", "conv eval bf16 64x64", CONVOLUTION
    ),
    "line_beyond_the_padding": Bug(
        "conv_tile.cuh", r"\(y\[i\] \+ dy\) < static_cast<unsigned>", "(y[i] + dy) <= static_cast<unsigned>", "asan",
        "conv eval bf16 64x64", CONVOLUTION, "heap-buffer-overflow",
    ),
    "filter_beyond_the_last": Bug(
        "conv_tile.cuh", r"T::kRowsPerPass < conv\.group_filters", "T::kRowsPerPass <= conv.group_filters", "asan",
        "conv eval bf16 64x64", CONVOLUTION, "heap-buffer-overflow",
    ),
    "pixel_beyond_the_last": Bug(
        "conv_epilogue.cuh", r"row >= rows( \|\| inside\(channel\) <= 0 \|\| !own\(piece\)\) continue)",
        r"row > rows\1", "asan", "conv eval bf16 64x64", CONVOLUTION, "heap-buffer-overflow",
    ),
    "residual_not_waited_for": Bug(
        "conv_epilogue.cuh", r"copy_async_wait<0>\(\);", "", "numbers", "conv eval bf16 64x64", CONVOLUTION
    ),
    "terms_of_a_convolution_read_too_early": Bug(
        "conv_epilogue.cuh", r"__syncthreads\(\);", "", "numbers", "conv train bf16 64x64", CONVOLUTION
    ),
    "swizzle_off_by_a_bit": Bug(
        "conv_tile.cuh", r"\(row / 2 % 4\)\) << 4\)", "(row / 2 % 4)) << 3)", "emulator", "conv eval bf16 64x64",
        CONVOLUTION, "is not aligned to 16 bytes",
    ),
    "shuffle_of_half_a_warp": Bug(
        "conv_statistics.cuh", r"(step \*= 2\)) sum \+= __shfl", r"\1 if (lane < 16) sum += __shfl", "emulator",
        "conv train bf16 64x64", CONVOLUTION, "deadlock",
    ),
    "missing_grid_barrier": Bug(
        "conv_kernels.cuh", r"(Phase::both\) )cooperative_groups::this_grid\(\)\.sync\(\)(;\n  if)",
        r"\1__syncthreads()\2", "numbers", "conv train bf16 64x64", CONVOLUTION,
    ),
    "missing_grid_barrier_is_a_race": Bug(
        "reduce.cuh", r"cooperative_groups::this_grid\(\)\.sync\(\)", "__syncthreads()", "tsan",
        "bn_act_forward train bf16 vectors nhwc launches=1", FORWARD, "data race",
    ),
    "grid_barrier_of_some_blocks": Bug(
        "reduce.cuh", r"if \(parts > 1\) {", "if (parts > 1 && blockIdx.x > 0) {", "emulator",
        "bn_act_forward train bf16 vectors nhwc launches=1", FORWARD, "grid.sync()",
    ),
    "all_blocks_write_the_statistics": Bug(
        "bn_act_forward.cu", r"if \(share\.part == 0\) {", "{", "tsan",
        "bn_act_forward train bf16 vectors nhwc launches=1", FORWARD, "data race",
    ),
    "terms_read_before_they_are_there": Bug(
        "bn_act_forward.cu", r"__syncthreads\(\);(\s*normalise<T, N, false>)", r"\1", "numbers",
        "bn_act_forward eval bf16 vectors nhwc", FORWARD,
    ),
    "scratch_overwritten_too_early": Bug(
        "reduce.cuh", r"__syncthreads\(\);([^\n]*\n\s*if \(member >= half)", r"\1", "tsan",
        "bn_act_backward train bf16 vectors nhwc launches=1", BACKWARD, "data race",
    ),
}  # fmt: skip


def test_every_bug_has_its_place() -> None:
    for name, bug in BUGS.items():
        found = re.findall(bug.pattern, (build.CSRC / "cuda" / bug.file).read_text())
        assert len(found) == 1, f"{name}: look for its new place in {bug.file}"


@pytest.mark.parametrize("bug", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in BUGS])
def test_is_caught(bug: str, tmp_path: Path) -> None:
    planted = BUGS[bug]
    done = run(planted.variant, planted.plant(tmp_path), *SEEDS, "-k", planted.cases)
    assert done.returncode != 0, "nobody noticed"
    if planted.caught_by in ("asan", "tsan"):
        assert planted.message in done.stderr
        assert planted.file in done.stderr
    elif planted.caught_by == "emulator":
        assert planted.message in done.stdout
        assert f"csrc/cuda/{planted.files[0]}" in done.stdout or f"csrc/cuda/{planted.file}" in done.stdout
    else:
        failures = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        assert failures
        assert all(re.search(r"\): \w+: \S+ of \S+, \d+ elements", line) for line in failures), failures
