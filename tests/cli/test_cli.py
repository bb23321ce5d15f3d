"""`python -m resfuse info | verify`: output, exit codes, and that each command needs only its own packages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import resfuse
from resfuse import _extension
from resfuse.backends import dispatch, reference
from resfuse.cli import COMMANDS, main, networks
from resfuse.types import BatchNorm
from tests import models
from tests.needs import ROOT

ONE_OP = ["verify", "--backend", "reference", "--op", "add_relu", "--dtype", "float32"]


def words(capsys: pytest.CaptureFixture[str]) -> str:
    """Everything printed, without line breaks, so that wrapping does not matter."""
    output = capsys.readouterr()
    return " ".join((output.out + output.err).split())


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, status, expected in (
        (["fly"], 2, "invalid choice: 'fly'"),
        *(([command, "--help"], 0, description) for command, description in COMMANDS.items()),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == status
        assert expected in words(capsys)


def test_commands_need_only_their_own_packages() -> None:
    """`info`, `verify` and `explain` run in a process in which importing an optional package raises."""
    optional = ["matplotlib", "rich", "sklearn", "timm", "torchvision"]
    commands = [["info"], ONE_OP, ["explain", "cifar_resnet8", "--device", "h200"]]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({optional}));"
        f"from resfuse.cli import main; sys.exit(any([main(command) for command in {commands}]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    for expected in ("backends, by preference", "keep the contract", "conv_bn_act"):
        assert expected in run.stdout


def test_module_entry() -> None:
    run = subprocess.run([sys.executable, "-m", "resfuse", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == resfuse.__version__


def test_info_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESFUSE_CPU_BF16", "widened")
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 80
    asked = ("RESFUSE_CPU_BF16", "widened")
    for expected in (resfuse.__version__, torch.__version__, "reference", "_cpu", "_cuda", *asked):
        assert expected in text


def test_info_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["backends"]["reference"] == "available"
    assert set(facts["backends"]) == set(dispatch.PREFERENCE)
    assert set(facts["libraries"]) == {"_cpu", "_cuda", "_sm90", "_sm100"}
    sections = {"versions", "machine", "gpus", "backends", "exceptions", "libraries", "build", "environment"}
    assert sections | {"tables", "first contact"} == set(facts)
    assert "triton before cuda for conv_bn_act_forward and conv_forward on" in facts["exceptions"][0]
    assert all("(predicted, not measured)" in text for text in facts["exceptions"])


def test_info_of_a_pure_python_installation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_installed(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    reasons = {
        "_cpu": "not built: no C++ compiler [x]",
        "_cuda": "not built: no toolkit",
        **dict.fromkeys(("_sm90", "_sm100"), "not built: no CUTLASS"),
    }
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
    for expected in ("no C++ compiler [x]", "never built", "not installed"):
        assert expected in text


def test_verify_every_op_of_the_default_backend(capsys: pytest.CaptureFixture[str], one_thread: None) -> None:
    backend = resfuse.available_backends()[-2:][0]  # cpu, or reference if nothing is compiled
    assert main(["verify", "--backend", backend, "--dtype", "float32"]) == 0
    text = words(capsys)
    assert "keep the contract" in text and f"{backend} backend on cpu, float32" in text
    for op in ("add_relu", "bn_act", "conv_bn_act"):
        for quantity in ("output", "grad input", "grad residual"):
            assert f"{op} {quantity}" in text
    for quantity in ("running_mean", "running_var", "grad weight", "grad bias", "grad conv_weight", "grad conv_bias"):
        assert f"conv_bn_act {quantity}" in text


@pytest.mark.parametrize("kernel", ["add_relu_forward", "add_relu_backward"])
@pytest.mark.parametrize("wrong", [1e-6, float("nan"), float("inf"), RuntimeError("planted [bug]")])
def test_verify_finds_a_planted_mistake(
    kernel: str, wrong: float | RuntimeError, capsys: pytest.CaptureFixture[str]
) -> None:
    """One element that is wrong by 1e-6 of all others together, a single NaN or infinity, and an exception."""
    exact = getattr(reference, kernel)

    def planted(*args: Tensor) -> Tensor:
        if isinstance(wrong, RuntimeError):
            raise wrong
        result = exact(*args)
        result.view(-1)[3] += wrong * result.sum()
        return result

    with patch.object(reference, kernel, planted):
        assert main(ONE_OP) == 1
    text = words(capsys)
    assert "violation: add_relu, stage 1" in text and "break the contract" in text
    quantity = "output: E(fused)" if kernel == "add_relu_forward" else "grad input: E(fused)"
    assert ("raised RuntimeError: planted [bug]" if isinstance(wrong, RuntimeError) else quantity) in text


def test_verify_says_what_is_skipped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_extension._outcome, "_cpu", "not built: planted reason")
    assert main(["verify", "--backend", "cpu"]) == 1
    assert "cpu is skipped: not built: planted reason" in words(capsys)


@pytest.mark.parametrize("mistake", [None, "a statistic is forgotten", "the output is off by 1 %"])
def test_verify_a_model(
    mistake: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = resfuse.functional.packed_conv_bn_act

    def wrong(input: Tensor, weight: Tensor, bias: Any, settings: Any, bn: BatchNorm, *args: Any) -> Tensor:
        if mistake == "a statistic is forgotten":
            bn = bn._replace(running_mean=bn.running_mean.clone())
        output = exact(input, weight, bias, settings, bn, *args)
        return output * 1.01 if mistake == "the output is off by 1 %" else output

    network = networks.Network(torch.nn.Sequential(models.conv_bn_relu(3), torch.nn.Dropout(0.5)), (3, 8, 8))
    monkeypatch.setattr(networks, "build", lambda *_, **__: network)
    monkeypatch.setattr(resfuse.functional, "packed_conv_bn_act", wrong)
    monkeypatch.setattr(resfuse.functional, "inference", lambda *_: None)
    assert main([*ONE_OP, "--model", "small"]) == (mistake is not None)
    text = words(capsys)
    assert "small, fused by resfuse.fuse_, on cpu, bfloat16" in text
    assert ("violation: model, float32, training running_mean" in text) == (mistake == "a statistic is forgotten")
    assert ("violation: model, float32, inference output" in text) == (mistake == "the output is off by 1 %")


def test_verify_a_model_whose_output_is_no_tensor(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dictionary = networks.Network(torch.nn.LazyBatchNorm2d(), (3, 8, 8))
    monkeypatch.setattr(dictionary.model, "forward", lambda images: {"out": images})
    monkeypatch.setattr(networks, "build", lambda *_, **__: dictionary)
    assert main([*ONE_OP, "--model", "fcn"]) == 1
    assert "verify: model: expected a network whose output is a tensor, fcn returns dict" in words(capsys)


def test_verify_a_model_that_takes_no_small_images(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fixed(torch.nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            torch._assert(input.shape[-1] == self.height, "wrong height")
            return super().forward(input)

    model = Fixed(models.conv_bn_relu(3))
    monkeypatch.setattr(networks, "build", lambda *_, **__: networks.Network(model, (3, 100, 100)))
    for model.height, status in ((100, 0), (224, 1)):
        assert main([*ONE_OP, "--model", "fixed"]) == status
    assert "verify: model: fixed cannot be run on images of 100x100: wrong height" in words(capsys)


def test_unknown_networks() -> None:
    for package in ("torchvision", "timm"):
        pytest.importorskip(package)
    for name, message in (
        ("resnet51", "model: torchvision has no 'resnet51'; similar: resnet"),
        ("timm/resnet51", "model: timm has no 'resnet51'; similar: "),
        ("resfuse/resnet51", "model: resfuse.models has no 'resnet51'; it has cifar_plainN"),
        ("resfuse/cifar_resnet21", r"depth: expected 6n \+ 2"),
        ("keras/resnet50", r"model: expected NAME \(of torchvision\), timm/NAME or resfuse/NAME, got 'keras/resnet50'"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            networks.build(name)


def test_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("torchvision", "timm"):
        pytest.importorskip(package)
    for name in ("resnet18", "timm/resnet18.a1_in1k", "resfuse/resnet18", "fcn_resnet50"):
        model, shape = networks.build(name)
        assert shape == (3, 224, 224) and next(model.parameters()).is_meta
    model, shape = networks.build("cifar_resnet8", meta=False)
    assert shape == (3, 32, 32) and next(model.parameters()).device.type == "cpu"
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchvision" else find(name))
    with pytest.raises(ModuleNotFoundError, match="torchvision is not installed"):
        networks.build("resnet18")
