"""Launches of the C++/CUDA kernels on paper, against those in the emulator and on a GPU."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import resfuse
from benchmarks.launches import count_launches
from resfuse import costs
from resfuse.backends import cuda, cuda_conv, registry
from resfuse.costs import Device, Operation, TensorInfo
from resfuse.costs.fused.cuda import RESIDENT_BLOCKS, RESIDENT_BLOCKS_WITHOUT_TENSOR_CORES
from tests.cost_runs import Run, described, ones, runs
from tests.emulator import backend as emulator

registry.register("cuda_emulator", emulator)
RESOURCES = Path(__file__).parents[1] / "benchmarks/results/cuda/resources.csv"
emulated = pytest.mark.skipif(
    emulator.unavailable_reason() is not None, reason=f"emulator: {emulator.unavailable_reason()}"
)


@contextmanager
def emulated_gpu(processors: int, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """The description of a GPU, and the emulator with as many blocks resident as it has of this tile."""
    blocks = RESIDENT_BLOCKS_WITHOUT_TENSOR_CORES[tile] * processors
    monkeypatch.setattr(cuda_conv, "_processors", lambda device: processors)
    monkeypatch.setattr(cuda, "_workspace_sizes", {})
    with resfuse.use_backend("cuda_emulator"), emulator.device(resident_blocks=blocks):
        yield Device("small", "cuda", 1e12, {torch.float32: 1e12}, 1, 0, "made up", (8, 0), processors, 166912)


@emulated
@runs
def test_cuda(name: str, case: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(name, case, training)
    with emulated_gpu(4, (32, 64), monkeypatch) as gpu:
        with emulator.launches() as first:
            output = run.forward()
        with emulator.launches() as second:
            run.backward(output, torch.ones_like(output))
    cudnn = 2 if name == "conv_bn_act" else 0  # gradients that are torch's own, here the CPU's
    assert (first.launches, second.launches + cudnn) == run.modelled("cuda", gpu)


@emulated
@pytest.mark.parametrize(("filters", "expected"), [(256, 1), (320, 2)])
def test_cuda_launches_twice_where_not_all_blocks_are_resident(
    filters: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One multiprocessor holds four blocks of the tile 32 x 64: 256 channels."""
    x, weight, v = ones((1, 8, 4, 4), "cpu"), ones((filters, 8, 1, 1), "cpu"), torch.ones(filters)
    z = TensorInfo((1, filters, 4, 4), torch.float32)
    operation = Operation("", "conv_bn_act", (described(x),), (described(weight), *[described(v)] * 4), z)
    with emulated_gpu(1, (32, 64), monkeypatch) as gpu, emulator.launches() as found, torch.no_grad():
        resfuse.conv_bn_act(x, weight, v.clone(), v.clone(), v, v, training=True)
    assert found.launches == expected
    assert costs.forward_cost(operation, training=True, backend="cuda", device=gpu).launches == expected


def test_the_promised_blocks_are_resident() -> None:
    """As the compiler's registers have it, for every architecture that is built."""
    with RESOURCES.open() as file:
        rows = [row for row in csv.DictReader(file) if row["kernel"] == "conv_training_kernel"]
    assert len(rows) > 20
    for row in rows:
        math_name, _, tile = row["variant"].strip("<>").partition(",Tile<")
        block_m, block_n, _, _, promised = (int(number) for number in tile.partition(">")[0].split(","))
        table = RESIDENT_BLOCKS_WITHOUT_TENSOR_CORES if math_name == "Fp32" else RESIDENT_BLOCKS
        assert table[block_m, block_n] == promised <= int(row["blocks"])


# --- a GPU -----------------------------------------------------------------------------------------------------------


def kernels_of(call: Callable[[], object]) -> int:
    call()  # compiles, fills caches
    found = count_launches(call, torch.device("cuda"))
    if found is None:
        pytest.skip("the profiler records no kernels here")
    return found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
@pytest.mark.parametrize("backend", sorted({"cuda", "triton"} & set(resfuse.available_backends())))
@runs
def test_on_a_gpu(name: str, case: str, training: bool, backend: str) -> None:
    """All kernels that the profiler sees; of cuDNN's gradients there may be more than one each."""
    gpu: Any = torch.cuda.get_device_properties(0)
    device = Device(
        gpu.name, "cuda", 1e12, {torch.float32: 1e12}, gpu.total_memory, 0, "made up", (gpu.major, gpu.minor),
        gpu.multi_processor_count, gpu.shared_memory_per_block_optin,
    )  # fmt: skip
    run = Run(name, case, training, "cuda")
    forward, backward = run.modelled(backend, device)
    with resfuse.use_backend(backend):
        with torch.no_grad():
            assert kernels_of(run.forward) == forward
        if not training and name != "add_relu":
            return  # where gradients are wanted, inference also launches what is per channel
        output = run.forward()
        found = kernels_of(lambda: run.backward(output, torch.ones_like(output)))
    found -= 1  # the ones
    if backend == "cuda" and name == "conv_bn_act":
        assert found >= backward
    else:
        assert found == backward
