"""What the runtimes of exported models have in common: inference, from ONNX or from what they make of a module."""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout

import torch
from torch import Tensor, nn

from benchmarks.providers.base import Layout, Provider, Setting

OPSET = 22
"""The first in which Conv, Add, Relu, MaxPool and GlobalAveragePool take bfloat16."""


class Exported(Provider):
    """A runtime for exported models."""

    modules: tuple[str, ...]
    """What has to be importable."""
    dtypes: Mapping[str, tuple[torch.dtype, ...]]
    """By type of device; a type that is not there can not be used."""

    def __init__(self, name: str, layout: Layout = "nchw") -> None:
        super().__init__(name, layout)

    def unavailable_reason(self, setting: Setting) -> str | None:
        missing = [name for name in self.modules if importlib.util.find_spec(name) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"
        if setting.mode != "inference":
            return "inference only"
        kind = setting.device.type
        if kind not in self.dtypes:
            return f"compared on {' and '.join(self.dtypes)} only, not on {kind}"
        if setting.dtype not in self.dtypes[kind]:
            return f"no {str(setting.dtype).removeprefix('torch.')} on {kind}"
        return None


def onnx_model(module: nn.Module, examples: tuple[Tensor, ...]) -> bytes:
    """The module in eval mode as an ONNX model of fixed shapes, serialised.

    Its inputs are those of the module, in order; its dtype is that of the module.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    # The exporter's optimiser folds batch norms, but gives bfloat16 convolutions float32 weights by that.
    optimize = examples[0].dtype != torch.bfloat16
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(), examples, dynamo=True, verbose=False, opset_version=OPSET, optimize=optimize
        )
    assert program is not None
    return program.model_proto.SerializeToString()
