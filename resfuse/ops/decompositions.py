"""The operators of inference in terms of PyTorch's own, for exported programs that have to do without resfuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def table() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """Decompositions for `torch.export.ExportedProgram.run_decompositions`.

    A fused model exports as calls of `resfuse::` operators, which run fused wherever resfuse is installed.  This makes
    PyTorch's own operators of them, for other runtimes, and for `torch.onnx.export` of the program::

        decompositions = torch.export.default_decompositions()
        decompositions.update(resfuse.ops.decompositions.table())
        program = torch.export.export(model.eval(), (input,)).run_decompositions(decompositions)

    `torch.onnx.export` of a fused model itself needs none of it: the modules run their parts one by one there.

    Returns:
        The operators of inference, each with a function of the same arguments.
    """
    ops: Any = torch.ops.resfuse
    return {
        ops.add_relu_forward.default: _add_relu,
        ops.bn_act_eval.default: _bn_act,
        ops.conv_bn_act_eval.default: _conv_bn_act,
    }


def _add_relu(input: Tensor, residual: Tensor) -> Tensor:
    return torch.relu(input + residual)


def _bn_act(input: Tensor, *args: Any) -> Tensor:
    running_mean, running_var, weight, bias, residual, relu, eps = args
    output = F.batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps)
    if residual is not None:
        missing = output.shape[1] - residual.shape[1]
        output = output + (F.pad(residual, (0, 0, 0, 0, 0, missing)) if missing else residual)
    return torch.relu(output) if relu else output


def _conv_bn_act(input: Tensor, conv_weight: Tensor, *args: Any) -> Tensor:
    *batch_norm, conv_bias, residual, relu, stride, padding, dilation, groups, eps = args
    conv_bias = None if conv_bias is None else conv_bias.to(input.dtype)
    z = F.conv2d(input, conv_weight.to(input.dtype), conv_bias, stride, padding, dilation, groups)
    return _bn_act(z, *batch_norm, residual, relu, eps)
