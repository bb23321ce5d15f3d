"""The operator calls of a model as a list: names, paths, shapes, casts, gradients; and that nothing else happens."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resfuse
from resfuse.costs import Operation, TensorInfo
from resfuse.tracing import Tracer, operations

torchvision = pytest.importorskip("torchvision")

SMALL = (2, 3, 64, 64)


def small(**options: Any) -> nn.Module:
    """A torchvision ResNet with four blocks."""
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10, **options)


def names(found: tuple[Operation, ...]) -> Counter[str]:
    return Counter(operation.name for operation in found)


@pytest.mark.parametrize(
    ("name", "convolutions", "training"), [("resnet18", 20, False), ("resnet18", 20, True), ("resnet50", 53, False)]
)
def test_a_network_of_torchvision(name: str, convolutions: int, training: bool) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name).train(training)
    counters = {"add": convolutions} if training else {}  # one num_batches_tracked per batch norm
    shared = {"max_pool2d": 1, "adaptive_avg_pool2d": 1, "flatten": 1, "linear": 1}
    eager = operations(model, (4, 3, 224, 224))
    blocks = 8 if name == "resnet18" else 16
    relus = convolutions - sum(operation.path.endswith("downsample.0") for operation in eager)
    expected = Counter({"conv2d": convolutions, "batch_norm": convolutions, "relu": relus, "add": blocks})
    assert names(eager) == Counter(shared) + expected + Counter(counters)

    resfuse.fuse_(model)
    fused = operations(model, (4, 3, 224, 224))
    assert names(fused) == Counter(shared) + Counter({"conv_bn_act": convolutions}) + Counter(counters)
    paths = [[operation.path for operation in found if operation.name == kind]
             for found, kind in ((eager, "conv2d"), (fused, "conv_bn_act"))]  # fmt: skip
    assert sorted(paths[0]) == sorted(paths[1])
    assert set(paths[0]) <= {path for path, _ in model.named_modules()}


def test_what_a_call_has() -> None:
    model = small().eval()
    resfuse.fuse_(model)
    calls = {operation.path: operation for operation in operations(model, SMALL)}
    fused = calls["layer2.0.conv2"]
    assert fused.inputs == (TensorInfo((2, 128, 8, 8), torch.float32),) * 2  # and the residual
    assert fused.output == TensorInfo((2, 128, 8, 8), torch.float32)
    assert fused.weight() == TensorInfo((128, 128, 3, 3), torch.float32)
    assert [tensor.shape for tensor in fused.parameters[1:]] == [(128,)] * 4
    expected = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "relu": True, "training": False}
    assert expected.items() <= fused.options.items()
    assert calls["layer2.0.conv1"].options["stride"] == (2, 2)
    assert not calls["layer2.0.downsample.0"].options["relu"]
    pooling = calls["maxpool"].options
    assert (pooling["kernel_size"], pooling["stride"], pooling["padding"]) == ((3, 3), (2, 2), (1, 1))


def test_arguments_of_convolutions_and_pooling_are_numbers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding="same", dilation=2), nn.Conv2d(8, 8, 3, padding="valid"),
                          nn.MaxPool2d(2), nn.AvgPool2d(2))  # fmt: skip
    same, valid, largest, mean = operations(model, (1, 3, 16, 16))
    assert same.options["padding"] == (2, 2) and valid.options["padding"] == (0, 0)
    assert largest.options["stride"] == mean.options["stride"] == (2, 2)


def test_gradients_follow_what_is_frozen() -> None:
    model = small().train()
    for part in (model.conv1, model.bn1):
        part.requires_grad_(False)
    found = {(call.path, call.name): call.options for call in operations(model, SMALL)}

    def needs(path: str, name: str) -> tuple[bool, bool]:
        return found[path, name]["needs_input_grad"], found[path, name]["needs_parameter_grad"]

    assert needs("conv1", "conv2d") == needs("bn1", "batch_norm") == (False, False)
    assert needs("layer1.0.conv1", "conv2d") == (False, True)
    assert needs("layer1.0.bn1", "batch_norm") == needs("fc", "linear") == (True, True)
    assert needs("bn1", "add") == (False, False), "a counter"
    images = torch.empty(SMALL, device="meta", requires_grad=True)
    assert next(iter(operations(model, images))).options["needs_input_grad"]


class Regions(nn.Module):
    """A part without gradients, and one in another precision."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(4, 4, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.first(x)
        with torch.autocast("cpu", torch.bfloat16):
            x = self.second(x)
        return self.third(x.float())


def test_regions_of_another_mode() -> None:
    found = [call for call in operations(Regions(), (1, 4, 8, 8)) if call.name == "conv2d"]
    assert [call.path for call in found] == ["first", "second", "third"]
    assert [call.options["needs_parameter_grad"] for call in found] == [False, True, True]
    assert [call.options["needs_input_grad"] for call in found] == [False, False, True]
    assert [call.output.dtype for call in found] == [torch.float32, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("fused", [False, True])
def test_the_casts_of_autocast(fused: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False),
                          nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))  # fmt: skip
    if fused:
        resfuse.fuse_(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = operations(model.train(), (2, 3, 8, 8))
    casts = [call for call in found if call.name == "to"]
    paths = sorted(call.path for call in casts if call.path)
    assert paths == ["0", "3", "7", "7"] if fused else ["0", "0", "3", "7", "7"]
    assert len(casts) == 5, "the images, and each weight and bias once"
    assert {call.output.dtype for call in casts} == {torch.bfloat16}
    for call in found:
        if call.name in ("conv2d", "conv_bn_act", "linear"):
            assert {call.inputs[0].dtype, call.weight().dtype, call.output.dtype} == {torch.bfloat16}


def test_as_pytorch_is_what_the_eager_model_does() -> None:
    for model in (small().train(), resfuse.models.cifar_resnet(8, shortcut="B").eval()):
        inputs = (SMALL if isinstance(model, torchvision.models.ResNet) else (2, 3, 32, 32),)
        eager = Counter(map(repr, operations(model, *inputs))) if inputs[0] == SMALL else None
        tracer = Tracer(model, inputs)
        resfuse.fuse_(tracer.model)
        plain = [call.operation for call in tracer.calls(as_pytorch=True)]
        assert not {"conv_bn_act", "bn_act", "add_relu"} & {operation.name for operation in plain}
        if eager is not None:  # the projection is called at another moment
            assert Counter(map(repr, plain)) == eager
        assert "conv_bn_act" in {call.operation.name for call in tracer.calls()}, "and it lasts no longer"


def test_the_model_is_left_alone() -> None:
    calls: list[str] = []
    model = small().train()
    model.layer1[0].conv1.register_forward_hook(lambda *_: calls.append("hook"))
    model.layer2[0].register_forward_pre_hook(lambda *_: calls.append("pre-hook"))
    model.bn1.momentum = None
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    state = copy.deepcopy(model.state_dict())
    tensors = {name: (id(tensor), tensor.stride(), tensor.data_ptr()) for name, tensor in model.state_dict(keep_vars=True).items()}  # fmt: skip  # noqa: E501
    modules = [(id(module), type(module), module.training) for module in model.modules()]
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    tracer = Tracer(model, (SMALL,))
    resfuse.fuse_(tracer.model)
    found = tracer.calls()
    assert calls == []
    assert [(id(module), type(module), module.training) for module in model.modules()] == modules
    after = {name: (id(tensor), tensor.stride(), tensor.data_ptr()) for name, tensor in model.state_dict(keep_vars=True).items()}  # fmt: skip  # noqa: E501
    assert after == tensors
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.bn1.momentum is None and len(model.layer1[0].conv1._forward_hooks) == 1
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), random)
    by_path = {call.operation.path: call.operation.name for call in found}
    assert by_path["layer1.0.conv1"] == "conv2d", "the hook keeps it from being fused"
    model(torch.randn(SMALL))
    assert sorted(calls) == ["hook", "pre-hook"]


def test_no_memory_is_taken() -> None:
    """A batch of 4 TB, and a model whose weights are nowhere."""
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    found = operations(model, (1 << 23, 3, 224, 224))
    assert found[0].inputs[0].bytes > 1 << 42


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.compile imports
@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_wrappers_are_looked_into(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    assert operations(wrap(model), (1, 3, 8, 8)) == operations(model, (1, 3, 8, 8))


def test_the_mode_around_does_not_matter() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    expected = operations(model, (1, 3, 8, 8))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert operations(model, (1, 3, 8, 8)) == expected
            assert operations(copy.deepcopy(model), torch.empty(1, 3, 8, 8)) == expected


def test_tied_and_plain_tensors() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight
            self.scale = torch.ones(4)  # neither parameter nor buffer

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) * self.scale

    found = operations(Tied(), (2, 4))
    assert [call.name for call in found] == ["linear", "linear", "mul"]


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "inputs", "error", "message"),
    [
        (Branches(), ((2, 2),), ValueError, "model: Branches can not be traced for inputs of shape (2, 2): "),
        (nn.Linear(3, 4), ((2, 5),), ValueError, "model: Linear can not be traced for inputs of shape (2, 5): "),
        (nn.Linear(3, 4), (), ValueError, "inputs: expected at least one tensor or shape, got none"),
        (nn.Linear(3, 4), ((2, 0),), ValueError, "inputs[0]: expected sizes of at least 1, got (2, 0)"),
        (nn.Linear(3, 4), ("ab",), TypeError, "inputs[0]: expected a tensor or a shape of integers, got 'ab'"),
        (nn.Linear(3, 4), ((2, 3.0),), TypeError, "inputs[0]: expected a tensor or a shape of integers"),
        (torch.relu, ((2, 3),), TypeError, "model: expected a torch.nn.Module, got builtin_function_or_method"),
    ],
)
def test_what_can_not_be_traced(model: Any, inputs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        operations(model, *inputs)
    assert str(raised.value).startswith(message)


def test_a_model_that_can_not_be_copied_says_why() -> None:
    class Locked(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("there is only one")

    with pytest.raises(ValueError, match="model: Locked can not be copied: there is only one"):
        operations(Locked(3, 4), (2, 3))
    with pytest.raises(ValueError, match=r"model: LazyLinear can not be (copied|traced)"):
        operations(nn.LazyLinear(4), torch.empty(2, 3))
