"""Convolutions of the CPU backend: oneDNN primitives with everything else in their epilogue.

Inference folds batch norm into the weight and bias, and packs the weight for oneDNN, once.  What was packed is kept as
long as nothing that went into it has changed, and that is checked at every call: the weight by identity, version
counter, address and a sample of its values, the per-channel tensors by all of their bytes.  (Version counters alone
are not enough: PyTorch's own batch norm updates running statistics without touching them, and so does `.data`.)

Two properties of oneDNN's primitives shape the code:

* Its ReLU turns NaN into 0.  A NaN or Inf in the input makes every channel of the output pixels it reaches NaN or
  infinite before the ReLU, so a pixel with one positive finite channel has seen none.  Looking for that channel reads
  one or two values per pixel; only if some pixel has none is the whole input looked at, and only if that is not finite
  is the convolution computed again without the fused ReLU.  A residual is looked at while it is copied.
* Adding a residual by a binary post-op takes twice the time of copying the residual into the output and accumulating
  onto it (ResNet-50's stage 1 at batch 16, bfloat16: 6.6 against 2.8 ms).
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from resfuse.backends import buffer_pool, reference
from resfuse.backends.registry import Problem
from resfuse.layout import conv_memory_format, conv_output_shape

Pair = tuple[int, int]
_kernels = torch.ops.resfuse_cpu
_onednn = torch.ops.mkldnn

# glibc returns allocations of this size to the system and maps them anew: page faults then cost more than accumulating
# onto a pooled buffer of zeros.
_MAPPED_ANEW = 16 << 20


def unsupported_convolution(problem: Problem) -> list[str]:
    """Reasons against running a problem's convolution through oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return ["this build of torch has no oneDNN"]
    if problem.dtype == torch.bfloat16 and not _onednn._is_mkldnn_bf16_supported():
        return ["oneDNN has no bfloat16 convolution for this processor"]
    return []


class _Packed(NamedTuple):
    """A folded, packed weight, and what it was made from."""

    source: weakref.ref[Tensor]
    version: int
    address: int
    snapshot: Tensor
    conv: tuple[Pair, Pair, Pair, int]
    eps: float
    input_shape: torch.Size
    weight: Tensor
    bias: Tensor
    finite: bool


# oneDNN chooses a weight's layout by the shape of the input; another layout is right too, but reordered at every call.
# So a weight is packed for the first few shapes that come, and for later ones the last packing serves.
_SHAPES_PER_WEIGHT = 4
_packed: dict[tuple[int, torch.dtype], list[_Packed]] = {}


def conv_bn_act_inference(
    input: Tensor,
    conv_weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    eps: float,
    overwrite_residual: bool = False,
) -> Tensor:
    """act(BN(conv(input)) + residual) with running statistics, in one primitive.

    `overwrite_residual` gives up the residual's memory for the output.
    """
    packed = _pack(input, conv_weight, running_mean, running_var, weight, bias, conv_bias, stride, padding, dilation,
                   groups, eps)  # fmt: skip
    conv = (padding, stride, dilation, groups)
    memory_format = conv_memory_format(input, conv_weight)
    input = input.contiguous(memory_format=torch.channels_last)
    shape = conv_output_shape(input.shape, conv_weight.shape, stride, padding, dilation)
    if overwrite_residual and residual is not None and residual.is_contiguous(memory_format=torch.channels_last):
        # Once overwritten the residual is gone, so everything is looked at beforehand.
        finite = packed.finite and _all_finite(residual) and _all_finite(input)
        output = _run(residual, input, packed, conv, relu and finite)
    else:
        accumulator, residual_finite = _accumulator(shape, input.dtype, residual)
        finite = packed.finite and residual_finite
        output = _run(accumulator, input, packed, conv, relu and finite)
        if relu and finite and not _seen_finite(output, input, groups):
            finite = False
            output = _run(_accumulator(shape, input.dtype, residual)[0], input, packed, conv, False)
    if relu and not finite:
        output.relu_()
    return output.contiguous(memory_format=memory_format)


def conv_forward(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """z = conv(input) + conv_bias; a large one is accumulated onto zeros from the pool."""
    shape = conv_output_shape(input.shape, conv_weight.shape, stride, padding, dilation)
    size = shape[0] * shape[1] * shape[2] * shape[3] * input.dtype.itemsize
    if (
        size < buffer_pool.SMALLEST
        or conv_memory_format(input, conv_weight) != torch.channels_last
        or reference.unreliable_in_channels_last(input.device, input.shape, conv_weight.shape, stride)
    ):
        return reference.conv_forward(input, conv_weight, conv_bias, stride, padding, dilation, groups)
    zeros = _channels_last_empty(shape, input.dtype).zero_()
    bias = None if conv_bias is None else conv_bias.to(input.dtype)
    operands = (input.contiguous(memory_format=torch.channels_last), conv_weight.to(input.dtype), bias)
    conv = (padding, stride, dilation, groups)
    return _onednn._convolution_pointwise_.binary(zeros, *operands, *conv, "add", 1.0, None, [], "")


def _accumulator(shape: tuple[int, ...], dtype: torch.dtype, residual: Tensor | None) -> tuple[Tensor | None, bool]:
    """The tensor the primitive adds its result to, if any, and whether all of its values are finite."""
    if residual is None:
        size = shape[0] * shape[1] * shape[2] * shape[3] * dtype.itemsize
        if size < _MAPPED_ANEW:
            return None, True
        return _channels_last_empty(shape, dtype).zero_(), True
    output = _channels_last_empty(shape, dtype)
    if residual.stride() == output.stride():
        return output, _kernels.copy_finite.default(residual, output)
    return output.copy_(residual), _all_finite(output)


def _channels_last_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    _, channels, height, width = shape
    return buffer_pool.empty(shape, (channels * height * width, 1, width * channels, channels), dtype)


def _run(
    output: Tensor | None, input: Tensor, packed: _Packed, conv: tuple[Pair, Pair, Pair, int], relu: bool
) -> Tensor:
    operands = (input, packed.weight, packed.bias, *conv)
    if output is None:
        return _onednn._convolution_pointwise.default(*operands, "relu" if relu else "none", [], "")
    return _onednn._convolution_pointwise_.binary(output, *operands, "add", 1.0, "relu" if relu else None, [], "")


def _seen_finite(output: Tensor, input: Tensor, groups: int) -> bool:
    """Whether no NaN can have reached the fused ReLU (see the module's docstring)."""
    return (groups == 1 and _kernels.rows_live.default(output)) or _all_finite(input)


def _all_finite(tensor: Tensor) -> bool:
    return _kernels.copy_finite.default(tensor, None)


def _pack(
    input: Tensor,
    conv_weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    eps: float,
) -> _Packed:
    key = (id(conv_weight), input.dtype)
    conv = (padding, stride, dilation, groups)
    # Tensors made under inference_mode have no version counter: there is nothing to hold a packing against.
    version = -1 if conv_weight.is_inference() else conv_weight._version
    parameters = (conv_weight, running_mean, running_var, weight, bias, conv_bias)
    entries = _packed.get(key, [])
    if entries:
        entry = entries[-1]
        if (
            entry.source() is not conv_weight
            or entry.version != version
            or entry.address != conv_weight.data_ptr()
            or entry.conv != conv
            or entry.eps != eps
            or not _kernels.snapshot_matches.default(*parameters, entry.snapshot)
        ):
            entries = []  # all entries of a weight are of the same values
        else:
            for entry in entries:
                if entry.input_shape == input.shape:
                    return entry
            if len(entries) == _SHAPES_PER_WEIGHT:
                return entries[-1]
    with torch.no_grad():
        snapshot = torch.empty(_kernels.snapshot_size.default(*parameters), dtype=torch.uint8)
        _kernels.snapshot.default(*parameters, snapshot)
        mean, scale = reference.inference_statistics(running_mean, running_var, eps)
        shift = -mean if conv_bias is None else conv_bias.float() - mean
        if weight is not None:
            scale = scale * weight.float()
        shift = shift * scale if bias is None else torch.addcmul(bias.float(), shift, scale)
        folded = (conv_weight.detach().float() * scale.view(-1, 1, 1, 1)).to(input.dtype)
        finite = bool(folded.isfinite().all() and shift.isfinite().all())
        packed = _onednn._reorder_convolution_weight(
            folded.contiguous(), *conv, [input.shape[0], conv_weight.shape[1] * groups, *input.shape[2:]]
        )
    source = weakref.ref(conv_weight, lambda _: _packed.pop(key, None))
    address, folded_bias = conv_weight.data_ptr(), shift.to(input.dtype)
    entry = _Packed(source, version, address, snapshot, conv, eps, input.shape, packed, folded_bias, finite)
    if version >= 0:
        _packed[key] = [*entries, entry]
    return entry
