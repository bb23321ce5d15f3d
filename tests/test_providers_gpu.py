"""Providers for GPUs as far as they go without one: folding, the groups of a module, what is asked of each library."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("torchvision")

from benchmarks.cases import networks
from benchmarks.cases.modules import AddReLU, ConvBNAddReLU, PreActBlock
from benchmarks.providers import Setting, UnsuitableError, cudnn_graph, tensorrt_engine
from benchmarks.providers.cudnn_aten import AtenCudnn
from benchmarks.providers.cudnn_graph import CudnnGraph, describe, fastest, plan
from benchmarks.providers.exported import onnx_model
from benchmarks.providers.folding import fold
from benchmarks.providers.groups import Group
from benchmarks.providers.side_stream import SideStream
from resfuse.calibration import calibrate_

# torch.export warns of its own internals
pytestmark = [pytest.mark.filterwarnings(f"ignore::{name}") for name in ("DeprecationWarning", "FutureWarning")]

SETTING = Setting("inference", torch.float64, torch.device("cpu"), 1, level="block")
ATEN = torch.ops.aten
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


def calibrated(module: nn.Module, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    """The module with batch norms as in a trained network, in eval mode, and inputs for it."""
    torch.manual_seed(0)
    inputs = [torch.randn(shape) for shape in shapes]
    calibrate_(module, *inputs)
    return module.eval().to(dtype), *(tensor.to(dtype) for tensor in inputs)


class Operators:
    """In the place of ATen's two: the documented formula, and the arguments by the names of the operators' schemas."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def conv_relu(self, *args: Any) -> Tensor:
        return self._compute("cudnn_convolution_relu", args)

    def conv_add_relu(self, *args: Any) -> Tensor:
        return self._compute("cudnn_convolution_add_relu", args)

    def _compute(self, name: str, args: tuple[Any, ...]) -> Tensor:
        names = [argument.name for argument in getattr(ATEN, name).default._schema.arguments]
        given = dict(zip(names, args, strict=True))
        self.calls.append((name, given))
        output = F.conv2d(
            given["self"], given["weight"], given["bias"],
            given["stride"], given["padding"], given["dilation"], given["groups"],
        )  # fmt: skip
        return F.relu(output + given["alpha"] * given["z"] if "z" in given else output)


class Described:
    """A tensor of a graph: what computes it from the tensors that have names."""

    def __init__(self, compute: Callable[[Mapping[str, Tensor]], Tensor]) -> None:
        self.compute = compute

    def set_output(self, value: bool) -> Described:
        assert value
        return self

    def set_data_type(self, data_type: str) -> Described:
        return self


class EagerGraph:
    """In the place of `cudnn.pygraph`: the operations as cuDNN documents them, by PyTorch."""

    def __init__(self, **types: str) -> None:
        assert types["intermediate_data_type"] == types["compute_data_type"] == "FLOAT"
        self.operations: list[str] = []

    def tensor(self, name: str, dim: list[int], stride: list[int], data_type: str) -> Described:
        def given(tensors: Mapping[str, Tensor]) -> Tensor:
            found = tensors[name]
            found = found.view(1, -1, 1, 1) if found.dim() == 1 else found
            assert list(found.shape) == dim
            assert found.as_strided(dim, stride).equal(found)
            return found

        return Described(given)

    def conv_fprop(self, image: Described, weight: Described, name: str, **geometry: list[int]) -> Described:
        def convolve(given: Mapping[str, Tensor]) -> Tensor:
            x, w = image.compute(given), weight.compute(given)
            order = (geometry["stride"], geometry["padding"], geometry["dilation"])
            return F.conv2d(x, w, None, *order, x.shape[1] // w.shape[1])

        return self._add(name, convolve)

    def bias(self, input: Described, bias: Described, name: str) -> Described:
        return self._add(name, lambda given: input.compute(given) + bias.compute(given))

    def add(self, a: Described, b: Described, name: str) -> Described:
        return self._add(name, lambda given: a.compute(given) + b.compute(given))

    def relu(self, input: Described, name: str) -> Described:
        return self._add(name, lambda given: F.relu(input.compute(given)))

    def _add(self, name: str, compute: Callable[[Mapping[str, Tensor]], Tensor]) -> Described:
        self.operations.append(name)
        return Described(compute)


class Graphs:
    """In the place of cuDNN: computes the graph that a group is described by, into the tensor that it is given."""

    def __init__(self) -> None:
        self.groups: list[Group] = []
        self.operations: list[list[str]] = []

    def __call__(self, group: Group) -> cudnn_graph.Execute:
        names = {name: name for name in ("FLOAT", "HALF", "BFLOAT16", "DOUBLE")}
        module = SimpleNamespace(data_type=SimpleNamespace(**names), pygraph=EagerGraph)
        graph, tensors = describe(module, group)
        self.groups.append(group)
        self.operations.append(graph.operations)

        def execute(given: Mapping[str, Tensor]) -> None:
            assert given.keys() == tensors.keys()
            given["y"].copy_(tensors["y"].compute(given))

        return execute


@pytest.fixture(autouse=True)
def _doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    """For graphs in float64, which cuDNN hardly has kernels for, but in which the tests are exact."""
    monkeypatch.setitem(cudnn_graph.DATA_TYPES, torch.float64, "DOUBLE")


def modules() -> dict[str, tuple[nn.Module, tuple[tuple[int, ...], ...]]]:
    """What has to be rewritten correctly, and the shapes of its inputs."""
    bare = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 2, 2, 2), nn.BatchNorm2d(8, eps=0.1, affine=False), nn.ReLU())
    end = ConvBNAddReLU(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8, eps=0.05))
    return {
        "conv bias, groups, dilation, stride, eps, no affine": (bare, ((2, 6, 9, 11),)),
        "a residual before the ReLU": (end, ((2, 4, 5, 6), (2, 8, 5, 6))),
        "a projection": (networks.build_block("resnet18", "layer2.0"), ((1, 64, 6, 6),)),
        "groups, stride": (networks.build_block("resnext50_32x4d", "layer2.0"), ((1, 256, 6, 6),)),
        "pre-activation": (PreActBlock(8, 16, 2, mid=4), ((2, 8, 6, 6),)),
        "a shortcut without parameters": (networks.build("cifar_resnet20"), ((1, 3, 32, 32),)),
    }


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("conv_bias", [False, True])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_a_folded_batch_norm_computes_the_same(affine: bool, conv_bias: bool, eps: float) -> None:
    conv = nn.Conv2d(6, 8, 3, groups=2, bias=conv_bias, dtype=torch.double).to(memory_format=torch.channels_last)
    bn = nn.BatchNorm2d(8, eps=eps, affine=affine, dtype=torch.double).eval()
    for tensor in (bn.running_mean, bn.running_var, bn.weight, bn.bias):
        if tensor is not None:
            nn.init.uniform_(tensor, 1e-3, 2)
    folded = fold(conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps)
    input = torch.randn(2, 6, 5, 5, dtype=torch.double)
    torch.testing.assert_close(F.conv2d(input, *folded, groups=2), bn(conv(input)).detach(), rtol=1e-12, atol=1e-12)
    assert folded.weight.stride() == conv.weight.stride()
    assert not folded.weight.requires_grad and not folded.bias.requires_grad


def test_folding_rounds_once() -> None:
    weight, var = torch.tensor([[[[3.0]]]], dtype=torch.bfloat16), torch.tensor([0.3], dtype=torch.bfloat16)
    folded = fold(weight, None, torch.tensor([1.0]), var, None, None, 0.0)
    assert folded.weight.item() == (3 * var.double().rsqrt()).bfloat16().item()
    assert folded.bias.item() == (-var.double().rsqrt()).bfloat16().item()


@pytest.mark.parametrize("name", modules())
def test_groups_become_fused_operators_of_aten(name: str) -> None:
    module, shapes = modules()[name]
    module, *inputs = calibrated(module, *shapes)
    expected = copy.deepcopy(module)(*inputs)
    operators = Operators()
    provider = AtenCudnn("", (operators.conv_relu, operators.conv_add_relu))
    step = provider.prepare(module, tuple(inputs), SETTING)
    found = step(*(provider.convert(tensor) for tensor in inputs))
    torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-10)
    assert operators.calls
    assert all(call["alpha"] == 1 for name, call in operators.calls if name == "cudnn_convolution_add_relu")


def test_a_block_is_one_operator_per_convolution() -> None:
    module, input = calibrated(networks.build_block("resnet50", "layer2.0"), (1, 256, 6, 6))
    operators = Operators()
    step = AtenCudnn("", (operators.conv_relu, operators.conv_add_relu)).prepare(module, (input,), SETTING)
    step(input)
    # conv1, conv2 and, with the projection, an ordinary convolution, as the residual, conv3
    names = ["cudnn_convolution_relu", "cudnn_convolution_relu", "cudnn_convolution_add_relu"]
    assert [name for name, _ in operators.calls] == names
    assert [call["stride"] for _, call in operators.calls] == [[1, 1], [2, 2], [1, 1]]
    operators.calls.clear()
    step(2 * input)
    assert len(operators.calls) == 3


@pytest.mark.parametrize("name", modules())
def test_groups_become_graphs_of_cudnn(name: str) -> None:
    module, shapes = modules()[name]
    module, *inputs = calibrated(module, *shapes)
    expected = copy.deepcopy(module)(*inputs)
    graphs = Graphs()
    provider = CudnnGraph("", graphs)
    step = provider.prepare(module, tuple(inputs), SETTING)
    found = step(*(provider.convert(tensor) for tensor in inputs))
    torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-10)
    for group, operations in zip(graphs.groups, graphs.operations, strict=True):
        wanted = ["conv", "bias", *(["add"] if group.residual else []), *(["relu"] if group.relu else [])]
        assert operations == wanted


def test_without_a_convolution_there_is_nothing_to_offer() -> None:
    inputs = (torch.rand(1, 2, 3, 3), torch.rand(1, 2, 3, 3))
    for provider in (AtenCudnn(""), CudnnGraph("", Graphs())):
        with pytest.raises(UnsuitableError, match="no convolution"):
            provider.prepare(AddReLU(), inputs, SETTING)


def test_operators_of_aten_take_what_they_are_given() -> None:
    """The two names exist in torch and point to the operators whose schemas the tests above bind to."""
    for name in ("cudnn_convolution_relu", "cudnn_convolution_add_relu"):
        with pytest.raises((RuntimeError, NotImplementedError), match=name):
            getattr(torch, name)(*operator_arguments(name))


def operator_arguments(name: str) -> tuple[Any, ...]:
    image, weight = torch.rand(1, 2, 3, 3), torch.rand(2, 2, 1, 1)
    residual = (image, 1.0) if "add" in name else ()
    return image, weight, *residual, torch.rand(2), [1, 1], [0, 0], [1, 1], 1


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


class Planner:
    """cuDNN's graph as `_Planner` uses it; plan 1 is the fastest."""

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
    graph, streams = Planner(), list[int]()
    fake = SimpleNamespace(
        create_handle=lambda: "handle", set_stream=lambda handle, stream: streams.append(stream),
        cudnnGraphNotSupportedError=ValueError,
    )  # fmt: skip
    names = {name: f"tensor {name}" for name in "xwby"}
    monkeypatch.setitem(sys.modules, "cudnn", fake)
    monkeypatch.setattr(cudnn_graph, "describe", lambda cudnn, group, **options: (graph, names))
    monkeypatch.setattr(cudnn_graph, "plan", lambda cudnn, graph, dtype: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)

    def seconds(call: Any) -> float:
        call()
        return {0: 2.0, 1: 1.0, 2: 3.0}[graph.executed[-1][1]]

    monkeypatch.setattr(cudnn_graph, "_seconds", seconds)
    group = groups_of("resnet18", "layer2.0", (1, 64, 6, 6), torch.float32)[0]
    execute = cudnn_graph._Planner(torch.device("cpu"))(group)
    assert [index for _, index, _ in graph.executed] == [0, 1, 2]
    given = {name: torch.rand(1) for name in "xwby"}
    execute(given)
    pack, index, handle = graph.executed[-1]
    assert (index, handle, set(streams)) == (1, "handle", {7})
    assert pack == {f"tensor {name}": tensor for name, tensor in given.items()}


def test_a_side_stream_works_between_what_is_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    current = SimpleNamespace(wait_stream=lambda other: events.append("torch waits"))
    side = SimpleNamespace(cuda_stream=140, wait_stream=lambda other: events.append("the library waits"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    stream = SideStream(torch.device("cuda"))
    with stream.ordered() as address:
        events.append(f"work on {address}")
    assert events == ["the library waits", "work on 140", "torch waits"]
    assert stream.address == 140


class Flags(set[str]):
    """TensorRT's builder configuration."""

    set_flag, clear_flag = set.add, set.discard
    builder_optimization_level = 3

    def create_timing_cache(self, content: bytes) -> bytes:
        return content + b"+"

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> None:
        self.cache = cache

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: self.cache)


def fake_tensorrt(config: Flags, plan: Any = b"plan", readable: bool = True) -> Any:
    parser = SimpleNamespace(
        parse=lambda model: readable, num_errors=1, get_error=lambda index: "node 3: no such thing"
    )
    builder = SimpleNamespace(
        create_network=lambda flags: flags, create_builder_config=lambda: config,
        build_serialized_network=lambda network, config: plan,
    )  # fmt: skip
    return SimpleNamespace(
        Logger=type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None}),
        Builder=lambda logger: builder, OnnxParser=lambda network, logger: parser,
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1), BuilderFlag=SimpleNamespace(TF32="tf32"),
        TensorIOMode=SimpleNamespace(INPUT="input", OUTPUT="output"),
    )  # fmt: skip


def test_tensorrt_keeps_its_timings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "below" / "timings"
    for allowed, content in ((True, b"+"), (False, b"++")):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        config = Flags({"tf32"})
        assert tensorrt_engine.build(fake_tensorrt(config), b"model", cache) == b"plan"
        assert cache.read_bytes() == content
        assert ("tf32" in config) == allowed
        assert config.builder_optimization_level == tensorrt_engine.OPTIMIZATION_LEVEL


def test_tensorrt_says_what_it_can_not_read(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="can not read the model: node 3"):
        tensorrt_engine.build(fake_tensorrt(Flags(), readable=False), b"", tmp_path / "timings")
    with pytest.raises(RuntimeError, match="found no engine"):
        tensorrt_engine.build(fake_tensorrt(Flags(), plan=None), b"", tmp_path / "timings")
    assert not (tmp_path / "timings").exists()


def test_an_engine_is_given_the_addresses_of_tensors() -> None:
    modes = {"input": "input", "residual": "input", "output": "output"}
    addresses: dict[str, int] = {}
    launched: list[int] = []

    def execute(stream: int) -> bool:
        launched.append(stream)
        return stream == 7

    context = SimpleNamespace(set_tensor_address=addresses.__setitem__, execute_async_v3=execute)
    engine = SimpleNamespace(
        num_io_tensors=3, get_tensor_name=list(modes).__getitem__, get_tensor_mode=modes.__getitem__,
        create_execution_context=lambda: context,
    )  # fmt: skip
    streams = iter((contextlib.nullcontext(7), contextlib.nullcontext(8)))
    output, input, residual = (torch.rand(2) for _ in range(3))
    step = tensorrt_engine.make_engine_step(fake_tensorrt(Flags()), engine, output, lambda: next(streams))
    assert step(input, residual) is output
    assert addresses == {"output": output.data_ptr(), "input": input.data_ptr(), "residual": residual.data_ptr()}
    with pytest.raises(RuntimeError, match="could not enqueue"):
        step(input, residual)
    assert launched == [7, 8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_exported_models_are_valid_and_of_their_dtype(dtype: torch.dtype) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    module, input = calibrated(networks.build_block("resnet18", "layer2.0"), (1, 64, 6, 6), dtype=dtype)
    model = onnx.load_from_string(onnx_model(module, (input,)))
    onnx.checker.check_model(model, full_check=True)
    kinds = {onnx.TensorProto.FLOAT: torch.float32, onnx.TensorProto.FLOAT16: torch.float16}
    kinds[onnx.TensorProto.BFLOAT16] = torch.bfloat16
    (given,), (made,) = model.graph.input, model.graph.output
    assert kinds[given.type.tensor_type.elem_type] == kinds[made.type.tensor_type.elem_type] == dtype
    assert [size.dim_value for size in given.type.tensor_type.shape.dim] == [1, 64, 6, 6]
