"""cuDNN's graphs, validated and planned by cuDNN for a GPU that is not there; which plan is taken and executed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("torchvision")

from benchmarks.cases import networks
from benchmarks.providers import cudnn_plans
from benchmarks.providers.cudnn_graph import CudnnGraph
from benchmarks.providers.cudnn_plans import describe, fastest, plan
from benchmarks.providers.groups import Group
from tests.stand_ins import SETTING, Graphs, calibrated

# torch.export warns of its own internals
pytestmark = [pytest.mark.filterwarnings(f"ignore::{name}") for name in ("DeprecationWarning", "FutureWarning")]

# What cuDNN wants to know of a GPU; those of an H200, as its driver and NVIDIA's documentation give them.
H200 = {
    "maxGridSize": [2**31 - 1, 65535, 65535], "maxBlockSize": [1024, 1024, 64], "regsPerBlock": 65536,
    "multiProcessorCount": 132, "warpSize": 32, "maxSharedMemoryPerBlock": 49152,
    "maxSharedMemoryPerBlockOptin": 232448, "reservedSharedMemoryPerBlock": 1024, "maxRegistersPerSM": 65536,
    "maxCtasPerSM": 32, "maxThreadsPerBlock": 1024, "maxThreadsPerSM": 2048, "pciDeviceId": 0x233510DE,
    "isTccDriver": 0, "supportCoopLaunch": 1, "totalGlobalMem": 150754820096, "smClockRateKHz": 1980000,
    "memClockRateKHz": 3201000, "l2CacheSize": 62914560, "cudaDeviceId": 0, "deviceVer": 900, "driverVer": 13000,
    "deviceName": "NVIDIA H200",
}  # fmt: skip


def planned(cudnn: Any, group: Group) -> tuple[Any, dict[str, Any]]:
    properties = cudnn.create_device_properties(json.dumps(H200))
    return describe(cudnn, group, device_property=properties)


@pytest.fixture(scope="module")
def cudnn() -> Any:
    found = pytest.importorskip("cudnn", reason="nvidia-cudnn-frontend is not installed")
    try:
        found.backend_version()
        found.create_device_properties(json.dumps(H200))
    except Exception as error:
        pytest.skip(f"no cuDNN that can plan for a GPU that is not here: {error}")
    return found


def groups_of(network: str, block: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Group]:
    module, input = calibrated(networks.build_block(network, block), shape)
    graphs = Graphs()
    CudnnGraph("", graphs).prepare(module, (input,), SETTING)
    return [
        dataclasses.replace(group, weight=group.weight.to(dtype), bias=group.bias.to(dtype)) for group in graphs.groups
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_cudnn_accepts_the_graphs(cudnn: Any, dtype: torch.dtype) -> None:
    """cuDNN itself validates them and infers the output, for an H200 that is not there."""
    for group in groups_of("resnext50_32x4d", "layer2.0", (4, 256, 8, 8), dtype):
        graph, tensors = planned(cudnn, group)
        graph.validate()
        graph.build_operation_graph()
        assert tensors.keys() == {"x", "w", "b", "y"} | ({"z"} if group.residual else set())
        assert tuple(tensors["y"].get_dim()) == group.output_shape
        assert tensors["y"].get_stride()[1] == 1, "not NHWC"


def test_cudnn_has_plans_for_the_graphs(cudnn: Any) -> None:
    """For those that its compiled kernels can do; the others need a driver, with which it compiles its own."""
    groups = [
        group for group in groups_of("resnet18", "layer2.0", (8, 64, 56, 56), torch.bfloat16) if not group.residual
    ]
    assert len(groups) == 2
    for group in groups:
        graph, _ = planned(cudnn, group)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        assert graph.get_execution_plan_count() > 1


def test_float32_without_tf32_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    graph = SimpleNamespace(
        validate=lambda: asked.append("validate"), build_operation_graph=lambda: asked.append("build"),
        create_execution_plans=asked.append, check_support=lambda: asked.append("check"),
        deselect_numeric_notes=asked.append,
    )  # fmt: skip
    fake = SimpleNamespace(
        heur_mode=SimpleNamespace(A="A", FALLBACK="F"),
        numerical_note=SimpleNamespace(TENSOR_CORE="tensor cores", DOWN_CONVERT_INPUTS="narrower"),
    )
    for allowed, dtype, notes in (
        (False, torch.float32, True),
        (True, torch.float32, False),
        (False, torch.half, False),
    ):
        asked.clear()
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        plan(fake, graph, dtype)
        assert asked == ["validate", "build", ["A", "F"], *([["tensor cores", "narrower"]] if notes else []), "check"]


def test_the_notes_of_cudnn_exist(cudnn: Any) -> None:
    assert cudnn.numerical_note.TENSOR_CORE != cudnn.numerical_note.DOWN_CONVERT_INPUTS
    assert issubclass(cudnn.cudnnGraphNotSupportedError, Exception)


def test_the_fastest_plan_that_can_be_built_is_taken() -> None:
    def build(index: int) -> None:
        if index == 1:
            raise ValueError("refused")

    times = [3.0, 0.5, 2.0, 1.0]
    assert fastest(3, build, times.__getitem__, ValueError) == 2
    assert fastest(4, build, times.__getitem__, ValueError) == 3
    with pytest.raises(RuntimeError, match="proposed 0 plans"):
        fastest(0, build, times.__getitem__, ValueError)
    with pytest.raises(ZeroDivisionError):
        fastest(2, lambda index: None, lambda index: 1 / 0, ValueError)


class Plans:
    """cuDNN's graph as `Planner` uses it; plan 1 is the fastest."""

    def __init__(self) -> None:
        self.executed: list[tuple[dict[Any, Tensor], int, Any]] = []

    def get_execution_plan_count(self) -> int:
        return 3

    def build_plan_at_index(self, index: int) -> None: ...

    def get_workspace_size_plan_at_index(self, index: int) -> int:
        return 16 * index

    def execute_plan_at_index(self, pack: dict[Any, Tensor], workspace: Tensor, index: int, handle: Any) -> None:
        assert workspace.numel() >= 16 * index
        self.executed.append((pack, index, handle))


def test_a_graph_is_executed_with_its_fastest_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, streams = Plans(), list[int]()
    fake = SimpleNamespace(
        create_handle=lambda: "handle", set_stream=lambda handle, stream: streams.append(stream),
        cudnnGraphNotSupportedError=ValueError,
    )  # fmt: skip
    names = {name: f"tensor {name}" for name in "xwby"}
    monkeypatch.setitem(sys.modules, "cudnn", fake)
    monkeypatch.setattr(cudnn_plans, "describe", lambda cudnn, group, **options: (graph, names))
    monkeypatch.setattr(cudnn_plans, "plan", lambda cudnn, graph, dtype: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)

    def seconds(call: Any) -> float:
        call()
        return {0: 2.0, 1: 1.0, 2: 3.0}[graph.executed[-1][1]]

    monkeypatch.setattr(cudnn_plans, "_seconds", seconds)
    group = groups_of("resnet18", "layer2.0", (1, 64, 6, 6), torch.float32)[0]
    execute = cudnn_plans.Planner(torch.device("cpu"))(group)
    assert [index for _, index, _ in graph.executed] == [0, 1, 2]
    given = {name: torch.rand(1) for name in "xwby"}
    execute(given)
    pack, index, handle = graph.executed[-1]
    assert (index, handle, set(streams)) == (1, "handle", {7})
    assert pack == {f"tensor {name}": tensor for name, tensor in given.items()}
