"""`python -m resfuse`: what the commands print, what they write, and their exit codes."""

from __future__ import annotations

import csv
import importlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import resfuse
from resfuse import _extension
from resfuse.backends import reference, registry
from resfuse.cli import COMMANDS, main, resnet50, timing

ROOT = Path(__file__).resolve().parent.parent
ONE_OP = ["verify", "--backend", "reference", "--op", "add_relu", "--dtype", "float32"]
needs_demo_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torchvision", "sklearn", "matplotlib")),
    reason="torchvision, scikit-learn or matplotlib is not installed",
)


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log of 80 columns, whatever the tests run in."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")


def words(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, without line breaks, so that wrapping does not matter."""
    return " ".join(capsys.readouterr().out.split())


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        main(["fly"])
    assert exit_code.value.code == 2
    assert "invalid choice: 'fly'" in capsys.readouterr().err


def test_module_entry_and_lazy_imports() -> None:
    version = subprocess.run(
        [sys.executable, "-m", "resfuse", "--version"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert version.stdout.strip() == resfuse.__version__
    code = "import sys, resfuse; print({'rich', 'matplotlib', 'sklearn', 'torchvision', 'timm'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.strip() == "set()"


def test_info_without_optional_packages() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['matplotlib', 'sklearn', 'timm', 'torchvision', 'triton']));"
        "from resfuse.cli import main; sys.exit(main(['info']))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "reference" in shown.stdout


def test_info_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESFUSE_CPU_POOL_MB", "77")
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 80
    for expected in (resfuse.__version__, torch.__version__, "reference", "_cpu", "_cuda", "RESFUSE_CPU_POOL_MB", "77"):
        assert expected in text


def test_info_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["backends"]["reference"] == "available"
    assert set(facts["backends"]) == set(registry.PREFERENCE)
    assert set(facts["libraries"]) == {"_cpu", "_cuda"}
    sections = {"versions", "machine", "gpus", "backends", "exceptions", "libraries", "build", "environment"}
    assert sections == set(facts)
    assert "triton before cuda for conv_bn_act_forward and conv_forward on" in facts["exceptions"][0]
    assert all("(predicted, not measured)" in text or "(measured on " in text for text in facts["exceptions"])


def test_info_of_a_pure_python_installation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_installed(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    reasons = {"_cpu": "not built: no C++ compiler [x]", "_cuda": "not built: no toolkit"}
    monkeypatch.setattr(_extension, "_outcome", dict(reasons))
    monkeypatch.setattr(_extension, "build_info", dict)
    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["libraries"] == reasons
    assert facts["backends"]["cpu"] == reasons["_cpu"]
    assert facts["machine"]["resfuse's kernels"] is None
    assert [facts["versions"][name] for name in ("torchvision", "timm", "triton")] == [None] * 3
    assert main(["info"]) == 0
    text = words(capsys)
    assert "no C++ compiler [x]" in text
    assert "never built" in text
    assert "not installed" in text


def test_verify_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ONE_OP) == 0
    text = words(capsys)
    assert "keep the contract" in text
    for quantity in ("output", "grad input", "grad residual"):
        assert quantity in text


def test_verify_every_op_of_the_default_backend(capsys: pytest.CaptureFixture[str]) -> None:
    backend = registry.available_backends()[-2:][0]  # cpu, or reference where nothing is compiled
    assert main(["verify", "--backend", backend, "--dtype", "float32"]) == 0
    text = words(capsys)
    for expected in ("add_relu", "bn_act", "conv_bn_act", "running_var", "grad conv_weight", "grad conv_bias"):
        assert expected in text


def test_verify_finds_a_planted_violation(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    exact = reference.add_relu_forward

    def off_by_a_millionth(input: Tensor, residual: Tensor) -> Tensor:
        return exact(input, residual) * (1 + 1e-6)

    monkeypatch.setattr(reference, "add_relu_forward", off_by_a_millionth)
    assert main(ONE_OP) == 1
    text = words(capsys)
    assert "violation add_relu, stage 1" in text
    assert "break the contract" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_verify_finds_one_wrong_element(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    exact = reference.add_relu_backward

    def one_wrong(grad_output: Tensor, output: Tensor) -> Tensor:
        grad = exact(grad_output, output)
        grad.view(-1)[3] = value
        return grad

    monkeypatch.setattr(reference, "add_relu_backward", one_wrong)
    assert main(ONE_OP) == 1
    assert "grad input: E(fused)" in words(capsys)


def test_verify_reports_a_backend_that_raises(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Tensor:
        raise RuntimeError("planted [bug]")

    monkeypatch.setattr(reference, "add_relu_forward", broken)
    assert main(ONE_OP) == 1
    assert "raised RuntimeError: planted [bug]" in words(capsys)


def test_verify_says_what_is_left_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_extension._outcome, "_cpu", "not built: planted reason")
    assert main(["verify", "--backend", "cpu"]) == 1
    assert "planted reason" in words(capsys)


@needs_demo_packages
def test_verify_an_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ONE_OP, "--model", "resnet51"]) == 1
    assert "torchvision has no model 'resnet51'" in words(capsys)


@needs_demo_packages
@pytest.mark.slow
def test_verify_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ONE_OP, "--model", "resnet18"]) == 0
    assert "resnet18, fused by resfuse.fuse_" in words(capsys)


@needs_demo_packages
@pytest.mark.slow
def test_demo_writes_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resnet50, "NAME", "resnet18")
    threads = torch.get_num_threads()
    assert main(["demo", "--quick", "--threads", "1", "--output", str(tmp_path / "results")]) == 0
    assert torch.get_num_threads() == threads
    output = capsys.readouterr().out
    assert max(len(line) for line in output.splitlines()) <= 80
    for expected in ("What runs where", "backend", "accuracy", "images/s", "benchmarks/"):
        assert expected in output
    assert (tmp_path / "results" / "demo.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "results" / "demo.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["version"] for row in rows} == {"eager", "eager, channels_last", "fused"}
    assert {row["threads"] for row in rows} == {"1"}
    accuracy = {row["version"]: float(row["value"]) for row in rows if row["quantity"] == "test_accuracy"}
    assert min(accuracy.values()) > 0.5
    assert all(float(row["value"]) > 0 for row in rows)


def test_demo_names_missing_packages(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    assert main(["demo"]) == 1
    said = words(capsys)
    assert "scikit-learn" in said and "pip install 'resfuse[demo]'" in said


def test_timing_takes_turns() -> None:
    calls: list[str] = []
    alternatives = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    timings = timing.interleave(alternatives, 2, torch.device("cpu"))
    assert calls == ["a", "b"] * 3
    assert [len(timings[name].seconds) for name in ("a", "b")] == [2, 2]


def test_timing_keeps_to_its_budget() -> None:
    timings = timing.interleave({"a": lambda: None}, 100, torch.device("cpu"), budget=0)
    assert len(timings["a"].seconds) == 3


def test_timing_quantiles() -> None:
    times = timing.Timing((3.0, 1.0, 2.0, 5.0, 4.0))
    assert (times.median, times.quantile(0), times.quantile(0.2), times.quantile(1)) == (3, 1, 2, 5)


EXPLAIN = ["explain", "resnet18", "--batch", "8", "--size", "64"]


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_explain_a_network_on_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    assert main([*EXPLAIN, "--device", "h200", "--dtype", "bfloat16"]) == 0
    lines = lines_of(capsys)
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "ResNet, eval(), forward, 8x3x64x64 bfloat16, on NVIDIA H200" in text
    assert "layer1.0.conv1 x2" in text and "conv_bn_act 3x3 +res" in text
    assert "triton: conv_bn_act x20: not cuda: triton should be faster" in text


def test_explain_every_layer_of_a_training_step(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["explain", "cifar_resnet8", "--batch", "4", "--device", "a100", "--train", "--dtype", "bfloat16"]
    assert main([*command, "--layers", "all", "--backend", "reference"]) == 0
    lines = lines_of(capsys)
    text = " ".join(" ".join(lines).split())
    assert "train(), forward and backward, 4x3x32x32 float32" in text
    assert "reference: conv_bn_act x7: asked for by name" in text
    assert [line.split()[0] for line in lines if " conv_bn_act " in line][:3] == [
        "conv1",
        "layer1.0.conv1",
        "layer1.0.conv2",
    ]
    assert sum(" to " in line for line in lines[:-8]) >= 8, "autocast's casts"


def test_explain_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("timm")
    command = ["explain", "timm/resnet18", "--batch", "2", "--size", "64", "--device", "h100"]
    file = tmp_path / "made" / "explain.json"
    assert main([*command, "--json", "--output", str(file)]) == 0
    printed = capsys.readouterr().out
    assert file.read_text() == printed
    found = json.loads(printed)
    assert found["inputs"][0]["shape"] == [2, 3, 64, 64] and found["device"]["name"].startswith("NVIDIA H100")
    assert sum(layer["op"] == "conv_bn_act" for layer in found["layers"]) == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet51"], "model: torchvision has no 'resnet51'; similar: resnet"),
        (["timm/resnet51"], "model: timm has no 'resnet51'; similar: "),
        (["resfuse/resnet51"], "model: resfuse.models has no 'resnet51'; it has cifar_plainN"),
        (["resfuse/cifar_resnet21"], "depth: expected 6n + 2"),
        (["keras/resnet50"], "model: expected NAME (of torchvision), timm/NAME or resfuse/NAME, got 'keras/resnet50'"),
        (["cifar_resnet8", "--batch", "0"], "--batch: expected at least 1, got 0"),
        (["cifar_resnet8", "--device", "h300"], "device: expected one of h200, "),
        (["cifar_resnet8", "--device", "b200", "--measure"], "measure: NVIDIA B200 is not in this machine"),
        (["cifar_resnet8", "--device", "a100", "--backend", "cpu"], "no backend can run"),
    ],
)
def test_explain_says_what_is_wrong(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    for package in ("torchvision", "timm"):
        pytest.importorskip(package)
    assert main(["explain", *arguments]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"explain: {message}")


def test_explain_without_torchvision(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchvision" else find(name))
    assert main(EXPLAIN) == 1
    assert "explain: torchvision is not installed" in capsys.readouterr().err


def test_each_command_is_described_by_its_module(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        module = importlib.import_module(f"resfuse.cli.{name}")
        assert " ".join((module.__doc__ or "").partition("\n")[0].split()) in words(capsys)


def test_a_command_needs_only_its_own_packages() -> None:
    """On a machine without rich, which others print with."""
    code = (
        "import sys; sys.modules['rich'] = None;"
        "from resfuse.cli import main; sys.exit(main(['explain', 'cifar_resnet8', '--device', 'h200']))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "conv_bn_act" in shown.stdout


def test_the_page_on_explain_shows_what_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.setenv("COLUMNS", "100")
    page = (ROOT / "docs" / "explain.md").read_text()
    command = next(line for line in page.splitlines() if line.startswith("python -m resfuse explain"))
    assert main(command.split()[3:]) == 0
    assert f"```text\n{capsys.readouterr().out}```" in page, f"`{command}` prints something else now"
