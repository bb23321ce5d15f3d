"""What providers promise: names, reasons where they can not run, the backend that is asked for, frozen weights."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchvision")

from benchmarks.providers import BASELINE, DEFAULT, PROVIDERS, Setting, UnsuitableError
from benchmarks.providers.compiled import Inductor
from resfuse.backends import registry

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def setting_of(level: str, mode: str = "inference", dtype: torch.dtype = torch.float32, **others: Any) -> Setting:
    device = others.pop("device", CPU)
    return Setting(mode, dtype, device, torch.get_num_threads(), level=level, **others)  # type: ignore[arg-type]


def test_reasons_are_sentences() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for mode, dtype, device, graph in itertools.product(("inference", "train"), dtypes, (CPU, GPU), (False, True)):
        setting = setting_of("model", mode, dtype, device=device, graph=graph)
        for name, provider in PROVIDERS.items():
            reason = provider.unavailable_reason(setting)
            assert reason is None or (len(reason) >= 8 and reason == reason.strip() and "\n" not in reason), name
        assert PROVIDERS[BASELINE].unavailable_reason(setting) is None


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("onnxruntime", {"mode": "train"}, "inference only"),
        ("openvino", {"device": GPU}, "not on cuda"),
        ("onnxruntime", {"dtype": torch.bfloat16}, "no bfloat16"),
        ("cudnn_aten", {}, "cuDNN needs a GPU"),
        ("cudnn_aten", {"mode": "train", "device": GPU}, "inference only"),
        ("inductor_freezing", {"mode": "train"}, "for inference only"),
        ("inductor_reduce_overhead", {}, "need a GPU"),
        ("inductor_reduce_overhead", {"device": GPU, "graph": True}, "default mode"),
        ("inductor_max_autotune", {}, "on a CPU"),
        ("resfuse_cuda", {}, "GPU"),
        ("resfuse_triton", {}, "interprets"),
        ("resfuse_cpu", {"dtype": torch.float16}, "float32 and bfloat16 only"),
    ],
)
def test_it_says_why_it_can_not_run(name: str, changes: dict[str, Any], reason: str) -> None:
    if name in ("resfuse_cuda", "resfuse_triton") and torch.cuda.is_available():
        pytest.skip("it can run here")
    if name in ("onnxruntime", "openvino"):
        pytest.importorskip(name)
    if name == "resfuse_cpu" and registry.backend("cpu").unavailable_reason() is not None:
        pytest.skip("the CPU library is not built")
    found = PROVIDERS[name].unavailable_reason(setting_of("model", **changes))
    assert found is not None
    assert reason in found


def test_cuda_graphs_of_torch_compile_are_left_off_where_all_are_replayed() -> None:
    tuned = Inductor("", mode="max-autotune")
    assert tuned.compile_mode(setting_of("model", device=GPU)) == "max-autotune"
    assert tuned.compile_mode(setting_of("model", device=GPU, graph=True)) == "max-autotune-no-cudagraphs"
    assert Inductor("").compile_mode(setting_of("model", device=GPU, graph=True)) == "default"


class Spy(nn.Module):
    """Notes which backend is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.requested: list[str | None] = []

    def forward(self, input: Tensor) -> Tensor:
        self.requested.append(registry.requested_backend())
        return input


def test_a_backend_is_asked_for_in_every_call() -> None:
    for name, expected in (("resfuse", registry.requested_backend()), ("resfuse_cpu", "cpu")):
        if PROVIDERS[name].unavailable_reason(setting_of("op")) is None:
            spy, input = Spy(), torch.rand(1, 2, 3, 3)
            step = PROVIDERS[name].prepare(spy, (input,), setting_of("op"))
            step(input)
            step(input)
            assert spy.requested == [expected] * 2


def test_a_backend_that_refuses_a_call_has_nothing_to_offer() -> None:
    if PROVIDERS["resfuse_cpu"].unavailable_reason(setting_of("layer")) is not None:
        pytest.skip("the CPU library is not built")
    layer = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double()
    input = torch.rand(2, 4, 5, 5, dtype=torch.double)
    step = PROVIDERS["resfuse_cpu"].prepare(layer, (input,), setting_of("layer"))
    with pytest.raises(UnsuitableError, match="no backend can run"):
        step(input)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.slow
@pytest.mark.skipif(PROVIDERS["inductor"].unavailable_reason(setting_of("layer")) is not None, reason="no compiler")
def test_frozen_weights_are_constants() -> None:
    for name, frozen in (("inductor", False), ("inductor_freezing", True)):
        layer = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
        input = torch.rand(2, 4, 5, 5)
        step = PROVIDERS[name].prepare(layer, (input,), setting_of("layer"))
        before = step(PROVIDERS[name].convert(input)).clone()
        with torch.no_grad():
            layer[0].weight.neg_()
        assert torch.equal(before, step(PROVIDERS[name].convert(input))) == frozen


def test_all_that_is_asked_for_has_a_provider() -> None:
    assert set(DEFAULT) <= set(PROVIDERS)
    assert all(name == provider.name for name, provider in PROVIDERS.items())
    assert all(provider.__doc__ for provider in PROVIDERS.values())
    assert {f"resfuse_{name}" for name in registry.PREFERENCE if name != "reference"} <= set(PROVIDERS)
