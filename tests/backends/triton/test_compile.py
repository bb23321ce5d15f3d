"""The Triton kernels, compiled for GPUs that are not here: registers, shared memory and instructions.

For sm_90 in bfloat16 one layer is compiled of every configuration that the heuristics choose for ResNet-18, ResNet-50
and CIFAR ResNets at all batch sizes; for other targets and dtypes, of every configuration of ResNet-50's convolutions
at batch size 32.  With RESFUSE_TEST_ALL_KERNELS=1 all kernels of all layers are, for hours.  Results are kept between
runs by the hash of the source.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("rich") is None, reason="rich is not installed: it prints the tables"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed"),
]

ROOT = Path(__file__).resolve().parent.parent
GRADIENTS = ("dgrad_kernel", "wgrad_kernel")
CONVOLUTIONS = ("conv_bn_act_kernel", "conv_bn_act_train_kernel", *GRADIENTS)
CONVOLUTION_KINDS = ("--kind", "forward", "train", "dgrad", "wgrad")
SHARED_MEMORY = {"80": 166912, "90": 232448, "100": 232448}
"""Bytes that a program can have: A100, H100, B200."""
MMA = {"80": "mma.sync", "90": "wgmma.mma_async", "100": "tcgen05.mma"}
SPILL = {"80": 16, "90": 16, "100": 512}
"""Bytes of stack per thread, at most.  On sm_100 main loops need few registers, for their sums are in tensor memory;
what spills is the epilogue, which takes all of them at once."""
SPILL_OF_TABLES = 32
"""On sm_80 and sm_90, of what only a table can choose: it has been measured then, spills and all."""

for_hours = pytest.mark.skipif(
    "RESFUSE_TEST_ALL_KERNELS" not in os.environ, reason="RESFUSE_TEST_ALL_KERNELS=1 runs it"
)

QUICK = {
    "sm_90 bfloat16": ("--arch", "90"),
    "sm_80 and sm_100": ("--arch", "80", "100", *CONVOLUTION_KINDS, "--model", "resnet50", "--batch", "32"),
    "other dtypes": (
        "--arch", "80", "90", "--dtype", "float16", "float32", "tf32",
        *CONVOLUTION_KINDS, "--model", "resnet50", "--batch", "32",
    ),
}  # fmt: skip


def compiled(arguments: Sequence[str], folder: Path) -> list[dict[str, str]]:
    """The rows of benchmarks.triton_resources, which needs a process in which Triton does not interpret."""
    from benchmarks.triton_resources import read

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.triton_resources", "--output", str(folder / "rows.csv"), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return read(folder / "rows.csv")


def channels(row: dict[str, str]) -> tuple[int, int]:
    """(C, K) of "forward 32x56x56x64 > 256, 1x1 bfloat16"."""
    shape, _, rest = row["layer"].partition(" > ")
    return int(shape.rpartition("x")[2]), int(rest.partition(",")[0])


def smallest_tile(row: dict[str, str]) -> int:
    """Elements of the smaller operand in a step of the main loop."""
    block_m, block_n, block_k = map(int, row["tile"].split("x")[:3])
    return min(block_m, block_n) * block_k


def shown(row: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.items() if value not in ("", "0", "False"))


def objections(row: dict[str, str], spill: int) -> list[str]:
    """What is wrong with a compiled kernel that may spill so many bytes."""
    found = []
    shared, limit = int(row["shared"]), SHARED_MEMORY[row["capability"]]
    if int(row["spill"]) > spill:
        found.append(f"spills {row['spill']} bytes")
    if shared > limit:
        found.append(f"{shared} bytes of shared memory, of {limit}")
    if row["kernel"] in CONVOLUTIONS:
        if shared > int(row["shared_bound"]):
            found.append(f"{shared} bytes of shared memory, not the {row['shared_bound']} that heuristics take it for")
        if row["dtype"] in ("bf16", "fp16") and row["mma"] != MMA[row["capability"]]:
            found.append(f"multiplies by {row['mma'] or 'no tensor core'}")
        if row["dtype"] == "tf32" and not row["mma"]:
            found.append("multiplies by no tensor core")
        if all(count % 8 == 0 for count in channels(row)):
            # wgmma takes TF32 operands by their inner dimension only: gradients transpose theirs, 4 bytes at a time.
            transposed = (row["dtype"], row["capability"]) == ("tf32", "90") and row["kernel"] in GRADIENTS
            if int(row["vector_stores"]) == 0 or (int(row["vector_loads"]) == 0 and not transposed):
                found.append("has no accesses of 16 bytes")
            excused = transposed or "PERSISTENT" in row["flags"]  # whose loop has the vectors over channels as well
            if int(row["narrow_copies"]) > 0 and not excused and smallest_tile(row) >= 8 * 32 * int(row["warps"]):
                found.append(f"{row['narrow_copies']} copies of fewer than 16 bytes")
    return found


def check(rows: list[dict[str, str]], spill: Mapping[str, int] = SPILL) -> None:
    found = [(row, objections(row, spill[row["capability"]])) for row in rows]
    wrong = [f"{'; '.join(faults)}: {shown(row)}" for row, faults in found if faults]
    assert not wrong, f"{len(wrong)} of {len(rows)} kernels\n" + "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_one_layer_of_every_configuration(name: str, tmp_path: Path) -> None:
    rows = compiled(["--quick", *QUICK[name]], tmp_path)
    assert {row["kernel"] for row in rows} >= set(CONVOLUTIONS)
    check(rows)


@for_hours
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "tf32"])
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_every_kernel_of_every_layer(arch: str, dtype: str, tmp_path: Path) -> None:
    check(compiled(["--arch", arch, "--dtype", dtype], tmp_path))


@for_hours
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90"])
def test_every_configuration_that_a_table_may_choose(arch: str, tmp_path: Path) -> None:
    check(
        compiled(["--quick", "--tables", "--arch", arch, "--batch", "32", *CONVOLUTION_KINDS], tmp_path),
        {arch: SPILL_OF_TABLES},
    )


def test_nothing_is_compiled_where_triton_interprets(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.triton_resources", "--output", str(tmp_path / "rows.csv")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr
    assert not (tmp_path / "rows.csv").exists()
