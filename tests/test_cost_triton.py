"""Launches and bytes of Triton's kernels on paper, against what is launched and, interpreted, loaded and stored."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import resfuse
from resfuse import costs
from resfuse.backends import triton
from tests import shapes
from tests.cost_runs import CPU, Run, runs

if triton.unavailable_reason() is not None:
    pytest.skip(f"triton: {triton.unavailable_reason()}", allow_module_level=True)


@contextmanager
def unsplit_gradients() -> Iterator[None]:
    """One configuration in the model and in the interpreter, whose own heuristics are others than a GPU's."""
    from resfuse.backends.triton import configs
    from resfuse.backends.triton.problems import ConvConfig

    with ExitStack() as stack:
        for kind in ("dgrad", "wgrad"):
            stack.enter_context(configs.forced(kind, ConvConfig(128, 128, 16, 8, 2)))
        yield


@runs
def test_triton(name: str, case: str, training: bool) -> None:
    """Where kernels are interpreted, a cooperative launch comes as two of one name."""
    from resfuse.backends.triton import launch

    (device,) = shapes.devices_of("triton")
    run = Run(name, case, training, device)
    with unsplit_gradients(), resfuse.use_backend("triton"):
        with launch.recorded() as first:
            output = run.forward()
        with launch.recorded() as second:
            run.backward(output, torch.ones_like(output))
        found = tuple(len([name for name, _ in itertools.groupby(names)]) for names in (first, second))
        assert run.modelled("triton", CPU) == found


class Traffic:
    """Bytes that interpreted kernels load and store."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        self.bytes = 0
        for name, mask_at in (("create_masked_load", 1), ("create_masked_store", 2)):
            monkeypatch.setattr(InterpreterBuilder, name, self._counting(getattr(InterpreterBuilder, name), mask_at))

    def _counting(self, access: Callable[..., Any], mask_at: int) -> Callable[..., Any]:
        def counted(builder: Any, pointers: Any, *args: Any) -> Any:
            itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            self.bytes += int(args[mask_at - 1].data.sum()) * itemsize
            return access(builder, pointers, *args)

        return counted

    def of(self, run: Callable[[], Any]) -> int:
        self.bytes = 0
        run()
        return self.bytes


@pytest.mark.skipif(not triton.INTERPRETED, reason="of the interpreter")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["bn_act", "add_relu", "conv_bn_act"])
def test_bytes_of_triton(name: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels load and store, where every operand fits a tile: no tile then reads one again."""
    run = Run(name, "1x1 and residual", training)
    traffic = Traffic(monkeypatch)
    options: Any = {"training": training, "backend": "triton", "device": CPU}
    with unsplit_gradients(), resfuse.use_backend("triton"):
        outputs: list[Tensor] = []
        forward = traffic.of(lambda: outputs.append(run.forward()))
        grad_output = torch.ones_like(outputs[0])
        backward = traffic.of(lambda: run.backward(outputs[0], grad_output))
        z = run.operation.output.bytes
        modelled = costs.forward_cost(run.operation, **options).bytes
        if name == "conv_bn_act" and training:
            modelled += z  # two launches here: it does not stay in registers
        assert forward == pytest.approx(modelled, rel=0.03)
        modelled = costs.backward_cost(run.operation, **options).bytes - 3 * z  # without what is autograd's to add
    assert backward == pytest.approx(modelled, rel=0.03)
