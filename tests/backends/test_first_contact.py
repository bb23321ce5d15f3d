"""First contact: kernels of a GPU are chosen where they have been right, and left out with a reason where not."""

from __future__ import annotations

import os
import sys
import threading
import time
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from resfuse.backends import cuda, cuda_conv, dispatch, first_contact, reference, sm90, stems, triton
from resfuse.cli import info, verify
from resfuse.types import Convolution, Problem
from tests.backends import planted_kernels

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stands for a GPU")

GPU, DTYPE = torch.device("cuda", 0), torch.bfloat16
FACTS = {"gpu": "Testing 3000", "driver": "1", "torch": "2", "triton": "3", "kernels": "4"}
RIGHT = dict.fromkeys(cuda.KERNELS)


class FakeGPU:
    """A GPU on which both backends seem to run, and what a check of their kernels would find."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing, self.facts = False, dict(FACTS)
        self.verdicts: dict[str, str | None] = dict(RIGHT)
        self.checked: list[str] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr("resfuse.types._capability", lambda device: (8, 0))
        for module in (cuda, triton):
            monkeypatch.setattr(module, "unavailable_reason", lambda: None)
            monkeypatch.setattr(module, "only_on_request_reason", lambda: None)
            monkeypatch.setattr(module, "unsupported_reasons", lambda problem: [])
        monkeypatch.setattr(first_contact, "_known", {})
        monkeypatch.setattr(first_contact, "identity", lambda backend, device: self.facts)
        monkeypatch.setattr(first_contact, "check", self.check)

    def check(self, backend: str, dtype: torch.dtype, device: int) -> dict[str, str | None]:
        self.checked.append(backend)
        return dict(self.verdicts)

    def another_process(self) -> None:
        first_contact._known.clear()
        dispatch.choose.cache_clear()

    def choice(self, kernel: str = "bn_statistics") -> tuple[str, dict[str, list[str]]]:
        return dispatch.explain_choice(Problem(kernel, GPU, DTYPE, torch.Size((2, 16, 8, 8))))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeGPU]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("RESFUSE_FIRST_CONTACT", raising=False)
    dispatch.choose.cache_clear()
    yield FakeGPU(monkeypatch)
    dispatch.choose.cache_clear()


# --- what becomes of a verdict ---------------------------------------------------------------------------------------


def test_one_check_is_stored_for_all_processes(gpu: FakeGPU, caplog: pytest.LogCaptureFixture) -> None:
    for kernel in ("bn_statistics", "bn_apply"):
        assert gpu.choice(kernel)[0] == "cuda"
    gpu.another_process()
    assert gpu.choice()[0] == "cuda"
    assert gpu.checked == ["cuda"]
    assert [record.getMessage() for record in caplog.records] == [
        "checking the cuda kernels for bfloat16 on Testing 3000, once: about a minute"
    ]
    for fact in FACTS:
        gpu.facts = {**gpu.facts, fact: "other"}
        gpu.another_process()
        gpu.choice()
    assert gpu.checked == ["cuda"] * (1 + len(FACTS)), "a verdict holds for one GPU, driver and set of versions"


def test_a_kernel_that_fails_is_left_out_with_its_reason(gpu: FakeGPU) -> None:
    gpu.verdicts["bn_apply"] = "is wrong on a problem"
    assert gpu.choice("bn_statistics")[0] == "cuda"
    name, rejected = gpu.choice("bn_apply")
    assert name == "reference"
    reason = "failed the first contact with this GPU: bn_apply is wrong on a problem"
    assert rejected["cuda"] == [f"cuda {reason}"] and rejected["triton"] == [f"triton {reason}"]
    with dispatch.use_backend("cuda"):
        assert dispatch.backend_for("bn_apply", torch.empty(2, 16, 8, 8), request="cuda") is cuda, "a request is met"


def test_the_environment_skips_and_forces(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.verdicts["bn_statistics"] = "is wrong"
    monkeypatch.setenv("RESFUSE_FIRST_CONTACT", "skip")
    assert gpu.choice()[0] == "cuda" and gpu.checked == []
    monkeypatch.delenv("RESFUSE_FIRST_CONTACT")
    gpu.another_process()
    assert gpu.choice()[0] != "cuda" and gpu.checked == ["cuda", "triton"]
    gpu.verdicts["bn_statistics"] = None
    gpu.another_process()
    assert gpu.choice()[0] != "cuda", "as it is stored"
    monkeypatch.setenv("RESFUSE_FIRST_CONTACT", "force")
    for path in first_contact.folder().glob("*.json"):
        os.utime(path, (1, 1))
    gpu.another_process()
    assert gpu.choice()[0] == "cuda" and gpu.checked == ["cuda", "triton", "cuda"]
    gpu.another_process()
    assert gpu.choice()[0] == "cuda" and len(gpu.checked) == 3, "once for all processes that start together"


def test_another_value_of_the_environment_is_a_reason(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESFUSE_FIRST_CONTACT", "never")
    name, rejected = gpu.choice()
    assert name == "reference" and not gpu.checked
    assert rejected["cuda"] == ["RESFUSE_FIRST_CONTACT: expected skip or force, got 'never'"]


def test_several_ranks_check_once(gpu: FakeGPU) -> None:
    def slowly(*arguments: Any) -> dict[str, str | None]:
        time.sleep(0.2)
        return gpu.check(*arguments)

    facts = {**FACTS, "backend": "cuda", "dtype": "bfloat16"}
    path = first_contact.folder() / "verdict.json"
    found: list[Any] = []
    ranks = [
        threading.Thread(
            target=lambda: found.append(first_contact._make(path, facts, "", lambda: slowly("cuda", DTYPE, 0)))
        )
        for _ in range(8)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert found == [RIGHT] * 8 and gpu.checked == ["cuda"]


def test_a_cache_that_cannot_be_written_is_done_without(
    gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert gpu.choice()[0] == "cuda" and gpu.checked == ["cuda"]
    assert "cannot be stored" in caplog.text


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"verdicts"'])
def test_a_damaged_file_is_no_verdict(content: str, gpu: FakeGPU) -> None:
    gpu.choice()
    (path,) = first_contact.folder().glob("*.json")
    path.write_text(content)
    gpu.another_process()
    assert gpu.choice()[0] == "cuda" and gpu.checked == ["cuda"] * 2


def test_nothing_is_started_while_a_graph_is_captured(gpu: FakeGPU) -> None:
    """The reference runs then, and the next call outside of a capture makes the check."""
    gpu.capturing = True
    tensor = torch.empty(2, 16, 8, 8, dtype=DTYPE)
    fields = ("bn_statistics", GPU, DTYPE, tensor.shape, None, None)
    with pytest.raises(first_contact.UnsettledError, match="run once before"):
        dispatch.choose(fields, None)
    assert gpu.checked == []
    gpu.capturing = False
    assert dispatch.choose(fields, None)[0] == "cuda" and gpu.checked == ["cuda"]
    gpu.capturing = True
    gpu.another_process()
    assert dispatch.choose(fields, None)[0] == "cuda", "a stored verdict can be read"


def test_a_graph_captured_without_a_verdict_has_the_reference(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsettled(*_: Any) -> str:
        raise first_contact.UnsettledError("later")

    tensor = torch.empty(2, 16, 8, 8)
    monkeypatch.setattr(first_contact, "objection", unsettled)
    assert dispatch.backend_for("bn_statistics", tensor, request=None) is reference
    monkeypatch.setattr(first_contact, "objection", lambda *_: None)
    assert dispatch.backend_for("bn_statistics", tensor, request=None) is cuda, "that choice was not kept"


def test_what_says_nothing_about_the_kernels_is_not_stored(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> dict[str, str | None]:
        gpu.checked.append("full")
        raise first_contact.UnsettledError("out of memory")

    monkeypatch.setattr(first_contact, "check", full)
    for kernel in ("bn_statistics", "bn_apply"):
        name, rejected = gpu.choice(kernel)
        assert name != "cuda" and "could not be checked on this GPU: out of memory" in rejected["cuda"][0]
    assert gpu.checked == ["full"] * 2, "once per backend and process"
    assert not list(first_contact.folder().glob("*.json"))


def test_info_and_verify_show_verdicts(gpu: FakeGPU, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.verdicts["bn_apply"] = "is wrong on a problem"
    gpu.choice()
    told = "left out: bn_apply is wrong on a problem"
    assert first_contact.stored() == {"Testing 3000, cuda, bfloat16, torch 2": told}
    assert told in info._text({**info.collect(), "gpus": []}, width=200)
    assert verify.first_contact_faults(["cuda", "reference"], [DTYPE]) == 1
    assert f"first contact, cuda, bfloat16: {told}" in capsys.readouterr().out
    gpu.verdicts["bn_apply"] = None
    gpu.another_process()
    for path in first_contact.folder().glob("*.json"):
        os.utime(path, (1, 1))
    assert verify.first_contact_faults(["cuda", "reference"], [DTYPE]) == 0, "checked again"


# --- how a verdict is made -------------------------------------------------------------------------------------------


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The processes started, which have the planted kernels."""
    started: list[list[str]] = []

    def command(backend: str, dtype: torch.dtype, device: int, kernels: Sequence[str]) -> list[str]:
        started.append(list(kernels))
        return [sys.executable, "-m", "tests.backends.planted_kernels", backend, "float32", "cpu", *kernels]

    monkeypatch.setattr(dispatch, "_registered", {})
    planted_kernels.register()
    monkeypatch.setattr(first_contact, "command", command)
    monkeypatch.setattr(first_contact, "SECONDS", 4.0)
    return started


def test_kernels_that_are_wrong_raise_exit_or_sleep(planted: list[list[str]]) -> None:
    found = first_contact.check("planted", torch.float32, 0)
    assert list(found) == list(planted_kernels.PLANTED)
    assert found.pop("add_relu_forward") is None and found.pop("bn_backward_reduce") is None
    reasons = {kernel: str(reason) for kernel, reason in found.items()}
    assert reasons["add_relu_backward"].startswith(
        "is wrong on (4, 64, 14, 14) to 64 channels, with training: an error of "
    )
    assert reasons["bn_act_forward"] == "raises ValueError on (4, 64, 14, 14) to 64 channels, with training: not today"
    about = "on (4, 64, 14, 14) to 64 channels, with training"
    assert reasons["bn_statistics"] == f"ended its process (status 7, '') {about}"
    assert reasons["bn_apply"] == f"did not finish within 4 s {about}"
    assert [len(kernels) for kernels in planted] == [6, 2, 1], "another process has the rest"


def test_a_process_that_does_not_get_to_a_kernel_blames_none(
    planted: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planted_kernels, "PLANTED", {"blind": None})
    planted_kernels.register()
    with pytest.raises(first_contact.UnsettledError, match=r"ended its process \(status 1, 'no GPU here'\)"):
        first_contact.check("planted", torch.float32, 0)
    program = """print('["unsettled", "out of memory"]')"""
    monkeypatch.setattr(first_contact, "command", lambda *_: [sys.executable, "-c", program])
    with pytest.raises(first_contact.UnsettledError, match="out of memory"):
        first_contact.check("planted", torch.float32, 0)
    monkeypatch.setattr(first_contact, "command", lambda *_: [sys.executable, "-c", "print('noise')"])
    with pytest.raises(first_contact.UnsettledError, match="before it had checked"):
        first_contact.check("planted", torch.float32, 0)


@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_right_kernels_of_every_name_pass(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    small = [problem for problem in first_contact.CONVOLUTIONS if problem[0][0] < 4]
    monkeypatch.setattr(first_contact, "CONVOLUTIONS", small)
    before = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    try:
        for kernel in sorted({*cuda.KERNELS, *triton.KERNELS}):
            assert first_contact.fault(reference, kernel, dtype, torch.device("cpu")) is None, kernel
    finally:
        torch.backends.cudnn.conv.fp32_precision = before  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_a_stem_is_padded_or_packed_by_every_backend(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is, the other is not, and both are held against something that is right."""
    pytest.importorskip("triton")
    from resfuse.backends.triton import plan

    for name in ("PADDED_FROM", "PACKED_FROM"):
        monkeypatch.setattr(stems, name, first_contact.LARGE_STEM)
    for (shape, weight, stride, _), large in zip(first_contact.CONVOLUTIONS[:2], (False, True), strict=True):
        problem = torch.Size(shape), torch.Size(weight), Convolution((stride,) * 2, (3, 3), (1, 1), 1)
        assert plan.pads(*problem) == large
        assert (cuda_conv.planned.__wrapped__(*problem, True, dtype, 132).channels > 3) == large
        assert (sm90._row_channels(*problem, 16 // dtype.itemsize) > 0) == large
    assert not sm90._unsupported_shapes(*problem, 16 // dtype.itemsize)
    monkeypatch.setattr(first_contact, "CONVOLUTIONS", first_contact.CONVOLUTIONS[1:2])
    before = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    try:
        for kernel in ("conv_forward", "conv_bn_act_forward"):
            assert first_contact.fault(reference, kernel, dtype, torch.device("cpu")) is None, kernel
    finally:
        torch.backends.cudnn.conv.fp32_precision = before  # type: ignore[attr-defined]


def test_convolutions_that_a_backend_does_not_support_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Automatic choice gives it none of them, so they say nothing about its kernel."""

    def conv_forward(*operands: Any) -> torch.Tensor:
        assert operands[3].groups == 1
        return reference.conv_forward(*operands)

    def unsupported_reasons(problem: Problem) -> list[str]:
        return ["no groups"] if problem.convolution and problem.convolution.groups > 1 else []

    module = types.SimpleNamespace(conv_forward=conv_forward, unsupported_reasons=unsupported_reasons)
    grouped, plain = ((2, 8, 5, 5), (8, 1, 3, 3), 1, 8), ((2, 8, 5, 5), (8, 8, 3, 3), 1, 1)
    monkeypatch.setattr(first_contact, "CONVOLUTIONS", (grouped, plain))
    tried: list[str] = []
    assert first_contact.fault(module, "conv_forward", torch.bfloat16, torch.device("cpu"), tried.append) is None
    assert len(tried) == 2, "with and without what is optional"


def test_a_verdict_is_for_these_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Testing 3000")
    identity = first_contact.identity.__wrapped__
    facts = {backend: identity(backend, 0) for backend in first_contact.KERNEL_FILES}
    assert facts["cuda"].keys() == FACTS.keys() and facts["cuda"]["kernels"] != facts["triton"]["kernels"]
    found = []
    for content in ("first", "second"):
        (tmp_path / "kernel.cu").write_text(content)
        monkeypatch.setitem(first_contact.KERNEL_FILES, "cuda", ((tmp_path, "*.cu*"),))
        found.append(identity("cuda", 0)["kernels"])
    assert found[0] != found[1]


def test_the_process_runs_the_check_of_this_package() -> None:
    arguments = first_contact.command("cuda", DTYPE, 1, ["bn_apply"])
    assert arguments[0] == sys.executable and arguments[3:] == ["cuda", "bfloat16", "cuda:1", "bn_apply"]
    (message, *_) = first_contact._messages([*arguments[:5], "cuda:0", "bn_apply"])
    assert message[0] == "unsettled", "there is no GPU"
