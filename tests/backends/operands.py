"""Operands for every forward kernel and every one of batch norm, and a call of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resfuse.types import BatchNorm
from tests.contract import RUNNING, Call, Results
from tests.shapes import LAYOUTS, Shape4, Values, bn_act_call

TWO_PASSES = ("bn_act_forward train", "bn_act_backward train", "bn_act_backward eval", "bn_act_backward no residual",
              "bn_statistics", "bn_backward_reduce")  # fmt: skip
"""Calls that read their input twice: in one launch, or in two where not all blocks are resident."""


class Operands:
    """Tensors of bn_act and a gradient, all in one layout, for the kernels of one backend."""

    def __init__(self, kernels: Any, shape: Shape4, dtype: torch.dtype, device: str, layout: str) -> None:
        self.kernels = kernels
        call = bn_act_call(shape, dtype, device, layout=layout, residual_layout=layout)
        self.tensors: dict[str, Any] = dict(call.tensors)
        self.tensors["grad_output"] = LAYOUTS[layout](Values(dtype, device, 1).normal(*shape))

    def forward(self, training: bool) -> tuple[Tensor | None, ...]:
        """Output, mean, invstd, running_mean and running_var after the call."""
        t = self.tensors
        running = t["running_mean"].clone(), t["running_var"].clone()
        bn = BatchNorm(*running, t["weight"], t["bias"], training, 0.1, 1e-5)
        return *self.kernels.bn_act_forward(t["input"], bn, t["residual"], True), *running

    def backward(self, training: bool) -> tuple[Tensor | None, ...]:
        """grad_input, grad_weight, grad_bias and grad_residual."""
        t = self.tensors
        mean, invstd = t["running_mean"], (t["running_var"] + 1e-5).rsqrt()
        return self.kernels.bn_act_backward(
            t["grad_output"],
            t["input"],
            t["residual"],
            t["weight"],
            t["bias"],
            mean,
            invstd,
            True,
            training,
            True,
            True,
        )

    def calls(self) -> dict[str, Callable[[], Any]]:
        """A call of every kernel, by name."""
        k, t = self.kernels, self.tensors
        x, y, dy, weight, bias = t["input"], t["residual"], t["grad_output"], t["weight"], t["bias"]
        mean, invstd = t["running_mean"], t["running_var"]
        plain = BatchNorm(mean, invstd, None, None, False, 0.1, 1e-5)
        return {
            "add_relu_forward": lambda: k.add_relu_forward(x, y),
            "add_relu_backward": lambda: k.add_relu_backward(dy, y),
            "bn_act_forward train": lambda: self.forward(True),
            "bn_act_forward eval": lambda: self.forward(False),
            "bn_act_forward plain": lambda: k.bn_act_forward(x, plain, None, False),
            "bn_act_backward train": lambda: self.backward(True),
            "bn_act_backward eval": lambda: self.backward(False),
            "bn_statistics": lambda: k.bn_statistics(x),
            "bn_apply": lambda: k.bn_apply(x, mean, invstd, weight, bias, y, True),
            "bn_act_backward no residual": lambda: k.bn_act_backward(
                dy, x, None, weight, bias, mean, invstd, True, True, True, False
            )[:3],
            "bn_backward_reduce": lambda: k.bn_backward_reduce(dy, x, y, weight, bias, mean, invstd, True),
            "bn_backward_apply": lambda: k.bn_backward_apply(dy, x, weight, mean, invstd, mean, bias, 99),
            "bn_backward_apply frozen": lambda: k.bn_backward_apply(dy, x, weight, mean, invstd, mean, bias, None),
        }


def convolved(kernels: Any, call: Call, **options: Any) -> Results:
    """Everything that conv_bn_act_forward computes; the running statistics in copies."""
    bn, tensors = call.batch_norm, call.tensors
    bn = bn._replace(**{name: value.clone() for name in RUNNING if (value := getattr(bn, name)) is not None})
    output, z, mean, invstd = kernels.conv_bn_act_forward(
        call.input, tensors["conv_weight"], tensors.get("conv_bias"), call.convolution, bn, tensors.get("residual"),
        call.options.get("activation") != "identity", **options,
    )  # fmt: skip
    if not bn.training:
        return {"output": output}
    named = {"output": output, "z": z, "mean": mean, "invstd": invstd, **dict(zip(RUNNING, bn[:2], strict=True))}
    return {name: tensor for name, tensor in named.items() if tensor is not None}
