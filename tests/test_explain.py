"""`resfuse.explain`: figures against the papers', backends of absent GPUs, measuring, and the table."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resfuse
from resfuse import models
from resfuse.costs import DEVICES, Cost, Device, describe
from resfuse.explain import Explanation, Layer, Totals, machine, measure, table
from resfuse.explain.operators import function_for
from resfuse.processor import processor_name
from resfuse.tracing import Tracer

torchvision = pytest.importorskip("torchvision")

CPU = Device("a CPU", "cpu", 1e10, {torch.float32: 1e11}, 1 << 34, 0.0, "made up")
HERE = dataclasses.replace(CPU, name=processor_name(), l2=1 << 10)
IMAGES = (2, 3, 32, 32)
needs_cpu = pytest.mark.skipif("cpu" not in resfuse.available_backends(), reason="the CPU library is not built")


def on_meta(build: Any, *args: Any, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return build(*args, **options)


def small() -> nn.Module:
    """Two residual blocks, with a projection."""
    block, options = torchvision.models.resnet.BasicBlock, {"num_classes": 10}
    model = torchvision.models.ResNet(block, [1, 1, 1, 1], **options)
    return nn.Sequential(model.conv1, model.bn1, model.relu, model.layer1, model.layer2)


# Figures


@pytest.mark.parametrize(
    ("build", "paper"),  # He et al. 2016 (arXiv:1512.03385), table 1: multiply-adds of one image, in 1e9
    [
        (models.resnet18, 1.8),
        (lambda: models.resnet50(version="v1"), 3.8),
        (torchvision.models.resnet18, 1.8),
    ],
    ids=["resnet18", "resnet50 v1", "torchvision resnet18"],
)
def test_flops_are_those_of_the_paper(build: Any, paper: float) -> None:
    model = on_meta(build).eval()
    found = resfuse.explain(model, (16, 3, 224, 224), device="h200")
    exact = models.complexity(model).multiply_adds
    assert found.total.flops == found.unfused.flops == 16 * 2 * exact
    assert exact / 1e9 == pytest.approx(paper, abs=0.1)


def test_a_training_step_has_the_flops_of_three() -> None:
    model = on_meta(models.cifar_resnet, 8).train()
    found = resfuse.explain(model, (128, 3, 32, 32), device="h200")
    forward = sum(layer.forward.flops for layer in found.layers)
    stem = next(layer for layer in found.layers if layer.path == "conv1")
    assert forward == 128 * 2 * models.complexity(model, (3, 32, 32)).multiply_adds
    assert found.total.flops == 3 * forward - stem.forward.flops, "the images need no gradient"
    assert found.training and found.backward
    without = resfuse.explain(model, (128, 3, 32, 32), device="h200", backward=False)
    assert without.total.flops == forward and not without.backward
    assert all(layer.backward is None and layer.backward_backend is None for layer in without.layers)


@pytest.mark.parametrize("training", [False, True])
def test_totals_are_sums_and_fusing_saves(training: bool) -> None:
    model = on_meta(torchvision.models.resnet18).bfloat16().train(training)
    found = resfuse.explain(model, (64, 3, 224, 224), device="h200")
    assert found.total == Totals.of(found.layers)
    for name in ("launches", "bytes", "seconds"):
        of_kernels = sum(getattr(layer, name) for layer in found.layers)
        assert getattr(found.total, name) == pytest.approx(of_kernels)
        assert 0 < getattr(found.total, name) < getattr(found.unfused, name)
    for layer in found.layers:
        total = layer.forward if layer.backward is None else layer.forward + layer.backward
        assert Cost(layer.flops, layer.bytes, layer.launches) == total
        least = max(layer.flops / found.device.rate(layer.dtype), layer.bytes / found.device.bandwidth)
        assert layer.seconds >= least * (1 - 1e-9), "no less than all its kernels as one"
    bounds = {layer.path: layer.bound for layer in found.layers}
    assert bounds["conv1"] == "memory" and bounds["layer4.1.conv2"] == "compute"
    assert found.slowest[0].seconds == max(layer.seconds for layer in found.layers)


def test_inference_is_one_launch_per_convolution(explanations: tuple[Explanation, Explanation]) -> None:
    """53 convolutions, one pooling, one mean, and a matrix product with its bias."""
    found = explanations[0]
    fused = [layer for layer in found.layers if layer.op == "conv_bn_act"]
    assert len(fused) == 53 and all(layer.launches == 1 for layer in fused)
    rest = [layer for layer in found.layers if layer.backend == "pytorch"]
    assert {layer.op for layer in rest} == {"max_pool2d", "adaptive_avg_pool2d", "linear"}
    assert found.total.launches == 53 + sum(layer.launches for layer in rest) <= 57
    # v1.5, whose stride is on the 3x3: more than the 3.8 of the paper
    assert round(found.total.flops / 128 / 2e9, 1) == round(found.unfused.flops / 128 / 2e9, 1) == 4.1


def test_a_network_of_timm() -> None:
    timm = pytest.importorskip("timm")
    found = resfuse.explain(timm.create_model("resnet18d").eval(), (2, 3, 64, 64), device="a100")
    assert sum(layer.op == "conv_bn_act" for layer in found.layers) == 22, "three in the stem"
    assert {layer.path for layer in found.layers} >= {"conv1.0", "layer4.1.conv2", "layer2.0.downsample.1", "fc"}


def test_an_unknown_operator_is_estimated_and_said_to_be() -> None:
    class Cumulated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(1).relu()

    found = resfuse.explain(Cumulated(), (4, 8), device=CPU, backward=False)
    assert [(layer.op, layer.estimated, layer.bytes) for layer in found.layers] == [
        ("cumsum", True, 256),
        ("relu", False, 256),
    ]
    assert "estimated: cumsum: no FLOPs" in str(found)


def test_a_fused_model_is_explained_as_it_is() -> None:
    model = small().eval()
    expected = resfuse.explain(model, IMAGES, device=CPU)
    resfuse.fuse_(model)
    assert resfuse.explain(model, torch.empty(IMAGES), device=CPU) == expected


# Backends


@pytest.mark.parametrize(
    ("device", "convolution", "normalisation"),
    [("h200", "triton", "cuda"), ("H100", "triton", "cuda"), ("b200", "triton", "cuda"), ("a100", "cuda", "cuda")],
)
def test_the_backend_of_a_gpu_that_is_not_there(device: str, convolution: str, normalisation: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.ReLU()
    )
    found = resfuse.explain(model.bfloat16().eval(), (4, 8, 16, 16), device=device)
    backends = {layer.op: layer.backend for layer in found.layers}
    assert backends == {"conv_bn_act": convolution, "max_pool2d": "pytorch", "bn_act": normalisation}
    reasons = {layer.op: layer.reason for layer in found.layers}
    assert reasons["max_pool2d"] == "PyTorch's own operator"
    assert reasons["bn_act"] == "first in the order of preference"
    assert ("not cuda: triton should be faster" in reasons["conv_bn_act"]) == (convolution == "triton")
    assert found.device is DEVICES[device.lower()]


def test_what_the_kernels_do_not_run_is_said() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).double().eval()
    (layer,) = resfuse.explain(model, (4, 8, 16, 16), device="a100").layers
    assert layer.backend == "reference"
    assert "cuda computes in float32, bfloat16 and float16, not torch.float64" in layer.reason
    old = dataclasses.replace(describe("a100"), name="NVIDIA V100", capability=(7, 0))
    (layer,) = resfuse.explain(model.float(), (4, 8, 16, 16), device=old).layers
    assert layer.backend == "reference" and "compute capability 8.0 or newer" in layer.reason


def test_a_requested_backend_counts() -> None:
    model = small().eval()

    def backends(**options: Any) -> set[tuple[str, str]]:
        found = resfuse.explain(model, IMAGES, **options)
        return {(layer.backend, layer.reason) for layer in found.layers if layer.op == "conv_bn_act"}

    assert backends(device="h200", backend="cuda") == {("cuda", "asked for by name")}
    with resfuse.use_backend("reference"):
        assert backends(device=CPU) == backends(device="h200") == {("reference", "asked for by name")}
    with pytest.raises(RuntimeError, match=r"no backend can run .*\n  cpu: runs on the CPU"):
        backends(device="h200", backend="cpu")
    with pytest.raises(ValueError, match=r"backend: expected one of 'cuda'.* got 'metal'"):
        backends(device="h200", backend="metal")


def test_why_a_module_is_not_fused() -> None:
    model = small().eval()
    model[0].register_forward_hook(lambda *_: None)
    found = {(layer.path, layer.op): layer for layer in resfuse.explain(model, IMAGES, device=CPU).layers}
    assert found["0", "conv2d"].backend == "pytorch"
    assert "has hooks" in found["0", "conv2d"].reason
    assert found["3.0.conv1", "conv_bn_act"].backend != "pytorch"


# Devices


def test_devices_that_can_not_be() -> None:
    model = nn.Linear(3, 4)
    for device, error, message in (
        ("h300", ValueError, "device: expected one of h200, .*torch such as cpu or cuda, got 'h300'"),
        ("xpu", ValueError, "device: expected cpu or cuda, got xpu"),
        (3.5, TypeError, "device: expected a name, a resfuse.costs.Device or a torch.device, got float"),
        (dataclasses.replace(describe("h200"), capability=None), ValueError, "has no compute capability"),
    ):
        with pytest.raises(error, match=message):
            resfuse.explain(model, (2, 3), device=device)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"device: cuda:77 is not in this machine \(\d+ GPUs\)"):
        resfuse.explain(model, (2, 3), device="cuda:77")
    for absent in (describe("h200") if not torch.cuda.is_available() else describe("b200"), CPU):
        with pytest.raises(ValueError, match=f"measure: {absent.name} is not in this machine"):
            resfuse.explain(model, (2, 3), device=absent, measure=True)


def test_without_a_device_it_is_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(machine, "_measured", lambda device: asked.append(device) or CPU)
    for model in (nn.Linear(3, 4), on_meta(nn.Linear, 3, 4), nn.ReLU()):
        resfuse.explain(model, (2, 3))
    resfuse.explain(nn.ReLU(), (2, 3), device=torch.device("cpu"))
    resfuse.explain(nn.ReLU(), (2, 3), device="cpu")
    assert asked == [torch.device("cpu")] * 5


def test_a_described_gpu_that_is_there_is_that_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ("NVIDIA T4", "NVIDIA H200")[index])
    monkeypatch.setattr(machine, "_measured", lambda device: describe("b200"))
    model = nn.ReLU()
    described, place = machine.find("h200", model)
    assert (described, place) == (DEVICES["h200"], torch.device("cuda:1")) and machine.is_here(described, place)
    described, place = machine.find("a100", model)
    assert place == machine.AbsentDevice((8, 0)) and not machine.is_here(described, place)
    assert machine.find("cuda", model) == (DEVICES["b200"], torch.device("cuda:1"))


# Measuring


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("as_pytorch", [False, True])
def test_every_call_can_be_made_alone(training: bool, as_pytorch: bool) -> None:
    model = nn.Sequential(small(), nn.MaxPool2d(2), models.cifar_resnet(8, in_channels=128)).train(training)
    tracer = Tracer(model, ((2, 3, 64, 64),))
    resfuse.fuse_(tracer.model)
    calls = tracer.calls(as_pytorch=as_pytorch)
    assert {call.operation.name for call in calls} >= ({"conv2d", "add"} if as_pytorch else {"conv_bn_act"})
    stopwatch = measure.Stopwatch(torch.device("cpu"), 0, None, backward=training)
    generator = torch.Generator().manual_seed(0)
    for call in calls:
        arguments = {name: stopwatch._random(name, value, generator) for name, value in call.arguments.items()}
        with torch.no_grad():
            output = measure.first_tensor(function_for(call)(arguments))
        assert (tuple(output.shape), output.dtype) == (call.operation.output.shape, call.operation.output.dtype)
        result = stopwatch._run(call, generator)()
        leaves = [name for name in call.arguments if name in call.requires_grad]
        if not training or not leaves:
            assert isinstance(measure.first_tensor(result), Tensor)
            continue
        assert isinstance(result, tuple)
        for name, gradient in zip(leaves, result, strict=True):
            assert gradient.shape == call.arguments[name].shape, (call.operation.name, name)


def test_a_measured_call_computes_what_the_model_does() -> None:
    """The layer alone, on the model's own tensors."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()).eval()
    tracer = Tracer(model, (IMAGES,))
    resfuse.fuse_(tracer.model)
    (call,) = tracer.calls()
    conv, bn = model[0], model[1]
    images = torch.randn(IMAGES)
    own = {"input": images, "conv_weight": conv.weight, "conv_bias": conv.bias, "residual": None, "weight": bn.weight,
           "bias": bn.bias, "running_mean": bn.running_mean, "running_var": bn.running_var}  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(function_for(call)(own), model(images))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every call takes a millisecond; how many runs each call had."""
    runs: list[int] = []
    monkeypatch.setattr(measure, "time_on_cpu", lambda found: (runs.append(len(found)), found[0]()) and 1e-3)
    return runs


@pytest.mark.parametrize("training", [False, True])
def test_measured_times_and_what_is_lost(training: bool, clock: list[int]) -> None:
    found = resfuse.explain(small().train(training), IMAGES, device=HERE, measure=True)
    assert {layer.measured for layer in found.layers} == {1e-3}
    assert found.total.measured == pytest.approx(1e-3 * len(found.layers))
    assert found.unfused.measured is not None and found.unfused.measured > found.total.measured
    for layer in found.layers:
        assert layer.lost == 1e-3 - layer.seconds
        assert layer.gap == (None if layer.seconds == 0 else 1e-3 / layer.seconds)
    assert found.total.lost == pytest.approx(sum(layer.lost or 0 for layer in found.layers))
    assert [layer.lost for layer in found.slowest] == sorted((layer.lost for layer in found.layers), reverse=True)
    assert len(clock) < len(found.layers) + 30, "equal calls are measured once"
    assert min(clock) >= 2, "inputs take turns"


def test_a_real_clock() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).train()
    parameters = [parameter.clone() for parameter in model.parameters()]
    found = resfuse.explain(model, (1, 3, 4, 4), device=HERE, measure=True)
    assert all(layer.measured is not None and layer.measured > 0 for layer in found.layers)
    assert all(torch.equal(before, after) for before, after in zip(parameters, model.parameters(), strict=True))
    assert model[1].num_batches_tracked == 0 and model[0].weight.grad is None


class FakeCuda(SimpleNamespace):
    """As much of torch.cuda as timing needs: the clock stands still but for the runs, which all take the same."""

    def __init__(self, seconds: float, capturable: bool) -> None:
        self.seconds, self.runs, self.captured, self.replays = seconds, 0, 0, 0
        outer = self

        class Graph:
            def replay(self) -> None:
                outer.replays += 1
                outer.runs += self.size

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = outer.runs

            def elapsed_time(self, end: Any) -> float:
                return float(end.at - self.at) * seconds * 1e3

        class Stream:
            def wait_stream(self, other: Any) -> None:
                assert isinstance(other, Stream)

        @contextlib.contextmanager
        def graph(found: Any) -> Iterator[None]:
            if not capturable:
                raise RuntimeError("operation not permitted when stream is capturing")
            before = outer.runs
            yield
            found.size = outer.captured = outer.runs - before
            outer.runs = before

        super().__init__(
            CUDAGraph=Graph, Event=Event, Stream=Stream, current_stream=Stream, graph=graph,
            stream=lambda stream: contextlib.nullcontext(), device=lambda device: contextlib.nullcontext(),
            synchronize=lambda: None,
        )  # fmt: skip

    def run(self) -> None:
        self.runs += 1


@pytest.mark.parametrize(("seconds", "captured"), [(0.1, 3), (1e-4, 12), (1e-9, 96), (0.0, 96)])
@pytest.mark.parametrize("capturable", [False, True])
def test_timing_on_a_gpu(monkeypatch: pytest.MonkeyPatch, seconds: float, captured: int, capturable: bool) -> None:
    cuda = FakeCuda(seconds, capturable)
    monkeypatch.setattr(measure, "cuda", cuda)
    assert measure.time_on_gpu([cuda.run] * 3, torch.device("cuda", 0)) == pytest.approx(seconds)
    assert cuda.captured == (captured if capturable else 0), "short runs are repeated"
    assert (cuda.replays > 10) == capturable


def test_sets_of_tensors_do_not_fit_a_cache() -> None:
    model = nn.Conv2d(8, 8, 1, bias=False)
    (call,) = Tracer(model, ((1, 8, 16, 16),)).calls()
    size = 4 * (8 * 16 * 16 + 64)
    for cache, expected in ((1, 2), (2 * size, 5), (1 << 30, measure._MOST_SETS)):
        assert len(measure.Stopwatch(torch.device("cpu"), cache, None, False)._runs(call)) == expected


# What is printed


@pytest.fixture(scope="module")
def explanations() -> tuple[Explanation, Explanation]:
    """ResNet-50 in inference, not measured, and as if it had been, everything at half its speed."""
    found = resfuse.explain(on_meta(torchvision.models.resnet50).eval(), (128, 3, 224, 224), device="h200")
    layers = tuple(dataclasses.replace(layer, measured=2 * layer.seconds) for layer in found.layers)
    unfused = dataclasses.replace(found.unfused, measured=3 * found.unfused.seconds)
    return found, dataclasses.replace(found, layers=layers, total=Totals.of(layers), unfused=unfused)


def test_json_round_trip(explanations: tuple[Explanation, Explanation]) -> None:
    for found in explanations:
        data = json.loads(json.dumps(found.to_dict()))
        assert data == found.to_dict()
        assert len(data["layers"]) == len(found.layers)
        first = data["layers"][0]
        assert set(first) == {field.name for field in dataclasses.fields(Layer)}
        assert first["shape"] == [128, 3, 224, 224] and first["dtype"] == "float32" and first["op"] == "conv_bn_act"
        assert data["total"]["bytes"] == sum(layer["bytes"] for layer in data["layers"])
        assert data["device"]["name"] == "NVIDIA H200" and data["device"]["capability"] == [9, 0]
        assert data["inputs"] == [{"shape": [128, 3, 224, 224], "dtype": "float32"}]


@pytest.mark.parametrize("width", [70, 80, 100, 140])
def test_the_table_fits(explanations: tuple[Explanation, Explanation], width: int) -> None:
    for found in explanations:
        text = table.text(found, width=width)
        lines = text.splitlines()
        assert max(map(len, lines)) <= width
        assert "layer" in lines[2] or "layer" in lines[3]
        assert "fused    " in text and "unfused  " in text and "saved    " in text
    assert max(map(len, str(explanations[0]).splitlines())) <= 100
    assert "GFLOP" in str(explanations[0])


def test_the_table_says_what_is_lost(explanations: tuple[Explanation, Explanation]) -> None:
    assert "lost" not in str(explanations[0])
    text = str(explanations[1])
    assert "lost     " in text and " 2.00 x it" in text
    assert "lost" in text.splitlines()[2] and "ratio" in text.splitlines()[2]


def test_equal_layers_stand_together(explanations: tuple[Explanation, Explanation]) -> None:
    found = explanations[0]
    groups = table.ordered(found)
    assert sorted(len(group.layers) for group in groups)[-1] == 6  # the last convolutions of stage 3
    assert sum(len(group.layers) for group in groups) == len(found.layers)
    assert [group.weight for group in groups] == sorted((group.weight for group in groups), reverse=True)
    shown = table.text(found, shown=3)
    assert f"... and {len(groups) - 3} more rows" in shown and " x6" in str(found)
    every = table.text(found, every_layer=True)
    assert all(layer.path in every for layer in found.layers if len(layer.path) <= 24)
    assert " x6" not in every.split("fused    ")[0]


def test_rich_prints_the_same(explanations: tuple[Explanation, Explanation]) -> None:
    console_of = pytest.importorskip("rich.console").Console
    for width in (70, 100):
        for found in explanations:
            console = console_of(width=width, record=True, file=io.StringIO())
            console.print(found)
            text = console.export_text()
            assert max(map(len, text.splitlines())) <= width
            assert "layer1.0.conv3" in text and "…" not in text
            assert "first in the order" in text or "should be faster" in " ".join(text.split())


def test_numbers_have_three_digits() -> None:
    from resfuse.explain.wording import number

    values = (0.0, 0.0123, 0.9996, 1.2345, 9.996, 12.34, 99.96, 1234.5, -0.61)
    expected = ["0", "0.012", "1.00", "1.23", "10.0", "12.3", "100", "1234", "-0.610"]
    assert [number(value) for value in values] == expected
