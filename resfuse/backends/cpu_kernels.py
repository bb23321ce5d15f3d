"""The kernels of csrc/cpu as operators: their schemas, whose implementations csrc/bindings_cpu.cpp registers.

Their results are new tensors, but for those of max pooling, whose size the caller knows.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from resfuse.types import Convolution, Setting

_LIBRARY = torch.library.Library("resfuse_cpu", "DEF")
for _schema in (
    "add_relu_forward(Tensor input, Tensor residual) -> Tensor",
    "add_relu_backward(Tensor grad_output, Tensor output) -> Tensor",
    "bn_statistics(Tensor input) -> (Tensor, Tensor)",
    # pooled: the output lies in the pool of csrc/cpu/memory.h, as all z and gradients do, and cannot be resized.
    "bn_apply(Tensor input, Tensor? residual, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, bool relu, "
    "bool pooled) -> Tensor",
    "bn_eval_forward(Tensor input, Tensor? residual, Tensor running_mean, Tensor running_var, Tensor? weight, "
    "Tensor? bias, float eps, bool relu) -> Tensor",
    # (output, mean, invstd)
    "bn_train_forward(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor? statistics, float momentum, float eps, bool relu, bool pooled) "
    "-> (Tensor, Tensor, Tensor)",
    # (grad_input, sum g xhat, sum g, g)
    "bn_backward(Tensor grad_output, Tensor input, Tensor? output, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor invstd, bool relu, bool training, bool needs_input_grad, bool needs_masked) "
    "-> (Tensor?, Tensor, Tensor, Tensor?)",
    "bn_backward_apply(Tensor grad_output, Tensor input, Tensor? output, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor invstd, bool relu, Tensor sum_g, Tensor sum_g_xhat, float count) -> Tensor",
    # settings: kernel, stride, padding, dilation (vertical, horizontal)
    "max_pool_forward(Tensor input, int[] settings, Tensor(a!) output, Tensor(b!) positions) -> ()",
    "max_pool_backward(Tensor grad_output, Tensor positions, int[] settings, Tensor(a!) grad_input) -> ()",
    # settings: see `conv_settings`; pooling: as above.
    # The first two check their arguments themselves, and return None where they do not take them.
    # tensors: conv_weight, conv_bias, running_mean, running_var, weight, bias and settings of each convolution, which
    # reads the output of the one before.
    "conv_inference_forward(Tensor input, Tensor?[] tensors, Tensor? residual) -> Tensor?",
    "conv_pool_forward(Tensor input, Tensor conv_weight, Tensor? conv_bias, Tensor? running_mean, Tensor? running_var, "
    "Tensor? weight, Tensor? bias, Tensor settings, int[] pooling) -> Tensor?",
    "conv_input_grad(Tensor grad_output, Tensor conv_weight, Tensor settings, Tensor? carried) -> Tensor",
    "conv_weight_grad(Tensor grad_output, Tensor input, Tensor conv_weight, Tensor settings) -> Tensor?",
    "conv_statistics_forward(Tensor input, Tensor conv_weight, Tensor? conv_bias, Tensor settings) -> (Tensor, Tensor)",
    "bfloat16_products() -> str",
    "instruction_set() -> str",
):
    _LIBRARY.define(_schema)

_kernels = torch.ops.resfuse_cpu
# Looked up once: `torch.ops.a.b.default` takes half a microsecond.
add_relu_backward = _kernels.add_relu_backward.default
add_relu_forward = _kernels.add_relu_forward.default
bfloat16_products = _kernels.bfloat16_products.default
bn_apply = _kernels.bn_apply.default
bn_backward = _kernels.bn_backward.default
bn_backward_apply = _kernels.bn_backward_apply.default
bn_eval_forward = _kernels.bn_eval_forward.default
bn_statistics = _kernels.bn_statistics.default
bn_train_forward = _kernels.bn_train_forward.default
conv_inference_forward = _kernels.conv_inference_forward.default
conv_pool_forward = _kernels.conv_pool_forward.default
conv_input_grad = _kernels.conv_input_grad.default
conv_statistics_forward = _kernels.conv_statistics_forward.default
conv_weight_grad = _kernels.conv_weight_grad.default
instruction_set = _kernels.instruction_set.default
max_pool_backward = _kernels.max_pool_backward.default
max_pool_forward = _kernels.max_pool_forward.default


@functools.lru_cache(maxsize=4096)
def conv_settings(
    settings: tuple[Setting, Setting, Setting, int],
    eps: float = 0.0,
    relu: bool = False,
    overwrite_residual: bool = False,
    pad_residual: bool = False,
) -> Tensor:
    """The numbers of a convolution (`Convolution.of`) in one tensor, which PyTorch passes on faster than numbers."""
    stride, padding, dilation, groups = Convolution.of(*settings)
    numbers = (*stride, *padding, *dilation, groups, eps, relu, overwrite_residual, pad_residual)
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")
