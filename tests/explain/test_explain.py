"""`resfuse.explain`: whole networks against known totals, backends and reasons, measured times, table and command."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import resfuse
from resfuse import cli, models
from resfuse import explain as _function
from resfuse.explanation import Explanation, Layer, Totals
from resfuse.fuse.report import FuseReport, LeftModule
from resfuse.roofline import DEVICES, Device, processor_name

torchvision = pytest.importorskip("torchvision")

CPU = Device("a CPU", "cpu", 1e10, {torch.float32: 1e11}, "made up")
HERE = dataclasses.replace(CPU, name=processor_name(), cache=1 << 10)
IMAGES = (2, 3, 32, 32)


def on_meta(build: Any, *args: Any, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return build(*args, **options)


def small() -> nn.Module:
    """Two residual blocks, the second with a projection."""
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
    return nn.Sequential(model.conv1, model.bn1, model.relu, model.layer1, model.layer2)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that the function hides, with ceilings that are not measured."""
    found: Any = sys.modules["resfuse.explain"]
    assert found.explain is _function
    found.asked = []
    monkeypatch.setattr(found, "_measured", lambda device: found.asked.append(device) or HERE)
    return found


# Figures


@pytest.mark.parametrize(("training", "eager", "fused"), [(False, 24e3, 59e3), (True, 8.0e3, 10.8e3)])
def test_resnet50_on_an_h200_as_in_the_design(training: bool, eager: float, fused: float) -> None:
    """DESIGN.md, section 6: images per second if every operator ran at the limit of an H200, batch 256, bfloat16."""
    model = on_meta(torchvision.models.resnet50).bfloat16().train(training)
    found = resfuse.explain(model, (256, 3, 224, 224), device="h200")
    assert 256 / found.unfused.seconds == pytest.approx(eager, rel=0.04)
    assert 256 / found.total.seconds == pytest.approx(fused, rel=0.04)


@pytest.mark.parametrize("training", [False, True])
def test_flops_of_resnet50_are_those_that_torch_counts(training: bool) -> None:
    model, shape = on_meta(torchvision.models.resnet50).train(training), (2, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        output = model(torch.empty(shape, device="meta"))
        if training:
            output.sum().backward()
    found = resfuse.explain(model, shape, device="h200")
    assert found.total.flops == found.unfused.flops == counter.get_total_flops()
    if not training:  # v1.5, whose stride is on the 3x3: the multiply-adds that torchvision names
        assert found.total.flops == 2 * 2 * 4_089_184_256


@pytest.mark.parametrize("training", [False, True])
def test_totals_are_sums_and_fusing_saves(training: bool) -> None:
    model = on_meta(torchvision.models.resnet18).bfloat16().train(training)
    found = resfuse.explain(model, (64, 3, 224, 224), device="h200", backend="cuda")
    assert found.total == Totals.of(found.layers) and found.training == found.backward == training
    for name in ("launches", "bytes", "seconds"):
        assert getattr(found.total, name) == pytest.approx(sum(getattr(layer, name) for layer in found.layers))
        assert 0 < getattr(found.total, name) < getattr(found.unfused, name)
    for layer in found.layers:
        least = max(layer.flops / found.device.rate(layer.dtype), layer.bytes / found.device.bandwidth)
        assert layer.seconds >= least * (1 - 1e-9), "no less than all its kernels as one"
    bounds = {layer.path: layer.bound for layer in found.layers if layer.op == "conv_bn_act"}
    assert bounds["conv1"] == "memory" and bounds["layer4.1.conv2"] == "compute"
    assert found.slowest[0].seconds == max(layer.seconds for layer in found.layers)


def test_backward_can_be_left_out_and_asked_for() -> None:
    model = on_meta(models.cifar_resnet, 8).train()
    step, forward = (resfuse.explain(model, (128, 3, 32, 32), device="h200", backward=b) for b in (None, False))
    stem = next(layer for layer in forward.layers if layer.op == "conv_bn_act")
    assert step.total.flops == 3 * forward.total.flops - stem.flops, "the images need no gradient"
    assert forward.training and not forward.backward and {layer.backward_backend for layer in forward.layers} == {None}
    frozen = resfuse.explain(model.eval(), (128, 3, 32, 32), device="h200", backward=True)
    assert frozen.total.flops > 3 * forward.total.flops - stem.flops, "z is computed again"


def test_recomputation_reads_z_and_writes_the_activation_again() -> None:
    model, shape = on_meta(torchvision.models.resnet50).bfloat16().train(), (4, 3, 224, 224)
    plain, again = (resfuse.explain(model, shape, device="h200", recompute=recompute) for recompute in (False, True))
    # All but the stem's, which PyTorch's pooling keeps.
    layers = [layer for layer in plain.layers if layer.op == "conv_bn_act"][1:]
    assert again.total.launches - plain.total.launches == len(layers) == 52
    sizes = [2 * 4 * math.prod(layer.output_shape[1:]) for layer in layers]
    residuals = sum(size for size, layer in zip(sizes, layers, strict=True) if "+res" in layer.detail)
    vectors = sum(2 * layer.output_shape[1] * 2 + 2 * layer.output_shape[1] * 4 for layer in layers)
    assert again.total.bytes - plain.total.bytes == 2 * sum(sizes) + residuals + vectors
    fused = torchvision.models.resnet18().train()
    resfuse.fuse_(fused, recompute=True)
    assert (
        resfuse.explain(fused, shape).total
        == resfuse.explain(torchvision.models.resnet18().train(), shape, recompute=True).total
    )
    assert resfuse.explain(model.eval(), shape, recompute=True).total == resfuse.explain(model.eval(), shape).total


def test_a_fused_model_is_explained_as_it_is() -> None:
    model = small().eval()
    expected = resfuse.explain(model, IMAGES, device=CPU)
    resfuse.fuse_(model)
    assert resfuse.explain(model, torch.empty(IMAGES), device=CPU) == expected
    assert expected.model == "Sequential" and expected.inputs == ((IMAGES, torch.float32),)


# Backends


@pytest.mark.parametrize(("device", "convolution"), [("H100", "triton"), ("a100", "cuda")])
def test_the_backend_of_a_gpu_that_is_not_there(device: str, convolution: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.ReLU()
    )
    found = resfuse.explain(model.bfloat16().train(), (4, 8, 16, 16), device=device)
    layers = {layer.op: layer for layer in found.layers if layer.op != "add"}
    assert [layer.backend for layer in layers.values()] == [convolution, "pytorch", "cuda"]
    assert layers["conv_bn_act"].backward_backend in ("cuda", "reference")  # either way cuDNN's gradients
    assert layers["bn_act"].backward_backend == "cuda" and layers["bn_act"].reason == "first in the order of preference"
    assert layers["max_pool2d"].reason == "PyTorch's own operator"
    assert ("not cuda: triton should be faster" in layers["conv_bn_act"].reason) == (convolution == "triton")
    assert found.device is DEVICES[device.lower()]


def test_why_a_backend_is_passed_over() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).double().eval()
    (layer,) = resfuse.explain(model, (4, 8, 16, 16), device="a100").layers
    assert layer.backend == "reference" and layer.launches == 3, "convolution, bias, batch norm of cuDNN"
    assert "cuda computes in float32, bfloat16 and float16, not torch.float64" in layer.reason


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


def test_the_reference_costs_what_eager_costs() -> None:
    found = resfuse.explain(small().eval(), IMAGES, device="h200", backend="reference")
    assert found.total == found.unfused


def test_why_a_module_is_not_fused() -> None:
    model = small().eval()
    model[0].register_forward_hook(lambda *_: None)
    found = {(layer.path, layer.op): layer for layer in resfuse.explain(model, IMAGES, device=CPU).layers}
    assert found["0", "convolution"].backend == "pytorch"
    assert "has hooks" in found["0", "convolution"].reason
    assert found["3.0.conv1", "conv_bn_act"].backend != "pytorch"


def test_the_nearest_reason_counts(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [LeftModule("0", "inner"), LeftModule("", "outer")]
    for order in (left, left[::-1]):
        monkeypatch.setattr(module, "fuse_", lambda model, order=order: FuseReport(left=order))
        found = resfuse.explain(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), IMAGES, device=CPU)
        assert [layer.reason for layer in found.layers] == ["not fused: inner", "not fused: outer"]


# Devices


def test_devices_that_cannot_be() -> None:
    model = nn.Linear(3, 4)
    for device, error, message in (
        ("h300", ValueError, "device: expected one of h200, .*torch such as cpu, got 'h300'"),
        ("xpu", ValueError, "device: expected a CPU or a CUDA device, got xpu"),
        (3.5, TypeError, "device: expected a name, a resfuse.roofline.Device or a torch.device, got float"),
        (dataclasses.replace(DEVICES["h200"], capability=None), ValueError, "has no compute capability"),
        ("cuda:77", ValueError, r"device: cuda:77 is not in this machine \(\d+ GPUs\)"),
    ):
        with pytest.raises(error, match=message):
            resfuse.explain(model, (2, 3), device=device)  # type: ignore[arg-type]
    for absent in (DEVICES["h200" if not torch.cuda.is_available() else "b200"], CPU):
        with pytest.raises(ValueError, match=f"measure: {absent.name} is not in this machine"):
            resfuse.explain(model, (2, 3), device=absent, measure=True)


def test_without_a_device_it_is_the_models_own(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of `DEVICES` that is in this machine is that GPU."""
    for model in (nn.Linear(3, 4), on_meta(nn.Linear, 3, 4), nn.ReLU()):
        resfuse.explain(model, (2, 3))
    resfuse.explain(nn.ReLU(), (2, 3), device=torch.device("cpu"))
    resfuse.explain(nn.ReLU(), (2, 3), device="cpu")
    assert module.asked == [torch.device("cpu")] * 5
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: ("NVIDIA T4", "NVIDIA H200")[gpu.index])
    assert module._find("h200", nn.ReLU()) == (DEVICES["h200"], torch.device("cuda:1"))
    assert module._find("a100", nn.ReLU()) == (DEVICES["a100"], module.AbsentDevice((8, 0), name=DEVICES["a100"].name))


# Measuring


@pytest.mark.parametrize("training", [False, True])
def test_measured_times(training: bool, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every recorded operator runs alone, forward and backward, once for equal ones."""
    monkeypatch.setattr(module, "_SECONDS", 0.0)
    head = (nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), resfuse.nn.BasicBlock(8, 8), *head)
    found = resfuse.explain(model.train(training), IMAGES, measure=True)
    assert all(layer.measured is not None and layer.measured > 0 for layer in found.layers)
    assert found.total.measured == pytest.approx(sum(layer.measured or 0 for layer in found.layers))
    assert found.unfused.measured is not None
    assert [layer.lost for layer in found.slowest] == sorted((layer.lost for layer in found.layers), reverse=True)
    assert "measured time" in str(found) and model[1].num_batches_tracked == 0


def test_a_measured_operator_gets_tensors_of_the_models_strides(module: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).to(memory_format=torch.channels_last).eval()
    tracer = module.Tracer(model, (IMAGES,))
    resfuse.fuse_(tracer.model)
    (call,) = tracer.calls(backward=False)
    given = module.named_arguments(call.forward[0].func, call.forward[0].args, call.forward[0].kwargs)
    values = module._random(given, "cpu")
    assert given.keys() == values.keys() and values["running_var"].min() >= 0.5 and values["residual"] is None
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            assert (values[name].shape, values[name].stride()) == (value.shape, value.stride())
    assert call.forward[0].func(**values).shape == call.forward[0].output.shape


# Printed


@pytest.fixture(scope="module")
def explanations() -> tuple[Explanation, Explanation]:
    """ResNet-50 in inference, not measured, and as if it had been, everything at half its speed."""
    model = on_meta(torchvision.models.resnet50).eval().bfloat16()
    found = resfuse.explain(model, (128, 3, 224, 224), device="h200")
    layers = tuple(dataclasses.replace(layer, measured=2 * layer.seconds) for layer in found.layers)
    unfused = dataclasses.replace(found.unfused, measured=3 * found.unfused.seconds)
    return found, dataclasses.replace(found, layers=layers, total=Totals.of(layers), unfused=unfused)


def test_json_round_trip(explanations: tuple[Explanation, Explanation]) -> None:
    for found in explanations:
        data = json.loads(json.dumps(found.to_dict()))
        assert data == found.to_dict() and len(data["layers"]) == len(found.layers)
        first = data["layers"][0]
        assert set(first) == {field.name for field in dataclasses.fields(Layer)}
        assert first["shape"] == [128, 3, 224, 224] and first["dtype"] == "bfloat16" and first["op"] == "conv_bn_act"
        assert data["total"]["bytes"] == sum(layer["bytes"] for layer in data["layers"])
        assert data["device"]["name"] == "NVIDIA H200" and data["device"]["rates"]["bfloat16"] == 790e12
        assert data["inputs"] == [{"shape": [128, 3, 224, 224], "dtype": "bfloat16"}]


def test_the_table(explanations: tuple[Explanation, Explanation]) -> None:
    """53 convolutions, one pooling, one mean, and a matrix product with its bias.

    Unfused: batch norms of two launches, ReLU behind all but four of them, 16 sums, two poolings, the classifier.
    """
    layers = explanations[0].layers
    assert [layer.op for layer in layers if layer.op != "conv_bn_act"] == ["max_pool2d", "mean", "addmm"]
    assert len(layers) == 56 and 53 * 3 + 49 + 16 + 2 + 1 == 227
    plain, measured = map(str, explanations)
    assert plain.startswith("ResNet, eval(), forward, 128x3x224x224 bfloat16, on NVIDIA H200\n")
    for line in ("fused    56 launches, 1047 GFLOP, ", "unfused  227 launches, ", "saved    75 % of the launches"):
        assert line in plain and line in measured
    assert " lost" in measured.splitlines()[2] and " lost" not in plain.splitlines()[2]
    expected = 1 - 2 * explanations[0].total.seconds / (3 * explanations[0].unfused.seconds)
    assert f", {100 * expected:.0f} % of the measured time" in measured and "% of the measured" not in plain
    assert "sm90: conv_bn_act x53: not cuda: triton should be faster" in plain
    assert "conv_bn_act 3x3/2 " in plain and "conv_bn_act 1x1 +res " in plain


@pytest.mark.parametrize("width", [70, 80, 110])
def test_the_table_fits(explanations: tuple[Explanation, Explanation], width: int) -> None:
    for found, measured in zip(explanations, (False, True), strict=True):
        lines = found.table(width=width).splitlines()
        head = lines[2].split()
        assert max(map(len, lines)) <= width
        assert (head[0], "GFLOP" in head, "lost" in head) == ("layer", width == 110, measured)


def test_equal_layers_stand_together_the_worst_first(explanations: tuple[Explanation, Explanation]) -> None:
    found = explanations[0]
    rows = found.table(shown=3).splitlines()
    assert rows[4].startswith("layer1.0.conv3 x3 ") and "... and 24 more rows, together " in rows[7]
    assert " x6 " in str(found), "the last convolutions of stage 3"
    every = found.table(every_layer=True)
    assert all(layer.path in every for layer in found.layers) and " x6 " not in every.split("fused    ")[0]


@pytest.mark.parametrize("training", [False, True])
def test_the_command(training: bool, capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    options = ["--batch", "8", "--device", "h200", "--dtype", "bfloat16", "--output", str(tmp_path / "a" / "b.json")]
    assert cli.main(["explain", "cifar_resnet8", *options, "--json", *(["--training"] if training else [])]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data == json.loads((tmp_path / "a" / "b.json").read_text())
    assert (data["training"], data["inputs"][0]["shape"], data["model"]) == (training, [8, 3, 32, 32], "CifarResNet")
    assert {layer["dtype"] for layer in data["layers"] if layer["op"] == "conv_bn_act"} == {"bfloat16"}
    assert cli.main(["explain", "cifar_resnet8", "--size", "16", "--device", "a100", "--layers", "all"]) == 0
    assert "1x3x16x16 float32, on NVIDIA A100" in capsys.readouterr().out


def test_the_page_shows_what_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    page = (Path(__file__).parents[2] / "docs" / "explain.md").read_text()
    command = next(line for line in page.splitlines() if line.startswith("python -m resfuse explain"))
    assert cli.main(command.split()[3:]) == 0
    assert f"```text\n{capsys.readouterr().out}```" in page, f"`{command}` prints something else now"


def test_the_command_says_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--batch", "0"], "--batch: expected at least 1, got 0"),
        (["--device", "h300"], "device: expected one of h200"),
        (["--device", "a100", "--backend", "cpu"], "no backend can run"),
    ):
        assert cli.main(["explain", "cifar_resnet8", *arguments]) == 1
        assert f"explain: {message}" in capsys.readouterr().err
