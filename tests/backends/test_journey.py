"""The way from a public call to its kernel stays short: at most eight files of Python on every backend."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import resfuse
from resfuse.backends import dispatch
from tests import shapes

PACKAGE = Path(resfuse.__file__).parent
MOST = 8
LAUNCHERS = ("_interpret", "_library")  # behind them come Triton's interpreter and the emulator's loader
ON_CPU = [name for name in shapes.BACKENDS if "cpu" in shapes.devices_of(name)]


def files_entered(run: Callable[[], object]) -> list[str]:
    """Files of the package whose functions `run` calls before a kernel is launched."""
    found: list[str] = []
    inside = 0

    def entered(frame: FrameType, event: str, _: Any) -> None:
        nonlocal inside
        code = frame.f_code
        if code.co_name in LAUNCHERS and event in ("call", "return"):
            inside += 1 if event == "call" else -1
        path = Path(code.co_filename)
        if event == "call" and not inside and path.is_relative_to(PACKAGE):
            name = path.relative_to(PACKAGE).as_posix()
            if name not in found:
                found.append(name)

    sys.setprofile(entered)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def operands() -> tuple[list[Tensor], dict[str, Any]]:
    def image(*shape: int) -> Tensor:
        return torch.randn(shape).contiguous(memory_format=torch.channels_last)

    tensors = [
        image(2, 16, 6, 6),
        image(16, 16, 3, 3),
        torch.zeros(16),
        torch.ones(16),
        torch.ones(16),
        torch.zeros(16),
    ]
    return tensors, {"residual": image(2, 16, 6, 6), "padding": 1}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backend", ON_CPU)
def test_forward(backend: str, training: bool) -> None:
    tensors, options = operands()
    with dispatch.use_backend(backend), torch.no_grad():
        resfuse.conv_bn_act(*tensors, training=training, **options)  # libraries, plans and tables are loaded once
        found = files_entered(lambda: resfuse.conv_bn_act(*tensors, training=training, **options))
    assert "functional.py" in found
    assert len(found) <= MOST, found


@pytest.mark.parametrize("backend", ON_CPU)
def test_backward(backend: str) -> None:
    """Two kernels: the reference, which has the convolution's gradients, is not on the way to batch norm's."""
    tensors, options = operands()
    for tensor in (*tensors[:2], *tensors[4:], options["residual"]):
        tensor.requires_grad_()
    with dispatch.use_backend(backend):
        output = resfuse.conv_bn_act(*tensors, training=True, **options).sum()
        output.backward(retain_graph=True)
        found = files_entered(lambda: output.backward(retain_graph=True))
    assert "ops/conv_bn_act.py" in found
    assert len(set(found) - {"backends/reference.py"}) <= MOST, found
