"""The public functions: check the arguments, pack them, apply autocast, run the operator or its autograd.Function.

All tensors of a call live on one device.  Inputs are (N, C, H, W) in any memory layout; the result is in the layout the
eager operators would give (`bn_act`, `add_relu`: that of `input`; `conv_bn_act`: channels_last if `input` or
`conv_weight` is, else contiguous).  Shapes, dtypes and devices are checked before anything is computed or written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from resfuse import arguments, ops
from resfuse.backends import dispatch
from resfuse.layout import share_storage
from resfuse.ops.add_relu import AddReLUFunction
from resfuse.ops.bn_act import BNActFunction
from resfuse.ops.conv_bn_act import ConvBNActFunction
from resfuse.ops.sync_bn_act import SyncBNActFunction
from resfuse.types import BatchNorm, InferenceCall, Pooling


def add_relu(input: Tensor, residual: Tensor) -> Tensor:
    """ReLU of a sum, in one pass over memory: the end of a residual block.

    Equivalent to `torch.relu(input + residual)`.  NaN propagates, as in `torch.relu`.  Saves its output for backward.

    Args:
        input: any shape, floating point.
        residual: same shape, dtype and device; its layout may differ.

    Returns:
        A new tensor of the shape, dtype and layout of `input`.

    Raises:
        TypeError: an argument is not a floating-point tensor, or the dtypes differ.
        ValueError: shapes, devices or tensor layouts (strided, sparse) do not fit.

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), equation 1 and figure 2.

    Example:
        >>> add_relu(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.5]))
        tensor([1.5000, 0.0000])
    """
    arguments.check_input("input", input)
    if _promotes(input, input.dtype, residual):
        return torch.relu(input + residual)  # eager promotes here; nothing to fuse into
    arguments.check_residual(residual, input.shape, input)
    if _needs_grad(input, residual):
        return AddReLUFunction.apply(*_distinct(input, residual))
    return ops.add_relu.run(input, residual)


def bn_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str = "relu",
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    pad_residual: bool = False,
) -> Tensor:
    """Batch normalisation, an optional residual, and the activation.

    Equivalent to::

        output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        output = output if residual is None else output + residual
        output = torch.relu(output) if activation == "relu" else output

    Args:
        input: (N, C, H, W), floating point.
        running_mean, running_var: (C,), updated in place when `training`; may be None when `training`.
        weight, bias: (C,) or None.  Like the running statistics they have the dtype of `input`, or float32.
        residual: (N, C, H, W) of the dtype of `input`, added before the activation; its layout may differ.
        activation: "relu" or "identity".
        training: normalise by the batch's statistics (biased variance over N, H, W) and update the running ones
            (unbiased variance), instead of normalising by the running ones.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance; positive, as for `F.batch_norm`.
        pad_residual: let the residual have fewer channels, (N, C', H, W) with C' <= C: adds
            `F.pad(residual, (0, 0, 0, 0, 0, C - C'))` without making that tensor (the parameter-free shortcut of He et
            al. 2016, arXiv:1512.03385, option A).

    Returns:
        (N, C, H, W), dtype and layout of `input`.

    Raises:
        TypeError: a tensor is not floating point, or a dtype does not fit `input`.
        ValueError: a shape, device or layout does not fit, `activation` is unknown, the running statistics are missing
            while not training, or there is only one value per channel in training (as `F.batch_norm` does).

    Saved for backward: `input`, weight, mean, invstd and, for the mask of the ReLU, the output, or, when `training` and
    without a residual, bias.
    Source: Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3; running statistics as in `torch.nn.BatchNorm2d`.

    Example:
        >>> input, mean, var = torch.randn(8, 3, 5, 5), torch.zeros(3), torch.ones(3)
        >>> output = bn_act(input, mean, var, activation="identity", training=True)
        >>> torch.allclose(output.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
        True
    """
    relu = arguments.check_activation(activation)
    arguments.check_eps(eps)
    bn = BatchNorm(running_mean, running_var, weight, bias, training, momentum, eps)
    arguments.check_input("input", input, 4)
    arguments.check_batch_norm(input, input.shape[1], bn)
    if training:
        arguments.check_values_per_channel(input.shape)
    if residual is not None:
        if _promotes(input, input.dtype, residual):
            # Eager promotes the sum; the dtypes differ, so the addition stays outside the fused operator.
            output = bn_act(input, *bn[:4], activation="identity", training=training, momentum=momentum, eps=eps)
            return _add_promoting(output, residual, relu, pad_residual)
        arguments.check_residual(residual, input.shape, input, pad_residual)
    if _needs_grad(input, weight, bias, residual):
        tensors = _distinct(input, residual, *bn[:4])
        return BNActFunction.apply(*tensors[:2], relu, *tensors[2:], *bn[4:])
    return ops.bn_act.run(input, bn, residual, relu)[0]


def sync_bn_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str = "relu",
    momentum: float = 0.1,
    eps: float = 1e-5,
    process_group: Any = None,
) -> Tensor:
    """`bn_act` in training, with batch statistics over a process group, as in SyncBatchNorm.

    Equivalent to the following, with `inputs` the concatenation of `input` over all processes, and this process's part
    of its output::

        output = F.batch_norm(inputs, running_mean, running_var, weight, bias, True, momentum, eps)
        output = output if residual is None else output + residual
        output = torch.relu(output) if activation == "relu" else output

    All processes of the group must call it, and then backward, in the same order: forward takes one all-gather of
    2 C + 1 values per process, backward one all-reduce of 2 C (none where the input needs no gradient).  The gradients
    of weight and bias are those of this process's part of the batch, as for all other parameters; DDP averages them.
    Double backward is not supported.

    Args:
        input: (N, C, H, W), floating point; N, H and W may differ between processes, and be 0.
        running_mean, running_var, weight, bias, residual, activation, momentum, eps: as in `bn_act`.
        process_group: a `torch.distributed.ProcessGroup` with a backend for the device of `input`; None for that of
            all processes.

    Returns:
        (N, C, H, W), dtype and layout of `input`.

    Raises:
        TypeError, ValueError: as `bn_act`, but one value per channel is an error only in a group of one process.
        RuntimeError: `torch.distributed` is not initialised.

    Saved for backward: as `bn_act`, and the count.
    Source: the documentation of `torch.nn.SyncBatchNorm`; Chan, Golub & LeVeque 1983 for merging the statistics.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("process_group: expected torch.distributed to be initialised (see init_process_group)")
    group: Any = dist.group.WORLD if process_group is None else process_group
    world_size = dist.get_world_size(group)
    if world_size < 1:
        raise ValueError("process_group: expected a group with this process in it")
    options: dict[str, Any] = {"residual": residual, "activation": activation, "momentum": momentum, "eps": eps}
    if world_size == 1:
        return bn_act(input, running_mean, running_var, weight, bias, training=True, **options)
    relu = arguments.check_activation(activation)
    arguments.check_eps(eps)
    bn = BatchNorm(running_mean, running_var, weight, bias, True, momentum, eps)
    arguments.check_input("input", input, 4)
    arguments.check_batch_norm(input, input.shape[1], bn)
    if residual is not None:
        if _promotes(input, input.dtype, residual):
            options |= {"residual": None, "activation": "identity", "process_group": group}
            return _add_promoting(sync_bn_act(input, *bn[:4], **options), residual, relu, False)
        arguments.check_residual(residual, input.shape, input)
    needs_grad = _needs_grad(input, weight, bias, residual)
    if torch.compiler.is_compiling():
        group = group.group_name
    with torch.no_grad():  # the dependence of the statistics on the input is part of the Function's gradient
        statistics = ops.sync_bn_act.statistics(input.detach(), bn, group)
    if not needs_grad:
        return ops.sync_bn_act.bn_apply(input, *statistics[:2], weight, bias, residual, relu)
    tensors = _distinct(input, weight, bias, residual)
    return SyncBNActFunction.apply(tensors[0], *statistics, *tensors[1:], relu, group)


def conv_bn_act(
    input: Tensor,
    conv_weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    conv_bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "relu",
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    overwrite_residual: bool = False,
    pad_residual: bool = False,
) -> Tensor:
    """2-D convolution, batch normalisation, an optional residual, and the activation.

    Equivalent to::

        z = F.conv2d(input, conv_weight, conv_bias, stride, padding, dilation, groups)
        output = F.batch_norm(z, running_mean, running_var, weight, bias, training, momentum, eps)
        output = output if residual is None else output + residual
        output = torch.relu(output) if activation == "relu" else output

    Under autocast `input`, `conv_weight` and `conv_bias` are cast as `F.conv2d` casts them.

    Args:
        input: (N, C, H, W), floating point.
        conv_weight: (K, C / groups, R, S), dtype of `input`.
        running_mean, running_var: (K,), updated in place when `training`; may be None when `training`.
        weight, bias: (K,) or None: batch norm's affine parameters.  Dtype of `input`, or float32.
        conv_bias: (K,) or None, dtype of `input`.
        residual: (N, K, OH, OW), dtype of `input`, added before the activation; its layout may differ.
        activation: "relu" or "identity".
        stride, padding, dilation: one int, or (vertical, horizontal); padding is with zeros.
        groups: number of blocked connections from input to output channels.
        training, momentum, eps: as in `bn_act`.
        overwrite_residual: allow the output to be written over the residual, which must not be read afterwards.
            Ignored where a gradient is recorded, and for a residual that shares memory with `input`.
        pad_residual: let the residual have fewer channels, (N, K', OH, OW) with K' <= K, as in `bn_act`.

    Returns:
        (N, K, OH, OW), dtype of `input`, channels_last if `input` or `conv_weight` is.

    Raises:
        TypeError: a tensor is not floating point, or a dtype does not fit `input`.
        ValueError: a shape, device or layout does not fit, an option is out of range, the running statistics are
            missing while not training, or there is only one value per channel in training.

    Saved for backward: `input`, `conv_weight`, `conv_bias`, in training z, and what `bn_act` saves beside its input.
    Source: conv2d and BatchNorm2d of the PyTorch documentation; Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3.

    Example:
        >>> input, conv_weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
        >>> output = conv_bn_act(input, conv_weight, torch.zeros(4), torch.ones(4), stride=2, padding=1)
        >>> output.shape, output.min().item() >= 0
        (torch.Size([2, 4, 4, 4]), True)
    """
    relu = arguments.check_activation(activation)
    arguments.check_eps(eps)
    bn = BatchNorm(running_mean, running_var, weight, bias, training, momentum, eps)
    settings = (stride, padding, dilation, groups)
    return packed_conv_bn_act(
        input, conv_weight, conv_bias, settings, bn, residual, relu, overwrite_residual, pad_residual
    )


def packed_conv_bn_act(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    settings: tuple[Any, Any, Any, int],
    bn: BatchNorm,
    residual: Tensor | None = None,
    relu: bool = True,
    overwrite_residual: bool = False,
    pad_residual: bool = False,
) -> Tensor:
    """`conv_bn_act` for callers that have the packs; `settings` are stride, padding, dilation and groups."""
    arguments.check_input("input", input, 4)
    arguments.check_input("conv_weight", conv_weight, 4)
    convolution, shape = arguments.convolution(input.shape, conv_weight.shape, *settings)
    autocast = _autocast_enabled(input)
    # The dtype that autocast gives a convolution's operands: it leaves float64 alone, as for F.conv2d.
    dtype = torch.get_autocast_dtype(input.device.type) if autocast and input.dtype != torch.float64 else input.dtype
    arguments.check_convolution(input, conv_weight, conv_bias, autocast)
    if bn.training:
        arguments.check_values_per_channel(shape)
    if input.dtype != dtype:
        input = input.to(dtype)
    arguments.check_batch_norm(input, shape[1], bn)
    if conv_bias is not None and conv_bias.dtype != dtype:
        conv_bias = conv_bias.to(dtype)
    if residual is not None:
        if _promotes(input, dtype, residual):
            output = packed_conv_bn_act(input, conv_weight, conv_bias, convolution, bn, relu=False)
            return _add_promoting(output, residual, relu, pad_residual)
        arguments.check_residual(residual, shape, input, pad_residual)
        overwrite_residual = overwrite_residual and _can_be_overwritten(residual, shape, input)
    needs_grad = _needs_grad(input, conv_weight, bn.weight, bn.bias, conv_bias, residual)
    if conv_weight.dtype != dtype and (needs_grad or bn.training):
        conv_weight = conv_weight.to(dtype)  # in inference the backend reads the wider weight
    if needs_grad:
        tensors = _distinct(input, conv_weight, conv_bias, residual, *bn[:4])
        return ConvBNActFunction.apply(*tensors[:4], relu, convolution, *tensors[4:], *bn[4:])
    return ops.conv_bn_act.run(input, conv_weight, conv_bias, convolution, bn, residual, relu, overwrite_residual)[0]


def inference(
    input: Tensor,
    calls: Sequence[InferenceCall],
    residual: Tensor | None = None,
    overwrite_residual: bool = False,
    pad_residual: bool = False,
    pooling: Pooling | None = None,
) -> Tensor | None:
    """`conv_bn_act` once, or one behind another, with residual and pooling behind the last.

    None, and nothing has happened, where that is not one call of the backend.  All tensors are plain ones or
    parameters, and nothing but a compiler watches or transforms the call.
    """
    checked = checked_inference(input)
    if checked is None:
        return None
    for _, _, _, bn, _ in calls:
        if bn.training:
            return None
    output: Tensor | None = checked(input, calls, residual, overwrite_residual, pad_residual, pooling=pooling)
    return output


def checked_inference(input: Tensor) -> Any:
    """What computes `inference` for an input; None where nothing does."""
    if torch.is_grad_enabled() or torch._C._is_any_autocast_enabled() or torch.compiler.is_compiling():
        return None
    return dispatch.checked_inference(input)


def _distinct(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """While compiling, replace repeated tensors by views.

    torch.compile (2.11) loses one of the two gradients of a tensor that an autograd.Function takes twice.
    """
    if not torch.compiler.is_compiling():
        return tensors
    found: list[Tensor | None] = []
    for tensor in tensors:
        repeated = tensor is not None and any(tensor is other for other in found)
        found.append(tensor.view_as(tensor) if tensor is not None and repeated else tensor)
    return tuple(found)


def _needs_grad(*tensors: Tensor | None) -> bool:
    if torch._C._are_functorch_transforms_active():
        # Within a transform, tensors do not show that they need a gradient: it would silently be zero.
        raise RuntimeError("resfuse: torch.func transforms are not supported by the fused operators")
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        return True  # an autograd.Function without a jvp raises; the backends would drop the tangents silently
    # An exported graph has no backward and saves nothing for it.  Read the flag itself: torch.compile (2.11) takes
    # `torch.compiler.is_exporting()` for the constant True, and gradients would be lost.
    if not torch.is_grad_enabled() or getattr(torch.compiler, "_is_exporting_flag", False):
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _autocast_enabled(input: Tensor) -> bool:
    if not torch._C._is_any_autocast_enabled():  # fast path
        return False
    device = input.device.type
    return device != "meta" and torch.is_autocast_enabled(device)  # which raises for the meta device


def _promotes(input: Tensor, dtype: torch.dtype, residual: Tensor) -> bool:
    """True if eager would promote the sum of a result in `dtype` and the residual, because autocast mixes dtypes."""
    return isinstance(residual, Tensor) and residual.dtype != dtype and _autocast_enabled(input)


def _add_promoting(output: Tensor, residual: Tensor, relu: bool, pad: bool) -> Tensor:
    missing = output.shape[1] - residual.shape[1] if pad else 0
    output = output + (F.pad(residual, (0, 0, 0, 0, 0, missing)) if missing > 0 else residual)
    return torch.relu(output) if relu else output


def _can_be_overwritten(residual: Tensor, shape: tuple[int, ...], input: Tensor) -> bool:
    """True if the residual has the output's shape and is not the memory that the convolution reads meanwhile."""
    if torch.compiler.is_compiling() or residual.shape != shape:  # a registered operator returns new memory
        return False
    return not share_storage(residual, input)
