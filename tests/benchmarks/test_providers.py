"""Providers: why they cannot run, what they are given, and the calls of libraries that no machine without a GPU has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("torchvision")
pytest.importorskip("pandas")

import resfuse
from benchmarks import conv_bn_act, models
from benchmarks.case import Setting
from benchmarks.models import Layer
from benchmarks.providers import DEFAULT, PROVIDERS, QUICK, cudnn, cudnn_groups, exported
from benchmarks.providers.cudnn import AtenCall, Cudnn
from benchmarks.providers.cudnn_groups import Group
from benchmarks.steps import calibrate_
from benchmarks.worker import UnsuitableError

# torch.export warns of its own internals
pytestmark = [pytest.mark.filterwarnings(f"ignore::{name}") for name in ("DeprecationWarning", "FutureWarning")]


def setting(mode: str = "inference", dtype: torch.dtype = torch.float32, device: str = "cpu") -> Setting:
    return Setting(mode, dtype, device, 1)


def calibrated(module: nn.Module, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    """The module with batch norms as in a trained network, in eval mode, and inputs for it."""
    torch.manual_seed(0)
    inputs = [torch.randn(shape) for shape in shapes]
    calibrate_(module, *inputs)
    return module.to(dtype), *(tensor.to(dtype) for tensor in inputs)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("onnxruntime", {"mode": "full"}, "inference only"),
        ("onnxruntime", {"dtype": torch.bfloat16}, "no bfloat16"),
        ("openvino", {"device": "cuda"}, "not on cuda"),
        ("cudnn_aten", {}, "cuDNN needs a GPU"),
        ("cudnn_aten", {"mode": "train", "device": "cuda"}, "inference only"),
        ("inductor_freezing", {"mode": "train"}, "for inference only"),
        ("inductor_reduce_overhead", {}, "need a GPU"),
        ("inductor_max_autotune", {}, "on a CPU"),
        ("resfuse_cuda", {}, "unavailable here"),
    ],
)
def test_it_says_why_it_cannot_run(name: str, changes: dict[str, Any], reason: str) -> None:
    if name == "resfuse_cuda" and torch.cuda.is_available():
        pytest.skip("it can run here")
    if name in ("onnxruntime", "openvino"):
        pytest.importorskip(name)
    assert reason in (PROVIDERS[name].unavailable_reason(setting(**changes)) or "")


def test_names() -> None:
    assert all(name == provider.name and provider.__doc__ for name, provider in PROVIDERS.items())
    assert set(QUICK) < set(DEFAULT) < set(PROVIDERS)
    assert not PROVIDERS["inductor_max_autotune"].graphs and PROVIDERS["inductor"].graphs


def test_inputs_become_leaves_in_the_layout_of_the_provider() -> None:
    tensor = torch.rand(2, 3, 4, 5, requires_grad=True)
    found = PROVIDERS["eager_channels_last"].convert_leaf(tensor)
    assert found.is_leaf and found.requires_grad and found.stride(1) == 1
    labels = torch.tensor([1, 2])
    assert PROVIDERS["eager_channels_last"].convert_leaf(labels) is labels


def test_a_backend_is_requested_in_every_call() -> None:
    if "cpu" not in resfuse.available_backends():
        pytest.skip("the CPU library is not built")
    op, input = calibrated(conv_bn_act.ConvBNAct(Layer(4, 4, 3, 1, 1, 1, (5, 5), False, True)), (2, 4, 5, 5))
    step = PROVIDERS["resfuse_cpu"].prepare(op, (input,), setting(dtype=torch.float64))
    with pytest.raises(UnsuitableError, match="no backend can run"):  # float64 is the reference's alone
        step(input)
    assert PROVIDERS["resfuse"].prepare(op, (input,), setting(dtype=torch.float64))(input).shape == input.shape


@pytest.mark.slow
def test_frozen_weights_are_constants() -> None:
    for name, frozen in (("inductor", False), ("inductor_freezing", True)):
        if PROVIDERS[name].unavailable_reason(setting()):
            pytest.skip("no compiler")
        layer, input = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval(), torch.rand(2, 4, 5, 5)
        step = PROVIDERS[name].prepare(layer, (input,), setting())
        before = step(PROVIDERS[name].convert(input)).clone()
        with torch.no_grad():
            layer[0].weight.neg_()
        assert torch.equal(before, step(PROVIDERS[name].convert(input))) == frozen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_exported_models_are_valid_and_of_their_dtype(dtype: torch.dtype) -> None:
    """bfloat16 too: the exporter's optimiser would give its convolutions float32 weights."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    module, input = calibrated(models.build("resnet18").layer2[0], (1, 64, 6, 6), dtype=dtype)
    model = onnx.load_from_string(exported.onnx_model(module, (input,)))
    onnx.checker.check_model(model, full_check=True)
    kind = {torch.float32: onnx.TensorProto.FLOAT, torch.bfloat16: onnx.TensorProto.BFLOAT16}[dtype]
    (given,), (made,) = model.graph.input, model.graph.output
    assert given.type.tensor_type.elem_type == made.type.tensor_type.elem_type == kind
    assert [size.dim_value for size in given.type.tensor_type.shape.dim] == [1, 64, 6, 6]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_exported_models_compute_the_same(name: str) -> None:
    pytest.importorskip(name)
    module, input = calibrated(models.build("cifar_resnet8"), (2, 3, 32, 32), dtype=torch.float32)
    expected = module(input)
    step = PROVIDERS[name].prepare(module, (input,), setting())
    torch.testing.assert_close(torch.as_tensor(step(PROVIDERS[name].convert(input))), expected, rtol=1e-3, atol=1e-4)


# cuDNN: the documented operations by PyTorch, in its place


def aten(name: str, *args: Any) -> Tensor:
    """`torch.cudnn_convolution_relu` and `..._add_relu`, with arguments by the names of their schemas."""
    names = [argument.name for argument in getattr(torch.ops.aten, name).default._schema.arguments]
    given = dict(zip(names, args, strict=True))
    geometry = [given[key] for key in ("stride", "padding", "dilation", "groups")]
    output = F.conv2d(given["self"], given["weight"], given["bias"], *geometry)
    return F.relu(output + given["alpha"] * given["z"] if "z" in given else output)


class EagerGraph:
    """In the place of `cudnn.pygraph`: tensors are functions of those that have names."""

    def __init__(self, **types: str) -> None:
        assert types["intermediate_data_type"] == types["compute_data_type"] == "FLOAT"

    def tensor(self, name: str, dim: list[int], stride: list[int], data_type: str) -> Any:
        assert stride[1] == 1, "NHWC"
        return self._made(lambda given: given[name].view(dim) if name == "b" else given[name])

    def conv_fprop(self, image: Any, weight: Any, name: str, **geometry: list[int]) -> Any:
        def convolve(given: Mapping[str, Tensor]) -> Tensor:
            x, w = image.compute(given), weight.compute(given)
            order = (geometry["stride"], geometry["padding"], geometry["dilation"])
            return F.conv2d(x, w, None, *order, x.shape[1] // w.shape[1])

        return self._made(convolve)

    def bias(self, input: Any, bias: Any, name: str) -> Any:
        return self._made(lambda given: input.compute(given) + bias.compute(given))

    def add(self, a: Any, b: Any, name: str) -> Any:
        return self._made(lambda given: a.compute(given) + b.compute(given))

    def relu(self, input: Any, name: str) -> Any:
        return self._made(lambda given: F.relu(input.compute(given)))

    def _made(self, compute: Any) -> Any:
        made = SimpleNamespace(compute=compute)
        made.set_output = made.set_data_type = lambda value: made
        return made


class DescribedCall(nn.Module):
    """In the place of `GraphCall`: computes the graph that a group is described by."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        types = SimpleNamespace(FLOAT="FLOAT", HALF="HALF", BFLOAT16="BFLOAT16")
        frontend = SimpleNamespace(data_type=types, pygraph=EagerGraph)
        _, self.tensors = cudnn.describe(frontend, group._replace(weight=group.weight.float()))
        self.group = group

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        given = {"x": input, "w": self.group.weight, "b": self.group.bias}
        given |= {} if residual is None else {"z": residual}
        assert {*given, "y"} == set(self.tensors)
        return self.tensors["y"].compute(given)


MODULES = {
    "conv bias, groups, dilation, stride, eps, no affine": (
        lambda: nn.Sequential(nn.Conv2d(6, 8, 3, 2, 2, 2, 2), nn.BatchNorm2d(8, eps=0.1, affine=False), nn.ReLU()),
        ((2, 6, 9, 11),),
    ),
    "a residual before the ReLU": (
        lambda: conv_bn_act.build(4, 8, 1, 1, 0, 1, (5, 6), True, True), ((2, 4, 5, 6), (2, 8, 5, 6)),
    ),
    "a projection": (lambda: models.build("resnet18").layer2[0], ((1, 64, 6, 6),)),
    "shortcuts without parameters": (lambda: models.build("cifar_resnet8"), ((1, 3, 32, 32),)),
}  # fmt: skip


@pytest.mark.parametrize("make_call", [AtenCall, DescribedCall])
@pytest.mark.parametrize("name", MODULES)
def test_rewritten_modules_compute_the_same(name: str, make_call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for operator in ("cudnn_convolution_relu", "cudnn_convolution_add_relu"):
        monkeypatch.setattr(torch, operator, lambda *args, operator=operator: aten(operator, *args))
    build, shapes = MODULES[name]
    module = build()
    for norm in [child for child in module.modules() if isinstance(child, nn.BatchNorm2d) and not child.affine]:
        norm.running_mean.normal_()
    if name.startswith("conv bias"):
        module, inputs = module.eval().double(), [torch.randn(shapes[0], dtype=torch.float64)]
    else:
        module, *inputs = calibrated(module, *shapes)
    expected = module(*inputs)
    step = Cudnn("", make_call).prepare(module, tuple(inputs), setting(dtype=torch.float64))
    found = step(*(tensor.contiguous(memory_format=torch.channels_last) for tensor in inputs))
    torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-10)


def test_a_module_without_groups_is_refused() -> None:
    with pytest.raises(UnsuitableError, match="no convolution is followed by a batch norm"):
        cudnn_groups.rewrite(nn.Sequential(nn.ReLU()).eval(), (torch.rand(1, 2, 3, 3),), AtenCall)


def test_the_fastest_plan_that_can_be_built_is_taken() -> None:
    def build(index: int) -> None:
        if index == 1:
            raise ValueError("refused")

    times = [3.0, 0.5, 2.0, 1.0]
    assert cudnn.fastest(3, build, times.__getitem__, (ValueError,)) == 2
    assert cudnn.fastest(4, build, times.__getitem__, (ValueError,)) == 3
    with pytest.raises(RuntimeError, match="proposed 0 plans"):
        cudnn.fastest(0, build, times.__getitem__, (ValueError,))


def test_cudnn_accepts_the_graphs() -> None:
    """cuDNN itself validates them and infers the output, for an H200 that is not there."""
    frontend = pytest.importorskip("cudnn", reason="nvidia-cudnn-frontend is not installed")
    try:
        properties = frontend.create_device_properties(json.dumps({"deviceVer": 900, "multiProcessorCount": 132}))
    except Exception as error:
        pytest.skip(f"no cuDNN that can plan for a GPU that is not here: {error}")
    weight = torch.randn(128, 64, 3, 3, dtype=torch.bfloat16)
    group = Group(weight, weight[:, 0, 0, 0], True, True, (2, 2), (1, 1), (1, 1), 1, (8, 64, 56, 56), (8, 128, 28, 28))
    graph, tensors = cudnn.describe(frontend, group, device_property=properties)
    graph.validate()
    graph.build_operation_graph()
    assert tuple(tensors["y"].get_dim()) == group.output_shape
