"""PyTorch's own convolution, which is cuDNN's on a GPU, and a kernel for batch norm, residual and activation behind it.

Two launches, in inference too.  It has no rank: it runs where it is asked for, or was measured to be the fastest.
ATen's fused `cudnn_convolution_relu` and `cudnn_convolution_add_relu` are no backends: they take a folded weight, which
is rounded once more and can go stale.
"""

from __future__ import annotations

from torch import Tensor

from resfuse.backends import dispatch, reference
from resfuse.types import BatchNorm, Convolution, Problem

KERNELS = ("conv_bn_act_forward",)


def unavailable_reason() -> str | None:
    return None


def only_on_request_reason() -> str | None:
    return None


def unsupported_reasons(problem: Problem) -> list[str]:
    return []


def conv_bn_act_forward(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    convolution: Convolution,
    bn: BatchNorm,
    residual: Tensor | None,
    relu: bool,
    overwrite_residual: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(output, z, mean, invstd); the last three are None without `training`."""
    z = reference.conv_forward(input, conv_weight, conv_bias, convolution)
    epilogue = dispatch.backend_for("bn_act_forward", z, request=None)
    output, mean, invstd = epilogue.bn_act_forward(z, bn, residual, relu)
    return (output, z, mean, invstd) if bn.training else (output, None, None, None)
