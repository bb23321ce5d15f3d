"""The C++/CUDA kernels of csrc/cuda, called through the operators that the `_cuda` library registers.

Here are layouts and allocation: the kernels read tensors that are dense, NHWC or NCHW, and fill what they are given.
`resfuse.backends.reference` specifies each function; convolutions are in `resfuse.backends.cuda_conv`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resfuse import _extension
from resfuse.backends import cuda_conv
from resfuse.backends.cuda_conv import conv_bn_act_forward, conv_forward, inference_route
from resfuse.layout import channels_last, copy_back, dense, kernel_vector, ordered_like, pool_output_size, residual_for
from resfuse.types import BatchNorm, Pooling, Problem

__all__ = ["conv_bn_act_forward", "conv_forward", "inference_route"]

BATCH_NORM_KERNELS = (
    "bn_act_forward", "bn_act_backward", "bn_statistics", "bn_apply", "bn_backward_reduce", "bn_backward_apply",
)  # fmt: skip
POOLING_KERNELS = ("max_pool_forward", "max_pool_backward")
KERNELS = (
    "add_relu_forward", "add_relu_backward", *BATCH_NORM_KERNELS, "conv_bn_act_forward", "conv_forward",
    *POOLING_KERNELS,
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MINIMUM_CAPABILITY = (8, 0)
MOST_CHANNELS_OR_PIXELS = 2**30 - 1

# Schemas live here, implementations in csrc/bindings_cuda.cpp. Results and workspaces are arguments, so that torch
# allocates them. `launches` 1 or 2 asks for that form of a kernel, 0 is as few as possible.
_LIBRARY = torch.library.Library("resfuse_cuda", "DEF")
_LIBRARY.define("add_relu_forward(Tensor input, Tensor residual, Tensor(a!) output) -> ()")
_LIBRARY.define("add_relu_backward(Tensor grad_output, Tensor output, Tensor(a!) grad_input) -> ()")
_LIBRARY.define("bn_workspace_size(Tensor input) -> int")
_LIBRARY.define("bn_statistics(Tensor input, Tensor(a!) mean, Tensor(b!) m2, Tensor(c!) workspace, int launches) -> ()")
_LIBRARY.define(
    "bn_train_forward(Tensor input, Tensor? residual, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor? weight, Tensor? bias, bool relu, float momentum, float eps, Tensor(c!) output, Tensor(d!) mean, "
    "Tensor(e!) invstd, Tensor(f!) workspace, int launches, int known_part) -> ()"
)
_LIBRARY.define(
    "bn_apply(Tensor input, Tensor? residual, Tensor mean, Tensor spread, Tensor? weight, Tensor? bias, bool relu, "
    "bool spread_is_variance, float eps, Tensor(a!) output) -> ()"
)
_LIBRARY.define(
    "bn_backward(Tensor grad_output, Tensor input, Tensor? output, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor invstd, bool relu, bool batch_statistics, Tensor(a!)? grad_input, Tensor(b!)? grad_residual, "
    "Tensor(c!) sum_g, Tensor(d!) sum_g_xhat, Tensor(e!) workspace, int launches) -> ()"
)
_LIBRARY.define(
    "bn_backward_apply(Tensor grad_output, Tensor input, Tensor? weight, Tensor mean, Tensor invstd, Tensor sum_g, "
    "Tensor sum_g_xhat, float count, Tensor(a!) grad_input) -> ()"
)
# settings: kernel, stride, padding, dilation (vertical, horizontal)
_LIBRARY.define("max_pool_forward(Tensor input, int[] settings, Tensor(a!) output, Tensor(b!) positions) -> ()")
_LIBRARY.define("max_pool_backward(Tensor grad_output, Tensor positions, int[] settings, Tensor(a!) grad_input) -> ()")
_OPERATORS = torch.ops.resfuse_cuda
_add_relu_forward = _OPERATORS.add_relu_forward.default
_add_relu_backward = _OPERATORS.add_relu_backward.default
_bn_statistics = _OPERATORS.bn_statistics.default
_bn_train_forward = _OPERATORS.bn_train_forward.default
_bn_apply = _OPERATORS.bn_apply.default
_bn_backward = _OPERATORS.bn_backward.default
_bn_backward_apply = _OPERATORS.bn_backward_apply.default
_max_pool_forward = _OPERATORS.max_pool_forward.default
_max_pool_backward = _OPERATORS.max_pool_backward.default

_launches = 0
"""The form that batch norm's kernels run in: tests compare 1 and 2."""


def unavailable_reason() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU (torch.cuda.is_available() is False)"
    return _extension.load("_cuda")


def only_on_request_reason() -> str | None:
    return None


def unsupported_reasons(problem: Problem) -> list[str]:
    reasons = []
    if problem.dtype not in DTYPES:
        reasons.append(f"cuda computes in float32, bfloat16 and float16, not {problem.dtype}")
    reasons.extend(device_reasons(problem))
    if 0 in problem.shape or 0 in (problem.weight_shape or ()):
        reasons.append("cuda has no kernel for an empty tensor")
    elif problem.convolution is not None:
        reasons.extend(cuda_conv.unsupported_reasons(problem))
    elif problem.kernel in BATCH_NORM_KERNELS:
        reasons.extend(_unsupported_activation(problem.shape))
    elif problem.kernel in POOLING_KERNELS:
        n, c, h, w = problem.shape
        if max(n * h, w * c) > MOST_CHANNELS_OR_PIXELS:
            reasons.append(f"cuda pools up to {MOST_CHANNELS_OR_PIXELS} rows in all, and values of a row")
    return reasons


def device_reasons(problem: Problem) -> list[str]:
    """Unmet device requirements."""
    if problem.device.type != "cuda":
        return [f"cuda needs tensors on a CUDA device, not on {problem.device}"]
    if problem.capability < MINIMUM_CAPABILITY:
        return [f"cuda needs compute capability 8.0 or newer, not {'.'.join(map(str, problem.capability))}"]
    return []


def _unsupported_activation(shape: torch.Size) -> list[str]:
    if len(shape) != 4:
        return [f"cuda normalises (N, C, H, W) tensors, not shape {tuple(shape)}"]
    if max(shape[1], shape[2] * shape[3]) > MOST_CHANNELS_OR_PIXELS:
        return [f"cuda normalises up to {MOST_CHANNELS_OR_PIXELS} channels and pixels, not shape {tuple(shape)}"]
    return []


def add_relu_forward(input: Tensor, residual: Tensor) -> Tensor:
    """relu(input + residual), in the layout of `input`."""
    output = torch.empty_like(input)
    _add_relu_forward(ordered_like(input, output), ordered_like(residual, output), output)
    return output


def add_relu_backward(grad_output: Tensor, output: Tensor) -> Tensor:
    """The gradient of both summands: grad_output where output > 0 (or is NaN, as in torch.relu), else 0."""
    grad_input = torch.empty_like(output)
    _add_relu_backward(ordered_like(grad_output, grad_input), ordered_like(output, grad_input), grad_input)
    return grad_input


def bn_act_forward(
    input: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(output, mean, invstd); the last two are None without `training`."""
    input = dense(input)
    if bn.training:
        return bn_train_forward(input, bn, residual, relu, _workspace(input))
    output = torch.empty_like(input)
    residual = residual_for(output, residual)
    means, variances, weight, bias = (kernel_vector(vector, input) for vector in bn[:4])
    assert means is not None and variances is not None
    _bn_apply(input, residual, means, variances, weight, bias, relu, True, bn.eps, output)
    return output, None, None


def bn_train_forward(
    input: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool, workspace: Tensor, known_part: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, mean, invstd) of a dense input.

    With `known_part`, the workspace has the mean and M2 of each channel for every `known_part` pixels of NHWC memory.
    """
    output = torch.empty_like(input)
    residual = residual_for(output, residual)
    means, variances, weight, bias = (kernel_vector(vector, input) for vector in bn[:4])
    mean, invstd = _two_vectors(input)
    _bn_train_forward(
        input, residual, means, variances, weight, bias, relu, bn.momentum, bn.eps, output, mean, invstd, workspace,
        _launches, known_part,
    )  # fmt: skip
    copy_back(bn, means, variances)
    return output, mean, invstd


def bn_act_backward(
    grad_output: Tensor,
    input: Tensor,
    output: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    relu: bool,
    training: bool,
    needs_input_grad: bool,
    needs_residual_grad: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """(grad_input, grad_weight, grad_bias, grad_residual); without a ReLU the last is `grad_output`."""
    input = dense(input)
    grad_input = torch.empty_like(input) if needs_input_grad else None
    grad_residual = torch.empty_like(input) if needs_residual_grad and relu else None
    sum_g, sum_g_xhat = _two_vectors(input)
    _bn_backward(
        ordered_like(grad_output, input), input, ordered_like(output, input),
        *(kernel_vector(vector, input) for vector in (weight, bias, mean, invstd)),
        relu, training, grad_input, grad_residual, sum_g, sum_g_xhat, _workspace(input), _launches,
    )  # fmt: skip
    if needs_residual_grad and not relu:
        grad_residual = grad_output
    return grad_input, sum_g_xhat, sum_g, grad_residual


def bn_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, M2) per channel."""
    input = dense(input)
    mean, m2 = _two_vectors(input)
    _bn_statistics(input, mean, m2, _workspace(input), _launches)
    return mean, m2


def bn_apply(
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """act(weight (input - mean) invstd + bias [+ residual])."""
    input = dense(input)
    output = torch.empty_like(input)
    vectors = (kernel_vector(vector, input) for vector in (mean, invstd, weight, bias))
    _bn_apply(input, residual_for(output, residual), *vectors, relu, False, 0.0, output)
    return output


def bn_backward_reduce(
    grad_output: Tensor,
    input: Tensor,
    output: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum g, sum g xhat, g)."""
    _, sum_g_xhat, sum_g, masked = bn_act_backward(
        grad_output, input, output, weight, bias, mean, invstd, relu, False, False, True
    )
    assert masked is not None
    return sum_g, sum_g_xhat, masked


def bn_backward_apply(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    sum_g: Tensor,
    sum_g_xhat: Tensor,
    count: int | None,
) -> Tensor:
    """grad_input from given sums over `count` values per channel; None: running statistics were used."""
    input = dense(input)
    grad_input = torch.empty_like(input)
    vectors = (kernel_vector(vector, input) for vector in (weight, mean, invstd, sum_g, sum_g_xhat))
    _bn_backward_apply(ordered_like(grad_output, input), input, *vectors, float(count or 0), grad_input)
    return grad_input


def max_pool_forward(input: Tensor, pooling: Pooling) -> tuple[Tensor, Tensor]:
    """(output, positions): the maximum of each window, and which of its elements that is, by rows, as uint8."""
    input = channels_last(input)
    shape = (*input.shape[:2], *pool_output_size(input.shape, pooling))
    output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)
    positions = torch.empty_like(output, dtype=torch.uint8)
    _max_pool_forward(input, pooling.window(), output, positions)
    return output, positions


def max_pool_backward(grad_output: Tensor, positions: Tensor, shape: torch.Size, pooling: Pooling) -> Tensor:
    """The gradient of an input of that shape, in NHWC memory."""
    grad_input = torch.empty(
        shape, dtype=grad_output.dtype, device=grad_output.device, memory_format=torch.channels_last
    )
    _max_pool_backward(channels_last(grad_output), positions, pooling.window(), grad_input)
    return grad_input


def _two_vectors(input: Tensor) -> tuple[Tensor, Tensor]:
    """Two float32 values per channel, to be computed."""
    first = torch.empty(input.shape[1], dtype=torch.float32, device=input.device)
    return first, torch.empty_like(first)


_workspace_sizes: dict[tuple[torch.device, int], int] = {}


def _workspace(input: Tensor) -> Tensor:
    """Memory in which the blocks of a reduction give each other their parts.

    New for every call: torch's allocator knows which stream, or which captured graph, it belongs to.
    """
    key = (input.device, input.shape[1])
    size = _workspace_sizes.get(key)
    if size is None:
        size = _workspace_sizes[key] = _OPERATORS.bn_workspace_size(input)
    return torch.empty(size, dtype=torch.float32, device=input.device)
