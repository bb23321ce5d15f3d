"""Bugs that CUDA kernels have, planted one at a time into a copy of csrc/cuda, or of the headers of CUTLASS that it
includes: the emulator catches every one.

Caught by `numbers`, under one of a few schedules; by `asan` or `tsan`, with a line of the file; or by the `emulator`
with a message of its own.  Those that show in the numbers under any schedule are in tests/mutants.py.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from pathlib import Path

import pytest

from resfuse import _build
from tests.emulator import build
from tests.emulator.run import run

pytestmark = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))
QUICK = ("grid_barrier_of_some_blocks", "terms_read_before_they_are_there", "slot_released_early")

SEEDS = ("--seed", "1", "2", "3")
CONVOLUTION, FORWARD, BACKWARD = ("conv_bf16.cu",), ("bn_act_forward.cu",), ("bn_act_backward.cu",)
SM90, SM90_TF32 = ("sm90/conv_bf16.cu",), ("sm90/conv_tf32.cu",)


@dataclasses.dataclass(frozen=True)
class Bug:
    """A pattern in a file of csrc/cuda or of CUTLASS, what stands there instead, and the cases that run it."""

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

    @property
    def is_sm90(self) -> bool:
        return self.files in (SM90, SM90_TF32)

    @property
    def original(self) -> Path:
        cutlass = _build.find_cutlass(sys.path)
        return (
            cutlass / "include" / self.file if cutlass and "cutlass/" in self.file else build.CSRC / "cuda" / self.file
        )

    def plant(self, folder: Path) -> Path:
        """The library with the bug, built from a copy of csrc in `folder`."""
        csrc = folder / "csrc"
        shutil.copytree(build.CSRC, csrc)
        if self.is_sm90:  # one tile, which compiles in a third of the time
            _edit(csrc / "cuda" / "sm90" / "conv_launch.cuh", r"case (128|256):\n.*\n", "")
        if self.file.startswith("cutlass/"):
            edits = ((self.file, self.pattern, self.replacement),)
            return build.library(self.variant, csrc, self.files, edits)
        _edit(csrc / "cuda" / self.file, self.pattern, self.replacement)
        return build.library(self.variant, csrc, self.files)


def _edit(path: Path, pattern: str, replacement: str) -> None:
    path.write_text(re.sub(pattern, replacement, path.read_text()))


MAINLOOP = "cutlass/conv/collective/sm90_implicit_gemm_gmma_ss_warpspecialized.hpp"
EPILOGUE = "cutlass/epilogue/collective/sm90_epilogue_tma_warpspecialized.hpp"
PIPELINE = "cutlass/pipeline/sm90_pipeline.hpp"
KERNEL = "sm90/conv_kernel.cuh"


def sm90_bug(file: str, pattern: str, replacement: str, caught_by: str = "numbers", message: str = "") -> Bug:
    return Bug(file, pattern, replacement, caught_by, "eval bf16 128x64 3x3", SM90, message)


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
    "missing_wgmma_wait": sm90_bug(MAINLOOP, r"warpgroup_wait<0>\(\);", "", "emulator", "ends before it has waited"),
    "lax_wgmma_wait": sm90_bug(MAINLOOP, r"warpgroup_wait<K_PIPE_MMAS>\(\);", "warpgroup_wait<K_PIPE_MMAS + 1>();"),
    "slot_released_early": sm90_bug(
        MAINLOOP, r"(?s)(warpgroup_wait<K_PIPE_MMAS>\(\);)(.*?)(pipeline\.consumer_release\(smem_pipe_release\);)",
        r"\3\2\1",
    ),
    "missing_wgmma_fence": sm90_bug(
        MAINLOOP, r"(smem_pipe_consumer_state\.index\(\);\n\s*)warpgroup_arrive\(\);", r"\1", "emulator",
        "no wgmma.fence",
    ),
    "missing_proxy_fence": sm90_bug(
        EPILOGUE, r"cutlass::arch::fence_view_async_shared\(\); // ensure", "//", "emulator",
        "without a fence.proxy.async",
    ),
    "missing_store_wait": sm90_bug(PIPELINE, r"tma_store_wait<UnacquiredStages>\(\);", ""),
    "missing_last_store_wait": sm90_bug(
        KERNEL, r"epilogue\.store_tail\([^;]*;", "", "emulator", "before its stores have read shared memory"
    ),
    "wrong_parity": sm90_bug(
        KERNEL, r"typename Mainloop::PipelineState state;",
        "auto state = cutlass::make_producer_start_state<MainPipe>();", "emulator", "mbarrier: waits for phase -1",
    ),
    "too_few_arrivals": sm90_bug(
        KERNEL, r"p\.num_consumers = kConsumers", r"\g<0> * 2", "emulator", "waits for an mbarrier"
    ),
    "too_many_arrivals": sm90_bug(KERNEL, r"p\.num_consumers = kConsumers", r"\g<0> / 2", "emulator", "mbarrier: "),
    "wrong_transaction_bytes": sm90_bug(
        KERNEL, r"params\.mainloop\.tma_transaction_bytes", r"\g<0> / 2", "emulator", "bytes more than were expected"
    ),
    "too_many_registers": sm90_bug(
        KERNEL, r"warpgroup_reg_alloc<232>", "warpgroup_reg_alloc<240>", "emulator", "waits for registers"
    ),
    "strided_pixels_as_a_matrix": Bug(
        KERNEL, r"conv\.stride_h \* conv\.stride_w == 1 &&", "", "numbers", "eval bf16 128x64 1x1 stride 2", SM90
    ),
    "steps_of_the_wrong_type": Bug(
        KERNEL, r"\(conv\.channels \+ kTileK - 1\) / kTileK", "(conv.channels + 63) / 64", "numbers",
        "eval tf32 128x64 3x3", SM90_TF32,
    ),
    "scale_read_too_early": sm90_bug(
        "sm90/bn_act_epilogue.cuh", r"(begin_sync_needed\(\) const { return) true", r"\1 false"
    ),
}  # fmt: skip


def test_every_bug_has_its_place() -> None:
    for name, bug in BUGS.items():
        if bug.is_sm90 and build.sm90_unavailable_reason():
            continue
        found = re.findall(bug.pattern, bug.original.read_text())
        assert len(found) == 1, f"{name}: look for its new place in {bug.file}"


@pytest.mark.parametrize("bug", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in BUGS])
def test_is_caught(bug: str, tmp_path: Path) -> None:
    planted = BUGS[bug]
    if planted.is_sm90 and build.sm90_unavailable_reason():
        pytest.skip(str(build.sm90_unavailable_reason()))
    backend = "sm90_emulator" if planted.is_sm90 else "cuda_emulator"
    done = run(planted.variant, planted.plant(tmp_path), backend, *SEEDS, "-k", planted.cases)
    assert done.returncode != 0, "nobody noticed"
    if planted.caught_by in ("asan", "tsan"):
        assert planted.message in done.stderr
        assert planted.file in done.stderr
    elif planted.caught_by == "emulator":
        assert planted.message in done.stdout
        if not planted.is_sm90:  # where CUTLASS's lines, or the end of a thread, are to blame
            assert f"csrc/cuda/{planted.files[0]}" in done.stdout or f"csrc/cuda/{planted.file}" in done.stdout
    else:
        failures = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        assert failures
        assert all(re.search(r"\): \w+: \S+ of \S+, \d+ elements", line) for line in failures), failures
