"""Fused models leave PyTorch: torch.export, and ONNX in two ways, held against ONNX Runtime."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

import resfuse
import resfuse.nn as rnn
from resfuse.ops import decompositions
from tests import models
from tests.nn.pairs import Everything

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # The exporters' own, and onnxscript's: of treespecs, TorchScript and protobuf.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:No complete tensor found in the group:UserWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning"),
]

IMAGE = (2, 3, 48, 48)
BATCH = torch.export.Dim("batch", min=1, max=64)


def torchvision_model() -> nn.Module:
    return models.small_resnet(Bottleneck).eval()


def own_modules() -> nn.Module:
    return models.seeded(Everything).eval()


def fused_model() -> nn.Module:
    model = torchvision_model()
    resfuse.fuse_(model)
    return model


def unfused_model() -> nn.Module:
    return resfuse.unfuse_(fused_model())


def targets(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def exported(model: nn.Module, **options: Any) -> torch.export.ExportedProgram:
    return torch.export.export(model, (models.random_input(IMAGE),), dynamic_shapes=({0: BATCH},), **options)


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export(strict: bool) -> None:
    """One operator for each fused layer, nothing that only a backward would need, any batch, saved and loaded."""
    model = fused_model()
    program = exported(model, strict=strict)
    operators = targets(program)
    assert operators.count("resfuse.conv_bn_act_eval.default") == 17
    assert not [name for name in operators if "rsqrt" in name or "batch_norm" in name or "conv2d" in name]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (2, 1, 5):
        input = models.random_input((size, *IMAGE[1:]))
        with torch.no_grad():
            torch.testing.assert_close(loaded(input), model(input), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [fused_model, own_modules])
def test_decomposed(build: Any) -> None:
    """In PyTorch's own operators only, and equal in float64."""
    model = build().double()
    input = models.random_input(IMAGE).double()
    program = torch.export.export(model, (input,))
    assert any("resfuse" in name for name in targets(program))
    table = torch.export.default_decompositions()
    table.update(decompositions.table())
    decomposed = program.run_decompositions(table)
    assert not [name for name in targets(decomposed) if "resfuse" in name]
    torch.testing.assert_close(decomposed.module()(input), model(input))


def test_decompositions_take_every_argument() -> None:
    """Narrower residuals, biases, a weight wider than the input, strides: what the operator computes."""
    input, weight = models.random_input((2, 4, 9, 8)).bfloat16(), models.random_input((6, 2, 3, 2))
    mean, var = models.random_input((6,)), models.random_input((6,)).abs() + 0.5
    conv = ([2, 1], [1, 0], [1, 2], 2)
    residual = models.random_input((2, 6, 5, 6)).bfloat16()
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("conv_bn_act_eval", (input, weight, mean, var, var, mean, mean, residual, True, *conv, 1e-3)),
        ("conv_bn_act_eval", (input, weight, mean, var, None, None, None, None, False, *conv, 1e-5)),
        ("bn_act_eval", (residual.float(), mean, var, None, mean, residual.float()[:, :4], True, 1e-5)),
        ("add_relu_forward", (residual, residual.flip(0))),
    ]
    for name, args in calls:
        operator = getattr(torch.ops.resfuse, name).default
        found = decompositions.table()[operator](*args)
        assert found.dtype == args[0].dtype
        torch.testing.assert_close(found, operator(*args), rtol=2e-2, atol=2e-2)


def run_by_onnxruntime(file: Path, input: Tensor) -> tuple[Tensor, set[str]]:
    """The output, and which operators the file has."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: input.numpy()})
    return torch.from_numpy(output), {f"{node.domain}::{node.op_type}" for node in onnx.load(str(file)).graph.node}


def assert_exports_to_onnx(model: Any, file: Path, **options: Any) -> None:
    """Standard operators only, any batch, and the outputs of the model in ONNX Runtime."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    input = models.random_input(IMAGE)
    program = model if isinstance(model, nn.Module) else exported(model)
    torch.onnx.export(program, (input,), str(file), verbose=False, **options)
    for size in (2, 3):
        input = models.random_input((size, *IMAGE[1:]))
        output, operators = run_by_onnxruntime(file, input)
        assert {name.partition("::")[0] for name in operators} == {""}
        assert {"::Conv", "::Relu"} <= operators
        with torch.no_grad():
            torch.testing.assert_close(output, model(input), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [fused_model, unfused_model, own_modules])
def test_onnx(build: Any, tmp_path: Path) -> None:
    assert_exports_to_onnx(build(), tmp_path / "model.onnx", dynamo=True, dynamic_shapes=({0: BATCH},))


@pytest.mark.parametrize("build", [fused_model, own_modules])
def test_onnx_by_the_former_exporter(build: Any, tmp_path: Path) -> None:
    names: dict[str, Any] = {"input_names": ["input"], "dynamic_axes": {"input": {0: "batch"}}}
    assert_exports_to_onnx(build(), tmp_path / "model.onnx", dynamo=False, **names)


def test_onnx_of_a_decomposed_program(tmp_path: Path) -> None:
    """A program that was exported for another purpose still becomes ONNX."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model = fused_model()
    table = torch.export.default_decompositions()
    table.update(decompositions.table())
    file = tmp_path / "model.onnx"
    torch.onnx.export(exported(model).run_decompositions(table), (), str(file), verbose=False, dynamo=True)
    input = models.random_input((3, *IMAGE[1:]))
    output, operators = run_by_onnxruntime(file, input)
    assert "::Conv" in operators
    with torch.no_grad():
        torch.testing.assert_close(output, model(input), rtol=1e-4, atol=1e-5)
    with models.counted_calls() as calls:  # exporting leaves the model as it was
        model.train()(models.random_input(IMAGE)).sum().backward()
    assert calls.conv_bn_act == 17
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_add_relu_for_those_who_follow_operators() -> None:
    """AddReLU under torch.jit.trace and torch.func, as all modules: PyTorch's own operators."""
    module, input, residual = rnn.AddReLU(), models.random_input((3, 4)), models.random_input((3, 4), 2)
    expected = torch.relu(input + residual)
    assert torch.equal(torch.jit.trace(module, (input, residual))(input, residual), expected)
    found = torch.func.vmap(torch.func.grad(lambda x, r: module(x, r).sum()))(input, residual)
    assert torch.equal(found, (expected > 0).float())


def test_exported_program_runs_in_another_process(tmp_path: Path) -> None:
    """It imports resfuse, which registers the operators, and knows nothing else of the model."""
    model = fused_model()
    file, input = tmp_path / "model.pt2", models.random_input(IMAGE)
    torch.export.save(exported(model), file)
    torch.save(input, tmp_path / "input.pt")
    code = (
        "import sys, torch, resfuse\n"
        f"program = torch.export.load({str(file)!r}).module()\n"
        f"torch.save(program(torch.load({str(tmp_path / 'input.pt')!r})), {str(tmp_path / 'output.pt')!r})\n"
        "assert 'torchvision' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "output.pt"), model(input), rtol=1e-4, atol=1e-5)
