"""The Triton kernels, compiled for GPUs that are not here: front end, registers, shared memory and instructions.

For sm_90 in bfloat16 one layer is compiled of every configuration that the heuristics choose for ResNet-18, ResNet-50
and CIFAR ResNets at all batch sizes; for other targets and dtypes, of every configuration of ResNet-50's convolutions
at batch size 32.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[3]
CONVOLUTIONS = ("conv_bn_act_kernel", "conv_bn_act_train_kernel")
PADDING = "pad_channels_kernel"
POINTWISE = (
    "add_relu_forward_kernel", "add_relu_backward_kernel", "bn_statistics_kernel", "bn_train_forward_kernel",
    "bn_apply_kernel", "bn_backward_kernel", "bn_backward_apply_kernel",
)  # fmt: skip
SHARED_MEMORY = {"80": 166912, "90": 232448, "100": 232448}
"""Bytes that a program can have: A100, H100, B200."""
MMA = {"80": "mma.sync", "90": "wgmma.mma_async", "100": "tcgen05.mma"}
SPILL = {"80": 16, "90": 16, "100": 512}
"""Bytes of stack per thread, at most.  On sm_100 main loops need few registers, for their sums are in tensor memory;
the epilogue spills, which takes all of them at once."""

SPILL_OF_SEVERAL_TILES = 32
"""In training, where a program merges the statistics of several tiles: 128x128 with 8 warps needs it on sm_90."""

NARROW_LOADS = 16
"""Of fewer than 16 bytes, at most: of four vectors over the channels, which could be loaded again for every row."""

LAYERS = ("--network", "resnet50", "--batch", "32")


def run(module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a module in a process in which Triton does not interpret, unless the environment says so."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True)


def compiled(folder: Path, *arguments: str) -> list[dict[str, str]]:
    done = run("tools.kernel_resources", "triton", "--output", str(folder / "rows.csv"), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    with (folder / "rows.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def channels(row: dict[str, str]) -> tuple[int, int]:
    """(C, K) of "forward 32x56x56x64 > 256, 1x1 bfloat16"."""
    shape, _, rest = row["layer"].partition(" > ")
    return int(shape.rpartition("x")[2]), int(rest.partition(",")[0])


def objections(row: dict[str, str]) -> list[str]:
    """The faults of a compiled kernel."""
    found = []
    shared, limit = int(row["shared"]), SHARED_MEMORY[row["arch"]]
    several_tiles = row["kernel"] == "conv_bn_act_train_kernel" and "IN_REGISTERS" not in row["flags"]
    if int(row["spill"]) > max(SPILL[row["arch"]], SPILL_OF_SEVERAL_TILES if several_tiles else 0):
        found.append(f"spills {row['spill']} bytes")
    if shared > limit:
        found.append(f"{shared} bytes of shared memory, of {limit}")
    if row["kernel"] in CONVOLUTIONS:
        if shared > int(row["shared_bound"]):
            found.append(f"{shared} bytes of shared memory, but heuristics assume at most {row['shared_bound']}")
        if row["dtype"] in ("bf16", "fp16") and row["mma"] != MMA[row["arch"]]:
            found.append(f"multiplies by {row['mma'] or 'no tensor core'}")
        if row["dtype"] == "tf32" and not row["mma"]:
            found.append("multiplies by no tensor core")
        if all(count % 8 == 0 for count in channels(row)):
            if int(row["vector_stores"]) == 0 or int(row["vector_loads"]) == 0:
                found.append("has no accesses of 16 bytes")
            if int(row["narrow_loads"]) > NARROW_LOADS:
                found.append(f"{row['narrow_loads']} loads of fewer than 16 bytes")
            block_m, block_n, block_k = map(int, row["variant"].split("x"))
            enough = min(block_m, block_n) * block_k >= 8 * 32 * int(row["warps"])  # for 16 bytes per thread
            excused = "persistent" in row["flags"]  # whose loop has the vectors over channels as well
            if int(row["narrow_copies"]) > 0 and enough and not excused:
                found.append(f"{row['narrow_copies']} copies of fewer than 16 bytes")
    return found


def check(rows: list[dict[str, str]]) -> None:
    wrong = [f"{'; '.join(faults)}: {row}" for row in rows if (faults := objections(row))]
    assert not wrong, f"{len(wrong)} of {len(rows)} kernels\n" + "\n".join(wrong)


def test_shapes_with_ones_pass_the_front_end() -> None:
    done = run("tests.backends.triton.front_end")
    assert done.returncode == 0, done.stderr
    count, *names = done.stdout.split()
    assert int(count) > 30 and set(names) == {*CONVOLUTIONS, PADDING, *POINTWISE}


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("--arch", "90"),
        ("--convolutions", "--arch", "80", "100", *LAYERS),
        ("--convolutions", "--arch", "80", "90", "--dtype", "float16", "float32", "tf32", *LAYERS),
    ],
    ids=["sm_90 bfloat16", "sm_80 and sm_100", "other dtypes"],
)  # fmt: skip
def test_one_layer_of_every_configuration(arguments: tuple[str, ...], tmp_path: Path) -> None:
    rows = compiled(tmp_path, "--quick", *arguments)
    pointwise = () if "--convolutions" in arguments else POINTWISE
    assert {row["kernel"] for row in rows} == {*CONVOLUTIONS, PADDING, *pointwise}
    check(rows)


@pytest.mark.slow
def test_a_padded_stem_is_copied_asynchronously() -> None:
    """All of its main loop, 8 bytes at a time (16 of float32): three channels would be loaded one by one."""
    done = run("tests.backends.triton.stem")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert {(arch, kernel) for arch, _, kernel, *_ in rows} == {
        (arch, kernel) for arch in ("80", "90") for kernel in (*CONVOLUTIONS, PADDING)
    }
    for _, dtype, kernel, copy, load in rows:
        if kernel != PADDING:
            assert (copy, load) == ("16" if dtype == "torch.float32" else "8", "16")


def test_nothing_is_compiled_where_triton_interprets(tmp_path: Path) -> None:
    output = tmp_path / "rows.csv"
    done = run("tools.kernel_resources", "triton", "--output", str(output), TRITON_INTERPRET="1")
    assert done.returncode == 2 and "TRITON_INTERPRET is set" in done.stderr
    assert not output.exists()
