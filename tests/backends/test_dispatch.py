"""Which backend runs what, and that it can say why."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
import torch
from torch import Tensor

import resfuse
from resfuse.backends import registry, triton
from resfuse.backends.problem import Problem

needs_interpreter = pytest.mark.skipif(not triton.INTERPRETED, reason="TRITON_INTERPRET is not set")
needs_cpu = pytest.mark.skipif("cpu" not in resfuse.available_backends(), reason="the CPU library is not built")
CPU = torch.device("cpu")


def problem(dtype: torch.dtype, device: torch.device = CPU, shape: tuple[int, ...] = (2, 8, 4, 4)) -> Problem:
    return Problem("bn_act_forward", device, dtype, torch.Size(shape))


def test_reference_is_always_there_and_last() -> None:
    assert resfuse.available_backends()[-1] == "reference"
    assert set(registry.unavailable_reasons()) == set(registry.PREFERENCE)


@needs_cpu
def test_automatic_choice_and_its_reasons() -> None:
    name, rejected = registry.explain_choice(problem(torch.float32))
    assert name == "cpu"
    assert "cuda" in rejected
    name, rejected = registry.explain_choice(problem(torch.float64))
    assert name == "reference"
    assert rejected["cpu"] == ["float32 and bfloat16 only, got torch.float64"]
    name, rejected = registry.explain_choice(problem(torch.float32, shape=(0, 8, 4, 4)))
    assert (name, rejected["cpu"]) == ("reference", ["an empty tensor"])


@needs_interpreter
def test_interpreted_kernels_run_only_on_request() -> None:
    _, rejected = registry.explain_choice(problem(torch.float32))
    assert rejected["triton"] == ["TRITON_INTERPRET=1 interprets the kernels, slowly: only on request"]
    if triton.unavailable_reason() is None:
        assert registry.choose(problem(torch.float32), "triton")[0] is triton


@needs_interpreter
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (problem(torch.float64), "float32, bfloat16 and float16 only, got torch.float64"),
        (problem(torch.float32, shape=(2, 8, 0, 4)), "an empty tensor"),
        (problem(torch.float32, torch.device("cuda:1")), "tensors on cpu only, got cuda:1"),
    ],
)
def test_what_triton_does_not_run(wrong: Problem, reason: str) -> None:
    assert triton.unsupported_reasons(wrong) == [reason]


def test_triton_is_not_imported_where_it_can_not_run() -> None:
    code = """
import sys
from resfuse.backends import registry
print(registry.unavailable_reasons()["triton"])
assert "triton" not in sys.modules
"""
    found = run(code, TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
    assert "torch sees no CUDA GPU" in found.stdout, found.stderr


@needs_cpu
def test_explicit_request_that_cannot_be_met_raises_with_the_reason() -> None:
    with resfuse.use_backend("cpu"), pytest.raises(RuntimeError, match=r"cpu: float32 and bfloat16 only.*float64"):
        resfuse.add_relu(torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))


def test_unknown_and_unavailable_names() -> None:
    with pytest.raises(ValueError, match=r"backend: expected one of .*, got 'tpu'"), resfuse.use_backend("tpu"):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="'cuda' is not available"), resfuse.use_backend("cuda"):
            pass


def test_registered_backends_run_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    other = types.ModuleType("other")
    other.unavailable_reason = lambda: None  # type: ignore[attr-defined]
    other.unsupported_reasons = lambda problem: []  # type: ignore[attr-defined]
    other.add_relu_forward = lambda input, residual: input  # type: ignore[attr-defined]
    registry.register("other", other)
    registry.register("other", other)  # once more is no conflict
    input = torch.ones(3)
    with resfuse.use_backend("other"):
        assert resfuse.add_relu(input, input) is input
        assert registry.explain_choice(problem(torch.float32), "other") == ("other", {})
    assert "other" not in resfuse.available_backends()
    assert resfuse.add_relu(input, input).tolist() == [2, 2, 2]
    for taken in ("other", "cuda"):
        with pytest.raises(ValueError, match=f"a backend named '{taken}' exists already"):
            registry.register(taken, types.ModuleType("third"))
    registry.choose.cache_clear()


def test_nesting_and_restoring() -> None:
    assert registry.requested_backend() is None
    with resfuse.use_backend("reference"):
        assert registry.requested_backend() == "reference"
        with resfuse.use_backend(None):
            assert registry.requested_backend() is None
        assert registry.requested_backend() == "reference"
    with pytest.raises(KeyError), resfuse.use_backend("reference"):
        raise KeyError
    assert registry.requested_backend() is None


@needs_cpu
def test_backward_runs_where_its_forward_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in ("cpu", "reference"):
        module = registry.backend(name)
        for verb in ("add_relu_forward", "add_relu_backward"):
            original = getattr(module, verb)

            def spy(*args: Tensor, _name: str = name, _verb: str = verb, _run=original) -> Tensor:  # type: ignore[no-untyped-def]
                ran.append(f"{_name}.{_verb}")
                return _run(*args)

            monkeypatch.setattr(module, verb, spy)
    input = torch.randn(2, 3, requires_grad=True)
    with resfuse.use_backend("reference"):
        output = resfuse.add_relu(input, input.detach())
    output.sum().backward()
    assert ran == ["reference.add_relu_forward", "reference.add_relu_backward"]
    ran.clear()
    output = resfuse.add_relu(input, input.detach())
    with resfuse.use_backend("reference"):  # neither does a later request move it
        output.sum().backward()
    assert ran == ["cpu.add_relu_forward", "cpu.add_relu_backward"]


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_environment_variable() -> None:
    code = "from resfuse.backends import registry; print(registry.requested_backend())"
    assert run(code, RESFUSE_BACKEND="reference").stdout.strip() == "reference"
    assert run(code, RESFUSE_BACKEND="").stdout.strip() == "None"
    wrong = run("import resfuse", RESFUSE_BACKEND="tpu")
    assert wrong.returncode != 0
    assert "got 'tpu'" in wrong.stderr


def test_choices_are_made_once_per_problem() -> None:
    registry.forget_choices()
    tensor = torch.ones(5, 7)
    for _ in range(3):
        resfuse.add_relu(tensor, tensor)
    assert registry.choose.cache_info().misses == 1
