"""Argument checks of the public functions: an error names the argument, what came and what was expected."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from resfuse.layout import conv_output_shape
from resfuse.types import BatchNorm, Convolution, Setting

_ACTIVATIONS = ("relu", "identity")


def check_activation(activation: str) -> bool:
    if activation not in _ACTIVATIONS:
        raise ValueError(f'activation: expected "relu" or "identity", got {activation!r}')
    return activation == "relu"


def check_input(name: str, tensor: Tensor, rank: int | None = None) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name}: expected a strided (dense) tensor, got layout {tensor.layout}")
    if rank is not None and tensor.dim() != rank:
        raise ValueError(f"{name}: expected {rank} dimensions, got {tensor.dim()} (shape {tuple(tensor.shape)})")


def check_residual(residual: Tensor, shape: Any, input: Tensor, pad: bool = False) -> None:
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual: expected a Tensor, got {type(residual).__name__}")
    if pad:
        size = tuple(residual.shape)
        if len(size) != 4 or (size[0], *size[2:]) != (shape[0], *shape[2:]) or not 1 <= size[1] <= shape[1]:
            raise ValueError(f"residual: expected shape {tuple(shape)}, or with fewer channels, got {size}")
    elif residual.shape != shape:
        raise ValueError(f"residual: expected shape {tuple(shape)}, got {tuple(residual.shape)}")
    if residual.dtype != input.dtype:
        raise TypeError(f"residual: expected dtype {input.dtype} (that of input), got {residual.dtype}")
    if residual.device != input.device:
        raise ValueError(f"residual: expected device {input.device} (that of input), got {residual.device}")
    if residual.layout != torch.strided:
        raise ValueError(f"residual: expected a strided (dense) tensor, got layout {residual.layout}")


def check_batch_norm(input: Tensor, channels: int, bn: BatchNorm) -> None:
    if bn.running_mean is None or bn.running_var is None:
        if bn.running_mean is not bn.running_var:
            missing = "running_mean" if bn.running_mean is None else "running_var"
            raise ValueError(f"{missing}: expected a tensor, because the other running statistic is one, got None")
        if not bn.training:
            raise ValueError("running_mean: expected a tensor, because training is False, got None")
    dtype, device, shape = input.dtype, input.device, (channels,)
    narrow = torch.float32 if dtype != torch.float64 else dtype
    for vector in bn[:4]:
        if vector is not None and (
            vector.shape != shape or (vector.dtype != dtype and vector.dtype != narrow) or vector.device != device
        ):
            break
    else:
        return
    for name, vector in zip(BatchNorm._fields[:4], bn[:4], strict=True):
        if vector is None:
            continue
        if vector.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(vector.shape)}")
        if vector.dtype != narrow and vector.dtype != dtype:
            either = f"{dtype} (that of input)" + (f" or {narrow}" if narrow != dtype else "")
            raise TypeError(f"{name}: expected dtype {either}, got {vector.dtype}")
        if vector.device != device:
            raise ValueError(f"{name}: expected device {device} (that of input), got {vector.device}")


def check_eps(eps: float) -> None:
    if not eps > 0:
        raise ValueError(f"eps: expected a positive number, got {eps}")


def check_values_per_channel(shape: Any) -> None:
    if shape[0] * shape[2] * shape[3] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(shape)}")


def check_convolution(input: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, autocast: bool) -> None:
    if conv_weight.dtype != input.dtype and not autocast:
        raise TypeError(f"conv_weight: expected dtype {input.dtype} (that of input), got {conv_weight.dtype}")
    if conv_weight.device != input.device:
        raise ValueError(f"conv_weight: expected device {input.device} (that of input), got {conv_weight.device}")
    if conv_bias is None:
        return
    channels = conv_weight.shape[0]
    if conv_bias.dim() != 1 or conv_bias.numel() != channels:
        raise ValueError(f"conv_bias: expected shape ({channels},), got {tuple(conv_bias.shape)}")
    if conv_bias.dtype != input.dtype and not autocast:
        raise TypeError(f"conv_bias: expected dtype {input.dtype} (that of input), got {conv_bias.dtype}")
    if conv_bias.device != input.device:
        raise ValueError(f"conv_bias: expected device {input.device} (that of input), got {conv_bias.device}")


def convolution(
    input_shape: torch.Size, weight_shape: torch.Size, stride: Setting, padding: Setting, dilation: Setting, groups: int
) -> tuple[Convolution, tuple[int, int, int, int]]:
    """The settings of a convolution and the shape of its output, where settings and shapes fit each other."""
    if torch.compiler.is_compiling() or list in (type(stride), type(padding), type(dilation)):  # lists have no hash
        return _convolution(input_shape, weight_shape, stride, padding, dilation, groups)
    return _cached_convolution(input_shape, weight_shape, stride, padding, dilation, groups)  # type: ignore[arg-type]


def _convolution(
    input_shape: torch.Size, weight_shape: torch.Size, stride: Setting, padding: Setting, dilation: Setting, groups: int
) -> tuple[Convolution, tuple[int, int, int, int]]:
    if groups < 1 or weight_shape[0] % groups:
        raise ValueError(f"groups: expected a divisor of the {weight_shape[0]} output channels, got {groups}")
    settings = Convolution.of(stride, padding, dilation, groups)
    if input_shape[1] != weight_shape[1] * groups:
        raise ValueError(
            f"input: expected {weight_shape[1] * groups} channels (conv_weight {tuple(weight_shape)}, "
            f"groups {groups}), got {input_shape[1]}"
        )
    shape = conv_output_shape(input_shape, weight_shape, settings)
    if shape[2] < 1 or shape[3] < 1:
        raise ValueError(
            f"input: expected at least the size of the (padded, dilated) kernel {tuple(weight_shape[2:])}, "
            f"got {tuple(input_shape[2:])}, which leaves an output of {shape[2:]}"
        )
    return settings, shape


_cached_convolution = functools.lru_cache(maxsize=4096)(_convolution)
