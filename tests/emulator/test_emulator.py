"""The emulator itself: it keeps the promises of CUDA, and mistakes are reported with the line of the kernel.

It runs the small kernels of tests/emulator/probes.cu.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.emulator import backend, build

pytestmark = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))

OUTPUTS = 256


@cache
def library(variant: build.Variant = build.PLAIN) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(build.probes(variant)))
    loaded.probe.restype = ctypes.c_char_p
    return loaded


def probe(name: str, seed: int = 0, variant: build.Variant = build.PLAIN) -> tuple[str, list[float]]:
    """The error of a kernel ("" if none) and the values that it wrote over zeros."""
    out = (ctypes.c_float * (OUTPUTS + 4))(*[0.0] * OUTPUTS, *[1.0] * 4)
    library(variant).emulator_configure(seed, backend.RESIDENT_BLOCKS, True)
    message = library(variant).probe(name.encode(), out, (ctypes.c_uint * 2)())
    return (message or b"").decode(), list(out)[:OUTPUTS]


def line_of(text: str) -> int:
    """The number of the one line of probes.cu that has this text."""
    lines = [number for number, line in enumerate(PROBES.read_text().splitlines(), 1) if text in line]
    assert len(lines) == 1, text
    return lines[0]


PROBES = Path(build.HERE, "probes.cu")


@pytest.mark.parametrize(
    ("name", "message", "line"),
    [
        ("divergent_warp", "divergent warp: lanes 0 and 16 wait in different operations", "(__syncwarp(), value)"),
        ("deadlock", "deadlock: of 32 threads 32 wait, 16 of them in __syncthreads", "threadIdx.x < 16 ? __syncwarp()"),
        ("two_barriers", "other threads of the block wait at another one, tests/emulator/probes.cu:", None),
        ("lane_not_in_mask", "lane 16 is not in its own mask", "void lane_not_in_mask"),
        ("misaligned_vector", "which is not aligned to 16 bytes", "reinterpret_cast<const float4*>(shared + 4)"),
        ("misaligned_copy", "is not aligned to 16 bytes", "emu::cp_async(shared + 16 * threadIdx.x, out + 1, 16, 16)"),
        ("copy_beyond_shared", "is not in shared memory", "emu::cp_async(shared + 1024, out, 16, 16)"),
        ("index_beyond_array", "index 32 in 'float [32]'", "out[threadIdx.x] = values[threadIdx.x + 1];"),
        ("half_of_a_warp_multiplies", "mma: only lanes 0000ffff", None),
        ("grid_barrier_without_cooperation", "not launched cooperatively", "if (blockIdx.x != 1)"),
        ("some_blocks_skip_the_grid_barrier", "is reached by 2 of 3 blocks", "launch(kernel, dim3(blocks)"),
        (
            "too_many_blocks_to_cooperate",
            "grid of 5 blocks, of which only 4 can be resident",
            "launch(kernel, dim3(blocks)",
        ),
        ("too_many_threads", "a block of 1056 threads", None),
        ("too_much_shared_memory", "233472 bytes of shared memory, a block has at most 232448", None),
        ("no_blocks", "a grid of 0 x 1 x 1", None),
        ("mbarrier_without_init", "no mbarrier.init of shared memory 0", "void mbarrier_without_init"),
        ("one_arrival_too_many", "more arrivals than its count of 31", None),
        ("wait_two_phases_behind", "waits for phase 0, but phase 1 is over", "emu::mbarrier_wait(0, 0);"),
        ("bytes_that_never_come", "the block ends, and 16 bytes are missing", None),
        ("barrier_of_other_size", "barrier 1: of 96 threads here, of 64 elsewhere", "void barrier_of_other_size"),
        ("wgmma_without_fence", "no wgmma.fence since accumulators were accessed", None),
        ("wgmma_without_proxy_fence", "written without a fence.proxy.async since", None),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_mistakes(name: str, message: str, line: str | None, seed: int) -> None:
    found, _ = probe(name, seed)
    if seed == 0:
        assert message in found
    assert found.startswith("emulator: ")
    if line:
        assert f"tests/emulator/probes.cu:{line_of(line)}" in found


FEATURES = {
    "shared_memory_starts_as_nan": 192,
    "shared_memory_is_the_blocks_own": 256,
    "atomics": 64,
    "votes_and_shuffles": 128,
    "threads_that_returned_do_not_block": 128,
    "copies_arrive_when_waited_for": 64,
    "mma_bf16": 32,
    "mma_f16": 32,
    "mma_f16_transposed": 32,
    "mma_tf32": 32,
    "wgmma_bf16": 128,
    "wgmma_f16": 128,
    "wgmma_tf32": 128,
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str, seed: int) -> None:
    message, out = probe(name, seed)
    assert not message
    assert out == [1.0] * FEATURES[name] + [0.0] * (OUTPUTS - FEATURES[name])


def test_a_seed_is_one_schedule() -> None:
    def order(seed: int) -> list[float]:
        return probe("order_of_warps", seed)[1][:8]

    assert order(0) == [0, 1, 2, 3, 4, 5, 6, 7]
    orders = [order(seed) for seed in range(1, 6)]
    assert all(sorted(found) == order(0) for found in orders)
    assert len({tuple(found) for found in orders}) > 3
    assert orders == [order(seed) for seed in range(1, 6)]


def test_bank_conflicts_of_ldmatrix() -> None:
    def cycles(name: str) -> tuple[int, int]:
        before, after = (ctypes.c_long * 5)(), (ctypes.c_long * 5)()
        library().emulator_statistics(before)
        probe(name)
        library().emulator_statistics(after)
        return after[2] - before[2], after[3] - before[3]

    assert cycles("mma_f16_transposed") == (6, 4 * 2 + 2)  # a's rows of 32 bytes: two at a time in one group of banks
    assert cycles("matrix_rows_with_bank_conflicts") == (1, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "variant", "report"),
    [
        (["write_beyond_shared"], build.ASAN, "heap-buffer-overflow"),
        (["misaligned_vector"], build.ASAN, "misaligned address"),
        (["missing_syncwarp"], build.TSAN, "data race"),
        (["blocks_write_one_address"], build.TSAN, "data race"),
        (list(FEATURES), build.ASAN, None),
        (list(FEATURES), build.TSAN, None),
    ],
)
def test_sanitizers(names: list[str], variant: build.Variant, report: str | None) -> None:
    """They see the accesses of each CUDA thread, and report nothing in correct kernels."""
    path = build.probes(variant)
    code = f"""
import ctypes
loaded = ctypes.CDLL({str(path)!r})
loaded.probe.restype = ctypes.c_char_p
loaded.emulator_configure(1, 4, True)
for name in {names!r}:
    message = loaded.probe(name.encode(), (ctypes.c_float * 260)(*[0.0] * 256, *[1.0] * 4), (ctypes.c_uint * 2)())
    assert message is None, message
"""
    environment = os.environ | build.sanitizer_environment(variant)
    done = subprocess.run([sys.executable, "-S", "-c", code], env=environment, capture_output=True, text=True)
    if report is None:
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode != 0
        assert report in done.stderr
        assert "probes.cu:" in build.with_lines(done.stderr, path)
