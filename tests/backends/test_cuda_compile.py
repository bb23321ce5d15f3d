"""The CUDA kernels as nvcc compiled them for the installed libraries: registers, shared memory, occupancy, SASS.

Nothing is compiled but a few lines that print sizes, and nothing runs: this needs neither a GPU nor another build.
`python -m tools.kernel_resources cuda`, `sm90` and `sm100` show the same figures as tables.
"""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from resfuse import _build, _extension
from resfuse.backends import sm90, sm100
from tools import cubin, kernel_resources
from tools.kernel_resources import CONVOLUTIONS, DEVICES, Row

SMALLEST_SHARED_MEMORY = 101376
"""Bytes that a block can have on 8.6 and 8.9, the least of all GPUs from 8.0 on: each convolution's tile fits."""
FEWEST_WARPS = 25.0
"""Static occupancy, at least, in percent, of kernels that are bound by memory: threads have many bytes under way."""
MOST_LOADS_AFTER_STORES = {"conv_inference_kernel": 2, "conv_training_kernel": 7}
"""An epilogue loads all that it needs, or half of that, before it stores: in training also z and running statistics."""
COPIES_OF_EPILOGUE = {"conv_inference_kernel": 1, "conv_training_kernel": 3}
"""Asynchronous copies of the residual and z, at most; twice as many of 32-bit elements."""
LEAST_LOADS_AT_ONCE = {
    "conv_training_kernel": 16, "bn_statistics_kernel": 7, "bn_train_forward_kernel": 7, "bn_backward_kernel": 7
}  # fmt: skip
"""Of the parts of a reduction, of which there are hundreds: one by one, each takes its time from L2."""

pytestmark = pytest.mark.slow  # disassembling takes a minute


def skip_unless_built(library: str) -> None:
    reason = _extension.load(library) or kernel_resources.missing()
    if reason is None and _extension.build_info().get("debug"):
        reason = "the library was built with DEBUG=1"
    if reason is not None:
        if library == "_cuda" and _build.flag_set(os.environ, "FORCE_CUDA"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    skip_unless_built("_cuda")
    info, found = _extension.build_info(), kernel_resources.cuda_rows()
    if info.get("arch_list") == _build.DEFAULT_ARCH_LIST:
        assert {row["arch"] for row in found} == {80, 90}
    elif not found:
        pytest.skip(f"the library was built for {info.get('arch_list')} only")
    return found


def parameters(row: Row) -> list[str]:
    """["Bf16", "Tile<128,64,2,2,3>", "0"] of "<Bf16,Tile<128,64,2,2,3>,0>"; 0: vectors are copied, 2: values."""
    return re.findall(r"(?:[^,<>]|<[^<>]*>)+", row["variant"][1:-1])


def is_vectorised(row: Row) -> bool:
    """Whether the variant is for accesses of 16 bytes, several elements at a time."""
    last = parameters(row)[-1]
    if row["kernel"] == "pad_channels_kernel":  # it loads elements of any strides
        return False
    return last == "0" if row["kernel"] in CONVOLUTIONS else last != "1"


def objections(row: Row) -> list[str]:
    """The faults of a compiled kernel."""
    found = []
    convolution = row["kernel"] in CONVOLUTIONS
    if row["threads"] == 0:
        found.append("no __launch_bounds__: its registers may be too many for its block")
    if row["spill"] or row["local"]:
        found.append(f"{row['spill']} bytes of local memory, {row['local']} accesses to it")
    limit = SMALLEST_SHARED_MEMORY if convolution else DEVICES[row["arch"]].shared_memory
    if row["shared"] > limit:
        found.append(f"{row['shared']} bytes of shared memory, of {limit}")
    if convolution:
        math, tile, copies = parameters(row)
        resident = int(tile.rpartition(",")[2].rstrip(">"))
        if row["blocks"] < resident:
            found.append(f"{row['blocks']} blocks on a multiprocessor, not {resident}")
        if (row["mma_looped"] > 0) != (math != "Fp32"):
            found.append(f"{row['mma_looped']} tensor-core instructions in the main loop")
        if row["loads_after_stores"] > MOST_LOADS_AFTER_STORES[row["kernel"]]:
            found.append(f"{row['loads_after_stores']} times a load behind a store, for which it has to wait")
        if math != "Fp32" and row["matrix_loads"] == 0:
            found.append("no ldmatrix")
        if math == "Fp32" and row["fma_looped"] < 32:
            found.append(f"{row['fma_looped']} multiply-adds in the main loop")
        of_epilogue = COPIES_OF_EPILOGUE[row["kernel"]] * (2 if math.endswith("32") else 1)
        if (row["copies_looped"] > of_epilogue) != (copies != "2"):
            found.append(f"{row['copies_looped']} asynchronous copies in loops, {of_epilogue} of them the epilogue's")
    elif row["occupancy"] < FEWEST_WARPS:
        found.append(f"{row['occupancy']:.0f} % of the warps")
    if row["loads_at_once"] < LEAST_LOADS_AT_ONCE.get(row["kernel"], 0):
        found.append(f"{row['loads_at_once']} loads of parts at a time")
    if is_vectorised(row) and row["wide_loads"] == 0:
        found.append("no loads of 16 bytes")
    if is_vectorised(row) and row["wide_stores"] == 0 and "statistics" not in row["kernel"]:
        found.append("no stores of 16 bytes")
    return found


def test_registers_shared_memory_and_instructions(rows: list[Row]) -> None:
    wrong = [f"{'; '.join(found)}: {row}" for row in rows if (found := objections(row))]
    assert not wrong, f"{len(wrong)} of {len(rows)} kernels\n" + "\n".join(wrong)


def test_every_kernel_type_and_tile_is_compiled_for_every_architecture(rows: list[Row]) -> None:
    defined = kernel_resources.defined_kernels()
    known = {"add_relu_kernel", "bn_train_forward_kernel", "max_pool_backward_kernel", *CONVOLUTIONS}
    assert defined >= known, "definitions are not recognised"
    archs = {row["arch"] for row in rows}
    variants = [{(row["kernel"], row["variant"]) for row in rows if row["arch"] == arch} for arch in archs]
    assert all({kernel for kernel, _ in each} == defined for each in variants), "build the library again"
    assert all(each == variants[0] for each in variants)
    convolutions = [parameters(row) for row in rows if row["kernel"] == CONVOLUTIONS[0] and is_vectorised(row)]
    tiles = {",".join(re.findall(r"\d+", tile)[:2]) for _, tile, _ in convolutions}
    assert tiles >= {"128,128", "128,64", "64,64"}
    assert {math for math, _, _ in convolutions} == {"Bf16", "Fp16", "Tf32", "Fp32"}


def test_newer_gpus_are_served_by_ptx(rows: list[Row]) -> None:
    if _extension.build_info().get("arch_list") != _build.DEFAULT_ARCH_LIST:
        pytest.skip("the library was built for other architectures than the default ones")
    command = [str(cubin.tool()), "-lptx", str(kernel_resources.LIBRARY)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sources = {path.stem for path in _build.sources("_cuda") if path.suffix == ".cu"}
    assert {name for name in sources if f"{name}.sm_80.ptx" in listed} >= {"add_relu", "conv_bf16"}, listed


def test_kernels_for_hopper() -> None:
    """Each dtype and tile within its registers; main loops of wgmma, and TMA for all that moves, by im2col once."""
    skip_unless_built("_sm90")
    found = kernel_resources.cutlass_rows(kernel_resources.CUTLASS_LIBRARIES["sm90"])
    assert {row["variant"].rpartition(",")[0] for row in found} == {
        f"ConvKernel<{dtype},{tile}" for dtype in ("bfloat16_t", "half_t", "float") for tile in sm90.TILES
    }
    for row in found:
        assert (row["arch"], row["threads"], row["spill"], row["local"]) == (90, 384, 0, 0), row
        assert row["registers"] <= 65536 // 384, row
        assert row["wgmma_looped"] >= 4 and row["tma_im2col"] == 1, row
        assert row["tma_loads"] >= row["tma_im2col"] + 4 and row["tma_stores"] >= 1, row


def test_kernels_for_blackwell() -> None:
    """As for Hopper, with tcgen05; all that is in local memory are the addresses of CUTLASS's two accumulators."""
    skip_unless_built("_sm100")
    found = kernel_resources.cutlass_rows(kernel_resources.CUTLASS_LIBRARIES["sm100"])
    assert {row["variant"] for row in found} == {
        f"Conv<{dtype},{tile}>" for dtype in ("bfloat16_t", "half_t") for tile in sm100.TILES
    }
    for row in found:
        assert (row["arch"], row["threads"], row["spill"], row["local"]) == (100, 256, 8, 4), row
        assert row["registers"] <= 65536 // 256 and row["tcgen05_looped"] >= 4, row
        assert row["tma_im2col"] >= 1 and row["tma_loads"] >= row["tma_im2col"] + 2 and row["tma_stores"] >= 1, row


def test_a_missing_library_is_a_reason(tmp_path: os.PathLike[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["cuda", "--library", f"{tmp_path}/none.so", "--output", f"{tmp_path}/rows.csv"]
    assert kernel_resources.main(command) == 2
    assert "does not exist: build it first" in capsys.readouterr().err
    assert not os.path.exists(f"{tmp_path}/rows.csv")
