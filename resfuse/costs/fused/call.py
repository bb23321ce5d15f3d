"""A call of one of resfuse's operators, checked and hashable."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from resfuse.costs.cost import Kernels, kernel
from resfuse.costs.operation import Operation, TensorInfo

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class FusedCall:
    """conv_bn_act, bn_act, add_relu or sync_bn_act, or one of its halves, bn_statistics and bn_apply."""

    name: str
    input: TensorInfo
    residual: TensorInfo | None
    conv_weight: TensorInfo | None
    vectors: int
    """Bytes of all that is per channel."""
    output: TensorInfo
    relu: bool
    training: bool
    """Whether statistics are the batch's."""
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    conv_bias: bool
    overwrite_residual: bool
    needs_input: bool
    needs_weight: bool
    """Of the convolution."""
    needs_norm: bool
    """Of batch norm's weight and bias: False where they are frozen."""
    needs_residual: bool

    @property
    def dz(self) -> int:
        """Bytes of the convolution's output, and of anything in its shape."""
        return self.output.bytes

    @property
    def needs_conv(self) -> tuple[bool, bool, bool]:
        """Gradients of the convolution that are needed: of its input, weight and bias."""
        return self.needs_input, self.needs_weight, self.conv_bias and self.needs_weight

    @property
    def needs_dz(self) -> bool:
        """Whether batch norm has to give the gradient of its own input."""
        return self.needs_input or self.needs_weight

    @property
    def computes_z_again(self) -> bool:
        """Inference does not keep z, which the gradient of batch norm's weight needs."""
        return self.conv_weight is not None and not self.training and self.needs_norm

    @property
    def placing(self) -> Kernels:
        """What puts a residual of fewer channels into a tensor with all of them: a copy, and zeros."""
        if self.residual is None or self.residual.bytes == self.dz:
            return ()
        return kernel(2 * self.residual.bytes), kernel(self.dz - self.residual.bytes)

    def convolution_alone(self) -> FusedCall:
        """What computes z again."""
        return dataclasses.replace(self, residual=None, relu=False, training=False, vectors=0)

    @property
    def conv(self) -> tuple[Pair, Pair, Pair, int]:
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def masked_residual(self) -> bool:
        """Whether the residual's gradient is a tensor of its own: without a ReLU it is the output's."""
        return self.residual is not None and self.needs_residual and self.relu


def call_of(operation: Operation, training: bool) -> FusedCall:
    """The operation as a call; `training` holds where its options do not say otherwise.

    Raises:
        ValueError: operands that do not belong to the operator.
    """
    name, options = operation.name, operation.options
    activations = operation.inputs
    if name == "bn_apply":  # has mean and invstd among its inputs
        activations = tuple(tensor for tensor in activations if len(tensor.shape) == 4)
    if not 1 <= len(activations) <= 2 or (name == "add_relu" and len(activations) != 2):
        expected = "two" if name == "add_relu" else "the input and at most a residual"
        raise ValueError(f"inputs: expected {expected} for {name} at {operation.path!r}, got {len(activations)}")
    input = activations[0]
    if name != "add_relu" and len(input.shape) != 4:
        raise ValueError(f"inputs: expected (N, C, H, W) first for {name} at {operation.path!r}, got {input.shape}")
    conv = name == "conv_bn_act"
    vectors = operation.parameters[1:] if conv else operation.parameters
    needs = _Needs(operation)
    return FusedCall(
        name=name,
        input=input,
        residual=activations[1] if len(activations) > 1 else None,
        conv_weight=operation.weight() if conv else None,
        vectors=sum(vector.bytes for vector in vectors),
        output=operation.output if conv else input,
        relu=bool(options.get("relu", options.get("activation", "relu") == "relu")),
        training=bool(options.get("training", training)) and name != "add_relu",
        stride=operation.pair("stride", 1),
        padding=operation.pair("padding", 0),
        dilation=operation.pair("dilation", 1),
        groups=int(options.get("groups", 1)),
        conv_bias=needs.of("conv_bias", default=bool(options.get("conv_bias", False))),
        overwrite_residual=bool(options.get("overwrite_residual", False)) and activations[-1] == operation.output,
        needs_input=needs.of("input", default=operation.needs_input_grad),
        needs_weight=conv and needs.of("conv_weight", default=operation.needs_parameter_grad),
        needs_norm=needs.of("weight", "bias", default=operation.needs_parameter_grad),
        needs_residual=len(activations) > 1 and needs.of("residual", default=True),
    )


class _Needs:
    """Which arguments need a gradient, where the operation's option `requires_grad` has their names."""

    def __init__(self, operation: Operation) -> None:
        self.names = operation.options.get("requires_grad")

    def of(self, *names: str, default: bool) -> bool:
        return default if self.names is None else any(name in self.names for name in names)


def without_data(tensor: TensorInfo) -> Tensor:
    """A tensor of this shape and dtype on the meta device, in channels_last memory where it has four dimensions."""
    memory_format = torch.channels_last if len(tensor.shape) == 4 else torch.contiguous_format
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta", memory_format=memory_format)
