"""The operators of inference in terms of PyTorch's own, for exported programs that have to do without resfuse."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from resfuse.backends import dispatch


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
    inference = (ops.add_relu_forward.default, ops.bn_act_eval.default, ops.conv_bn_act_eval.default)
    return {operator: functools.partial(by_reference, operator) for operator in inference}


def by_reference(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Call an operator of resfuse as the backend `reference` does it, by operators of PyTorch."""
    with dispatch.use_backend("reference"):
        return operator._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
