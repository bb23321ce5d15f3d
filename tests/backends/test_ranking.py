"""The exceptions to the order of preference: when they count, and that they leave no problem without a backend."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from resfuse.backends import cuda, ranking, registry, triton
from resfuse.backends.problem import AbsentDevice, Problem
from tests.shapes import CONVOLUTIONS

GPU = torch.device("cuda", 0)
VERBS = (
    "add_relu_forward", "add_relu_backward", "bn_act_forward", "bn_act_backward", "conv_bn_act_forward", "conv_forward",
    "conv_backward", "bn_statistics", "bn_apply", "bn_backward_reduce", "bn_backward_apply",
)  # fmt: skip


def problem(
    verb: str = "conv_bn_act_forward",
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | AbsentDevice = GPU,
) -> Problem:
    conv = CONVOLUTIONS["3x3"]
    of_verb = (torch.Size(conv.weight), conv.stride, conv.padding, conv.dilation, conv.groups)
    return Problem(verb, device, dtype, torch.Size(conv.input), of_verb if "conv" in verb else None)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with a GPU on which `runs` says what each backend runs."""
    machine = SimpleNamespace(major=9, runs={"cuda": VERBS, "triton": VERBS})
    monkeypatch.setattr(ranking, "capability", lambda device: (machine.major, 0))
    for module, name in ((cuda, "cuda"), (triton, "triton")):
        monkeypatch.setattr(module, "unavailable_reason", lambda name=name: None if name in machine.runs else "absent")
        monkeypatch.setattr(
            module,
            "unsupported_reasons",
            lambda problem, name=name: [] if problem.verb in machine.runs[name] else ["not this"],
        )
    monkeypatch.setattr(triton, "only_on_request_reason", lambda: None)
    registry.choose.cache_clear()
    yield machine
    registry.choose.cache_clear()


def chosen(*arguments: object, request: str | None = None) -> str:
    registry.choose.cache_clear()
    return registry.explain_choice(problem(*arguments), request)[0]  # type: ignore[arg-type]


def test_convolutions_on_hopper_prefer_triton_and_say_why(gpu: SimpleNamespace) -> None:
    for verb, dtype in itertools.product(
        ("conv_bn_act_forward", "conv_forward"), (torch.bfloat16, torch.float16, torch.float32)
    ):
        registry.choose.cache_clear()
        name, rejected = registry.explain_choice(problem(verb, dtype))
        assert name == "triton"
        (reason,) = rejected["cuda"]
        assert reason == (
            "triton should be faster: it multiplies by wgmma or tcgen05, which are faster than the mma.sync of cuda "
            "(predicted, not measured)"
        )


@pytest.mark.parametrize("major", [8, 12])
def test_where_mma_sync_is_what_there_is_cuda_comes_first(gpu: SimpleNamespace, major: int) -> None:
    gpu.major = major
    assert {chosen(verb) for verb in VERBS} == {"cuda"}


def test_other_verbs_stay(gpu: SimpleNamespace) -> None:
    assert {verb for verb in VERBS if chosen(verb) != "cuda"} == {"conv_bn_act_forward", "conv_forward"}


def test_only_a_backend_that_can_run_the_problem_is_preferred(gpu: SimpleNamespace) -> None:
    gpu.runs = {"cuda": VERBS}
    assert chosen() == "cuda", "triton is not there"
    gpu.runs = {"cuda": VERBS, "triton": ()}
    assert chosen() == "cuda", "triton does not run it"
    gpu.runs = {"cuda": (), "triton": VERBS}
    assert chosen() == "triton"
    gpu.runs = {}
    assert chosen() == "reference"


def test_interpreted_triton_is_not_preferred(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "only_on_request_reason", lambda: "interpreted")
    assert chosen() == "cuda"


def test_a_request_is_met(gpu: SimpleNamespace) -> None:
    assert chosen(request="cuda") == "cuda"


def test_other_devices_have_no_exceptions() -> None:
    assert ranking.exceptions("cuda", problem(device=torch.device("cpu"))) == []


@pytest.mark.parametrize(
    ("capability", "convolution", "other"),
    [
        ((7, 5), "reference", "reference"),
        ((8, 0), "cuda", "cuda"),
        ((9, 0), "triton", "cuda"),
        ((10, 0), "triton", "cuda"),
        ((12, 0), "cuda", "cuda"),
    ],
)
def test_a_gpu_that_is_not_there(capability: tuple[int, int], convolution: str, other: str) -> None:
    """By the real backends' own reasons, whatever this machine has."""
    device = AbsentDevice(capability)
    assert registry.explain_choice(problem(device=device))[0] == convolution
    name, rejected = registry.explain_choice(problem("bn_act_backward", device=device))
    assert name == other
    if other == "reference":
        assert rejected["cuda"] == ["cuda needs compute capability 8.0 or newer, not 7.5"]
        assert rejected["triton"] == ["compute capability 8.0 or newer, got 7.5"]
        assert rejected["cpu"] == ["runs on the CPU, the tensors are on cuda of compute capability 7.5"]
    assert registry.explain_choice(problem(device=device), "reference")[0] == "reference"
    with pytest.raises(RuntimeError, match="runs on the CPU"):
        registry.explain_choice(problem(device=device), "cpu")


def test_the_table_is_consistent() -> None:
    for entry in ranking.TABLE:
        order = [registry.PREFERENCE.index(name) for name in (entry.passed_over, entry.preferred)]
        assert order == sorted(order), "an exception moves a later backend up: no two can wait for each other"
        assert set(entry.verbs) <= set(VERBS)
        assert entry.source == ranking.PREDICTED or entry.source.startswith("measured on ")
    measured = ranking.TABLE[0]._replace(source="measured on NVIDIA H200")
    assert str(measured).startswith("triton is faster: ") and str(measured).endswith("(measured on NVIDIA H200)")
