"""What the benchmarks compare: every provider that can run here computes the right result at every level."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")

from benchmarks.cases import Case, make_cases
from benchmarks.providers import PROVIDERS, Setting, UnsuitableError
from benchmarks.providers.base import Level, Mode
from benchmarks.providers.exported import Exported
from benchmarks.providers.onnx_runtime import bound_step, cuda_options, place
from benchmarks.runner import converted
from benchmarks.workload import Workload, first_results, make_workload

pytestmark = [  # torch.compile and torch.export warn of their own internals
    pytest.mark.filterwarnings(f"ignore::{category}")
    for category in ("DeprecationWarning", "FutureWarning", "UserWarning")
]

ROOT = Path(__file__).resolve().parent.parent
CPU, GPU = torch.device("cpu"), torch.device("cuda")
DEVICES = (CPU, GPU) if torch.cuda.is_available() else (CPU,)
COMPILED = tuple(name for name in PROVIDERS if "inductor" in name or "compiled" in name)
"""Those that take many seconds; with max-autotune minutes, so that those are not tried here."""
NOTHING_TO_OFFER = dict.fromkeys(("cudnn_aten", "cudnn_graph"), ("bn_act stage 1 + residual", "add_relu stage 4"))
NETWORK = {"layer": "resnet18", "block": "resnet18", "model": "cifar_resnet20"}
CASES = {
    "op": ("conv_bn_act 1x1 expand + residual", "bn_act stage 1 + residual", "add_relu stage 4"),
    "layer": ("resnet18 layer1.0.conv2 x2", "resnet18 conv1 x1"),
    "block": ("resnet18 layer2.0 x1", "preactivation bottleneck 256-512 / 2"),
    "model": ("cifar_resnet20",),
}


def setting_of(level: Level, mode: Mode = "inference", dtype: torch.dtype = torch.float32, **others: Any) -> Setting:
    return Setting(mode, dtype, others.pop("device", CPU), torch.get_num_threads(), level=level, **others)


def case_of(level: Level, name: str) -> Case:
    (case,) = (case for case in make_cases(level, [NETWORK.get(level, "resnet18")], 2, 32) if case.name == name)
    return case


@functools.cache
def workload_of(name: str, setting: Setting) -> Workload:
    return make_workload(case_of(setting.level, name), setting)


def available(setting: Setting) -> list[str]:
    return [name for name, provider in PROVIDERS.items() if provider.unavailable_reason(setting) is None]


def combinations(compiled: bool) -> list[Any]:
    """(provider, setting) of what can run here; all dtypes where one layer tells whether they work."""
    found = []
    for device, level, mode in itertools.product(DEVICES, CASES, ("inference", "train")):
        dtypes = (torch.float32, torch.bfloat16) if level == "layer" else (torch.float32,)
        for dtype in dtypes:
            setting = setting_of(level, mode, dtype, device=device)  # type: ignore[arg-type]
            for name in available(setting):
                if compiled and (level != "block" or "nchw" in name or "autotune" in name):
                    continue
                if (name in COMPILED) == compiled:
                    text = f"{name}-{device}-{level}-{mode}-{str(dtype)[6:]}"
                    exported = isinstance(PROVIDERS[name], Exported) and level in ("op", "block")  # seconds each
                    marks = [pytest.mark.slow] if compiled or exported else []
                    found.append(pytest.param(name, setting, id=text, marks=marks))
    return found


def check(provider: str, setting: Setting, name: str) -> None:
    """Hold a provider's first results against float64, as the benchmarks do before they time it."""
    workload = workload_of(name, setting)
    module = workload.module()
    examples = tuple(tensor.detach() for tensor in workload.batch(0)[: len(workload.case.inputs)])
    try:
        step = PROVIDERS[provider].prepare(module, examples, setting)
        batch = converted(PROVIDERS[provider], workload, 0)
        for _ in range(2):  # the second call finds what the first one left
            errors = workload.errors(first_results(step, module, batch, workload))
            if setting.mode == "train" and setting.level == "model":
                break  # it has trained the model
    except UnsuitableError:
        assert name in NOTHING_TO_OFFER[provider]
        return
    assert errors.keys() == workload.exact.keys()
    assert all(error <= workload.limit(quantity) for quantity, error in errors.items()), errors


@pytest.mark.parametrize(("provider", "setting"), combinations(compiled=False))
def test_it_computes_what_eager_does(provider: str, setting: Setting) -> None:
    cases = CASES[setting.level]
    exported = isinstance(PROVIDERS[provider], Exported)  # which takes seconds each time
    for name in cases[:1] if exported else cases:
        check(provider, setting, name)


@pytest.mark.parametrize(("provider", "setting"), combinations(compiled=True))
def test_compiled_it_computes_what_eager_does(provider: str, setting: Setting) -> None:
    check(provider, setting, CASES[setting.level][0])


def test_options_of_onnx_runtime_on_a_gpu_are_text() -> None:
    options = cuda_options(stream=140, device=1)
    assert all(isinstance(value, str) for value in options.values())
    assert (options["device_id"], options["user_compute_stream"]) == ("1", "140")
    assert options["use_tf32"] == str(int(torch.backends.cudnn.allow_tf32))


def test_onnx_runtime_reads_tensors_where_they_are() -> None:
    """The bindings that a GPU needs work on the CPU too."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from benchmarks.providers.exported import onnx_model

    case = case_of("layer", "resnet18 layer1.0.conv2 x2")
    module, inputs = case.build().eval(), [torch.randn(shape) for shape in case.inputs]
    expected = module(*inputs).detach()
    session = onnxruntime.InferenceSession(onnx_model(module, tuple(inputs)), providers=["CPUExecutionProvider"])
    step = bound_step(session, torch.empty_like(expected), contextlib.nullcontext)
    for scale in (1.0, 2.0):
        found = step(*(scale * tensor for tensor in inputs))
        torch.testing.assert_close(found, module(*(scale * tensor for tensor in inputs)).detach())
    assert place(expected.half())["element_type"].__name__ == "float16"


@pytest.mark.slow
def test_operators_and_blocks_by_pytest_benchmark() -> None:
    pytest.importorskip("pytest_benchmark")
    command = [
        *(sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-only", "-q", "-p", "no:cacheprovider"),
        *("--benchmark-min-rounds=1", "--benchmark-max-time=1e-6", "--benchmark-warmup=off"),
        *("--bench-batch=2", "--bench-size=32", "--bench-provider=eager_channels_last", "--bench-provider=resfuse"),
        *("--bench-provider=tensorrt", "-k", "deep or add_relu-stage-4 or resnet18-layer2.0"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # an operator that is a convolution, one that is not, and a block; two modes; two providers, and one that is missing
    assert re.search(r"12 passed, 6 skipped", done.stdout) or torch.cuda.is_available(), done.stdout
    assert "benchmark 'resnet18 layer2.0 x1, train, batch 2, float32': 2 tests" in done.stdout
    assert "tensorrt: " in done.stdout or torch.cuda.is_available()
