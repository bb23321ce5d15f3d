"""The specification: the kernel API in plain eager PyTorch, for any device, dtype and layout.

The other backends are tested against it, and it runs where none of them applies.

Notation, per channel over N, H, W: mean m, biased variance v, invstd s = (v + eps)^-1/2, xhat = (z - m) s,
a = weight xhat + bias (+ residual), y = relu(a) or a.  Source: Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3;
running statistics as in torch.nn.BatchNorm2d (running_var takes the unbiased variance).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from resfuse.layout import as_result, conv_memory_format, is_channels_last
from resfuse.types import BatchNorm, Convolution, Pair, Pooling, Problem

KERNELS = (
    "add_relu_forward", "add_relu_backward", "bn_act_forward", "bn_act_backward",
    "conv_bn_act_forward", "conv_forward", "conv_backward",
    "bn_statistics", "bn_apply", "bn_backward_reduce", "bn_backward_apply", "max_pool_forward", "max_pool_backward",
)  # fmt: skip


def unavailable_reason() -> str | None:
    return None


def only_on_request_reason() -> str | None:
    return None


def unsupported_reasons(problem: Problem) -> list[str]:
    return []


def add_relu_forward(input: Tensor, residual: Tensor) -> Tensor:
    """relu(input + residual), in the layout of `input`."""
    return torch.add(input, residual).relu_()


def add_relu_backward(grad_output: Tensor, output: Tensor) -> Tensor:
    """The gradient of both summands: grad_output where output > 0 (or is NaN, as in torch.relu), else 0."""
    return torch.ops.aten.threshold_backward(grad_output, output, 0)


def bn_act_forward(
    input: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(output, mean, invstd).

    A residual may have fewer channels than the input: the others are zeros, for which no tensor is made.
    With `training` batch statistics are used and the running ones updated in place, and the output is, bit for bit,
    `bn_apply` of mean and invstd, so that backward can compute it again.  Without it mean and invstd are None: backward
    takes them from `inference_statistics`.
    """
    running_mean, running_var, weight, bias, training, momentum, eps = bn
    if training and input.numel() == 0:  # eager returns at once and leaves the running statistics alone
        empty = _widen(input.new_zeros(input.shape[1]))
        return _activate(as_result(F.batch_norm(input, *bn), input), residual, relu), empty, empty
    if training:
        _, mean, invstd = torch.native_batch_norm(input, weight, bias, running_mean, running_var, True, momentum, eps)
        mean, invstd = _widen(mean), _widen(invstd)
        return bn_apply(input, mean, invstd, weight, bias, residual, relu), mean, invstd
    # Not F.batch_norm, which refuses eps = 0: torchvision's frozen norms have it where weights were trained so.
    output = torch.batch_norm(
        input, weight, bias, running_mean, running_var, False, momentum, eps, torch.backends.cudnn.enabled
    )
    # CUDA's kernel keeps the strides of any dense input; the result has those of a memory format, as everywhere.
    return _activate(as_result(output, input), residual, relu), None, None


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
    """(grad_input, grad_weight, grad_bias, grad_residual).

    The mask of the ReLU comes from its `output`, or, where that is None, from `bn_apply` of the input: without a
    residual that is the same, bit for bit.
    With g = grad_output [a > 0]: grad_bias = sum g, grad_weight = sum g xhat, grad_residual = g, and grad_input =
    weight s g with running statistics, weight s (g - grad_bias / n - xhat grad_weight / n) with batch statistics.
    The per-channel gradients are in the dtype of `mean`.
    """
    masked = _masked(grad_output, input, output, (weight, bias, mean, invstd), relu)
    if input.numel() == 0:
        grad_input, grad_weight, grad_bias = torch.zeros_like(input), torch.zeros_like(mean), torch.zeros_like(mean)
    else:
        grad_input, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            masked,
            input,
            _wide(weight),
            mean,
            invstd.pow(-2),
            mean,
            invstd,
            training,
            0.0,
            [needs_input_grad, True, True],
        )
    return grad_input if needs_input_grad else None, grad_weight, grad_bias, masked if needs_residual_grad else None


def _masked(
    grad_output: Tensor, input: Tensor, output: Tensor | None, vectors: tuple[Tensor | None, ...], relu: bool
) -> Tensor:
    """g = grad_output [a > 0], as in `bn_act_backward`."""
    if relu and output is None:
        weight, bias, mean, invstd = vectors
        output = bn_apply(input, mean, invstd, weight, bias, None, False)  # type: ignore[arg-type]
    return add_relu_backward(grad_output, output) if relu and output is not None else grad_output


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
    """(output, z, mean, invstd); without `training` the last three, which only backward needs, are None.

    A residual may have fewer channels than the output, as in `bn_act_forward`; then it is not overwritten.
    Without `training` the convolution's weight and bias may be float32 where the input is bfloat16 or float16, and
    `overwrite_residual` allows the backend to write the output over the residual.
    """
    z = conv_forward(input, conv_weight, conv_bias, convolution)
    output, mean, invstd = bn_act_forward(z, bn, residual, relu)
    return (output, z, mean, invstd) if bn.training else (output, None, None, None)


def conv_forward(input: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, convolution: Convolution) -> Tensor:
    """z = conv2d(input, conv_weight) + conv_bias, in the layout that `conv_memory_format` names."""
    if conv_weight.dtype != input.dtype:
        conv_weight = conv_weight.to(input.dtype)
    if conv_bias is not None and conv_bias.dtype != input.dtype:
        conv_bias = conv_bias.to(input.dtype)
    memory_format = conv_memory_format(input, conv_weight)
    if unreliable_in_channels_last(input.device, input.shape, conv_weight.shape, convolution.stride):
        input, conv_weight = _nchw(input), _nchw(conv_weight)
    if torch._C._is_any_autocast_enabled():
        # The dtype has been decided: a backward called inside of autocast computes z again as its forward did.
        with torch.autocast("cpu" if input.is_meta else input.device.type, enabled=False):  # which knows no meta device
            z = F.conv2d(input, conv_weight, conv_bias, *convolution)
    else:
        z = F.conv2d(input, conv_weight, conv_bias, *convolution)
    return z.contiguous(memory_format=memory_format)


def conv_backward(
    grad_output: Tensor,
    input: Tensor,
    conv_weight: Tensor,
    convolution: Convolution,
    needs_grad: tuple[bool, ...],
    carried: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(grad_input [+ carried], grad_weight, grad_bias) of conv2d; those not named in `needs_grad` are None.

    `carried` may be overwritten.
    """
    if needs_grad[1] and _unreliable_weight_gradient(input, convolution.stride):
        others = (needs_grad[0], False, needs_grad[2])
        grad_input, _, grad_bias = conv_backward(grad_output, input, conv_weight, convolution, others, carried)
        wide = (grad_output.float(), input.float(), conv_weight.float())
        _, grad_weight, _ = conv_backward(*wide, convolution, (False, True, False))
        assert grad_weight is not None
        return grad_input, grad_weight.to(conv_weight.dtype), grad_bias
    if unreliable_in_channels_last(input.device, input.shape, conv_weight.shape, convolution.stride):
        grad_output, input, conv_weight = _nchw(grad_output), _nchw(input), _nchw(conv_weight)
    stride, padding, dilation, groups = convolution
    channels = [conv_weight.shape[0]]
    grads = torch.ops.aten.convolution_backward(
        grad_output, input, conv_weight, channels, stride, padding, dilation, False, [0, 0], groups, needs_grad
    )
    grad_input, grad_weight, grad_bias = (
        grad if needed else None for grad, needed in zip(grads, needs_grad, strict=True)
    )
    if carried is not None and grad_input is not None:
        grad_input = carried.add_(grad_input)
    return grad_input, grad_weight, grad_bias


def unreliable_in_channels_last(
    device: torch.device, input_shape: torch.Size, weight_shape: torch.Size, stride: Pair
) -> bool:
    """True if oneDNN (torch 2.11) is wrong in channels_last and right in NCHW; no ResNet has such a convolution.

    The weight gradient of a strided 1x1 convolution of less than 16 channels writes beyond its memory (seen with two
    threads); one input channel per group with unequal strides can leave parts of the output unwritten.
    """
    if device.type != "cpu" or stride == (1, 1):
        return False
    strided_1x1 = weight_shape[2:] == (1, 1) and input_shape[1] < 16
    return strided_1x1 or (weight_shape[1] == 1 and stride[0] != stride[1])


def _nchw(tensor: Tensor) -> Tensor:
    """With the strides of NCHW: those of a 1x1 weight can say NHWC although it counts as contiguous."""
    return tensor.clone(memory_format=torch.contiguous_format) if is_channels_last(tensor) else tensor.contiguous()


def _unreliable_weight_gradient(input: Tensor, stride: Pair) -> bool:
    """oneDNN's bfloat16 weight gradient returns uninitialised memory where the input is narrower than the stride."""
    narrow = input.shape[2] < stride[0] or input.shape[3] < stride[1]
    return narrow and input.dtype == torch.bfloat16 and input.device.type == "cpu"


def bn_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, M2) per channel of an (N, C, H, W) tensor: M2 = sum (x - mean)^2, what Chan's formula merges."""
    wide = _widen(input)
    mean = wide.mean((0, 2, 3))
    return mean, (wide - _per_channel(mean)).square().sum((0, 2, 3))


def bn_apply(
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """act((input - mean) (invstd weight) + bias [+ residual]) with statistics given."""
    # PyTorch's own kernel, in one pass: it takes the variance for eps = 0.
    output = torch.batch_norm(
        input, _wide(weight), _wide(bias), mean, invstd.pow(-2), False, 0.0, 0.0, torch.backends.cudnn.enabled
    )
    return _activate(as_result(output, input), residual, relu)


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
    """(sum g, sum g xhat, g) with g = grad_output masked by the ReLU as in `bn_act_backward`."""
    masked = _masked(grad_output, input, output, (weight, bias, mean, invstd), relu)
    g = _widen(masked)
    xhat = (_widen(input) - _per_channel(mean)) * _per_channel(invstd)
    return g.sum((0, 2, 3)), (g * xhat).sum((0, 2, 3)), masked


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
    """grad_input from g and the (all-reduced) sums over `count` values per channel; None: running statistics were used.

    `grad_output` is masked already.
    """
    g = _widen(grad_output)
    if count is not None:
        xhat = (_widen(input) - _per_channel(mean)) * _per_channel(invstd)
        g = g - _per_channel(sum_g) / count - xhat * _per_channel(sum_g_xhat) / count
    scale = invstd if weight is None else invstd * weight
    return (g * _per_channel(scale)).to(input.dtype)


def max_pool_forward(input: Tensor, pooling: Pooling) -> tuple[Tensor, Tensor]:
    """(output, positions) of `F.max_pool2d`; a position is that of the maximum in its window, by rows, as uint8.

    Of several maxima it is the first; NaN is greater than all numbers, and of several NaN it is the last.
    """
    output, pixels = F.max_pool2d(input, *pooling, return_indices=True)
    rows, columns = _window_starts(output, pooling)
    width, (dilation_h, dilation_w) = input.shape[3], pooling.dilation
    row, column = (pixels // width - rows) // dilation_h, (pixels % width - columns) // dilation_w
    return output, (row * pooling.kernel_size[1] + column).to(torch.uint8)


def max_pool_backward(grad_output: Tensor, positions: Tensor, shape: torch.Size, pooling: Pooling) -> Tensor:
    """The gradient of an input of that shape, in any layout; a composition of differentiable operations."""
    rows, columns = _window_starts(positions, pooling)
    where, kernel_w = positions.long(), pooling.kernel_size[1]
    row = rows + where // kernel_w * pooling.dilation[0]
    column = columns + where % kernel_w * pooling.dilation[1]
    pixels = (row * shape[3] + column).flatten(2)
    images = grad_output.new_zeros((*shape[:2], shape[2] * shape[3]))
    return images.scatter_add(2, pixels, grad_output.reshape(pixels.shape)).view(shape)


def _window_starts(output: Tensor, pooling: Pooling) -> tuple[Tensor, Tensor]:
    """The first row and column of each window, which may lie in the padding."""
    row, column = (torch.arange(size, device=output.device) for size in output.shape[2:])
    (stride_h, stride_w), (padding_h, padding_w) = pooling.stride, pooling.padding
    return (row * stride_h - padding_h).view(-1, 1), column * stride_w - padding_w


def inference_statistics(bn: BatchNorm) -> tuple[Tensor, Tensor]:
    """(mean, invstd) of running statistics, in float32 or wider.  Copies: training may go on before backward."""
    assert bn.running_mean is not None and bn.running_var is not None
    return _widen(bn.running_mean).clone(), (_widen(bn.running_var) + bn.eps).rsqrt()


def _activate(output: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """act(output + residual), with zeros for the channels that a narrower residual does not have."""
    if residual is not None and residual.shape[1] < output.shape[1]:
        output[:, : residual.shape[1]] += residual
    elif residual is not None:
        output = output + residual
    return output.relu_() if relu else output


def _per_channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def _widen(tensor: Tensor) -> Tensor:
    """Half precision is computed in float32, everything else in its own precision."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _wide(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else _widen(vector)
