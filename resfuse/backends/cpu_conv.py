"""Convolutions of the CPU backend: csrc/cpu/conv*, with batch norm, residual and ReLU in the epilogue.

Nothing is folded and nothing is kept: every call reads the raw weight and the raw tensors of batch norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resfuse.backends import cpu_kernels, reference
from resfuse.types import BatchNorm, Convolution

_inference_forward = cpu_kernels.conv_inference_forward


def conv_bn_act_inference(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    convolution: Convolution,
    bn: BatchNorm,
    residual: Tensor | None,
    relu: bool,
    overwrite_residual: bool = False,
) -> Tensor:
    """act(BN(conv(input)) + residual) with running statistics; `overwrite_residual` gives up the residual's memory."""
    (sh, sw), (ph, pw), (dh, dw), groups = convolution
    return _inference_forward(
        input, _readable(conv_weight, input), conv_bias, *bn[:4], residual,
        sh, sw, ph, pw, dh, dw, groups, bn.eps, relu, overwrite_residual,
    )  # fmt: skip


def conv_forward(input: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, convolution: Convolution) -> Tensor:
    """z = conv(input) + conv_bias."""
    (sh, sw), (ph, pw), (dh, dw), groups = convolution
    return _inference_forward(
        input, _readable(conv_weight, input), conv_bias, None, None, None, None, None,
        sh, sw, ph, pw, dh, dw, groups, 0.0, False, False,
    )  # fmt: skip


conv_backward = reference.conv_backward


def _readable(conv_weight: Tensor, input: Tensor) -> Tensor:
    """Kernels read weights in float32 as well as in the dtype of the input; autocast may bring others."""
    dtype = conv_weight.dtype
    return conv_weight if dtype is input.dtype or dtype is torch.float32 else conv_weight.to(input.dtype)
