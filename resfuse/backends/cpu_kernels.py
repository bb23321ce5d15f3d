"""The kernels of csrc/cpu as operators: their schemas, whose implementations csrc/bindings_cpu.cpp registers.

Every result is an argument, so that the caller decides where it lies, but for those of convolutions.
"""

from __future__ import annotations

import torch

_LIBRARY = torch.library.Library("resfuse_cpu", "DEF")
for _schema in (
    "add_relu_forward(Tensor input, Tensor residual, Tensor(a!) output) -> ()",
    "add_relu_backward(Tensor grad_output, Tensor output, Tensor(a!) grad_input) -> ()",
    "bn_statistics(Tensor input, Tensor(a!) mean, Tensor(b!) m2) -> ()",
    "bn_apply(Tensor input, Tensor? residual, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, bool relu, "
    "Tensor(a!) output) -> ()",
    "bn_eval_forward(Tensor input, Tensor? residual, Tensor running_mean, Tensor running_var, Tensor? weight, "
    "Tensor? bias, float eps, bool relu, Tensor(a!) output) -> ()",
    "bn_train_forward(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor? statistics, float momentum, float eps, bool relu, Tensor(c!) output, "
    "Tensor(d!) mean, Tensor(e!) invstd) -> ()",
    "bn_backward_reduce(Tensor grad_output, Tensor input, Tensor? output, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor invstd, bool relu, Tensor(a!) sum_g, Tensor(b!) sum_g_xhat, Tensor(c!)? masked) -> ()",
    "bn_backward_apply(Tensor grad_output, Tensor input, Tensor? output, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor invstd, bool relu, Tensor sum_g, Tensor sum_g_xhat, float count, Tensor(a!) grad_input) -> ()",
    # settings: kernel, stride, padding, dilation (vertical, horizontal)
    "max_pool_forward(Tensor input, int[] settings, Tensor(a!) output, Tensor(b!) positions) -> ()",
    "max_pool_backward(Tensor grad_output, Tensor positions, int[] settings, Tensor(a!) grad_input) -> ()",
    # settings: stride, padding, dilation (vertical, horizontal) and groups
    "conv_inference_forward(Tensor input, Tensor conv_weight, Tensor? conv_bias, Tensor? running_mean, "
    "Tensor? running_var, Tensor? weight, Tensor? bias, Tensor? residual, int[] settings, float eps, bool relu, "
    "bool overwrite_residual) -> Tensor",
    "conv_input_grad(Tensor grad_output, Tensor conv_weight, int[] settings) -> Tensor",
    "conv_statistics_forward(Tensor input, Tensor conv_weight, Tensor? conv_bias, int[] settings) -> (Tensor, Tensor)",
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
bn_backward_apply = _kernels.bn_backward_apply.default
bn_backward_reduce = _kernels.bn_backward_reduce.default
bn_eval_forward = _kernels.bn_eval_forward.default
bn_statistics = _kernels.bn_statistics.default
bn_train_forward = _kernels.bn_train_forward.default
conv_inference_forward = _kernels.conv_inference_forward.default
conv_input_grad = _kernels.conv_input_grad.default
conv_statistics_forward = _kernels.conv_statistics_forward.default
instruction_set = _kernels.instruction_set.default
max_pool_backward = _kernels.max_pool_backward.default
max_pool_forward = _kernels.max_pool_forward.default
