"""Convolutions of the CPU backend: oneDNN primitives with everything else in their epilogue.

Inference folds batch norm into the weight and bias, and packs the weight for oneDNN, once.  What was packed is kept as
long as nothing that went into it has changed, and that is checked at every call: the weight by identity, version
counter, address and a sample of its values, the per-channel tensors by all of their bytes.  (Version counters alone
are not enough: PyTorch's own batch norm updates running statistics without touching them, and so does `.data`.)

Two properties of oneDNN's primitives shape the code:

* Its ReLU turns NaN into 0.  A NaN or Inf in the input makes every channel of the output pixels it reaches NaN or
  infinite before the ReLU, so a pixel with one positive finite channel has seen none.  Looking for that channel reads
  one or two values per pixel; only if some pixel has none is the whole input looked at, and only if that is not finite
  is the convolution computed again without the ReLU, for the elements that are not finite.  A residual is looked at
  before, while it is copied.
* Adding a residual by a binary post-op takes twice the time of copying the residual into the output and accumulating
  onto it (ResNet-50's stage 1 at batch 16, bfloat16: 6.6 against 2.8 ms).
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resfuse.backends import buffer_pool, cpu_kernels, reference
from resfuse.layout import conv_memory_format, conv_output_shape, place_padded
from resfuse.types import BatchNorm, Convolution, Pair, Problem

Parameters = tuple[Tensor, Any, Any, Tensor | None, Tensor | None, Tensor | None]
"""conv_weight, running_mean, running_var, weight, bias, conv_bias"""

_onednn = torch.ops.mkldnn
if torch.backends.mkldnn.is_available():  # otherwise `unsupported_convolution` says so
    _convolution = _onednn._convolution_pointwise.default
    _convolution_onto = _onednn._convolution_pointwise_.binary

# glibc returns allocations of this size to the system and maps them anew: page faults then cost more than accumulating
# onto a pooled buffer of zeros.
MAPPED_ANEW = 16 << 20
POOLED_GRADIENT = 4 << 20  # bytes


def unsupported_convolution(problem: Problem) -> list[str]:
    """Reasons against running a problem's convolution through oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return ["this build of torch has no oneDNN"]
    if problem.dtype == torch.bfloat16 and not _onednn._is_mkldnn_bf16_supported():
        return ["oneDNN has no bfloat16 convolution for this processor"]
    return []


class _Packed(NamedTuple):
    """A folded, packed weight, what it was made from, and what is known of a call with it."""

    source: weakref.ref[Tensor]
    version: int
    address: int
    snapshot: Tensor
    convolution: Convolution
    eps: float
    input_shape: torch.Size
    output_shape: tuple[int, int, int, int]
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
    conv_bias: Tensor | None,
    convolution: Convolution,
    bn: BatchNorm,
    residual: Tensor | None,
    relu: bool,
    overwrite_residual: bool = False,
) -> Tensor:
    """act(BN(conv(input)) + residual) with running statistics, in one primitive.

    `overwrite_residual` gives up the residual's memory for the output.
    """
    parameters = (conv_weight, *bn[:4], conv_bias)
    entries = _unchanged(input.dtype, parameters, convolution, bn.eps)
    packed = _of_shape(entries, input.shape)
    if packed is None and len(entries) == _SHAPES_PER_WEIGHT:
        shape = conv_output_shape(input.shape, conv_weight.shape, convolution)
        packed = entries[-1]._replace(input_shape=input.shape, output_shape=shape)
    if packed is None:
        packed = _pack(input, parameters, convolution, bn, entries)
    return _infer(packed, input, conv_weight, residual, relu, overwrite_residual)


def _infer(
    packed: _Packed,
    input: Tensor,
    conv_weight: Tensor,
    residual: Tensor | None,
    relu: bool,
    overwrite_residual: bool,
) -> Tensor:
    memory_format = conv_memory_format(conv_weight, input)
    given, input = input, input.contiguous(memory_format=torch.channels_last)
    if overwrite_residual and residual is not None and residual.is_contiguous(memory_format=torch.channels_last):
        accumulator: Tensor | None = residual
        residual_finite = _recent_finite.take(residual) or _all_finite(residual)
    else:
        accumulator, residual_finite = _accumulator(packed.output_shape, input.dtype, residual)
    fused_relu = relu and packed.finite and residual_finite
    output = _run(accumulator, input, packed, fused_relu)
    if fused_relu:
        if packed.convolution.groups == 1 and cpu_kernels.rows_live(output):
            if packed.convolution[::2] == ((1, 1), (1, 1)):  # then every pixel of the input reaches the output
                _recent_finite.add(given)
        elif not _all_finite(input):
            # The residual, finite, changes nothing where the convolution is not; that it is overwritten is no matter.
            z = _run(None, input, packed, False)
            torch.where(z.isfinite(), output, z.relu_(), out=output)
    elif relu:
        output.relu_()
    return output if memory_format is torch.channels_last else output.contiguous()


class _RecentlyFinite(threading.local):
    """The last few tensors, of each thread, that were found to hold neither NaN nor Inf.

    The input of a block's first convolution is the residual of its last: it needs no second look.
    """

    def __init__(self) -> None:
        self._seen: deque[tuple[weakref.ref[Tensor], int]] = deque(maxlen=4)

    def add(self, tensor: Tensor) -> None:
        if not tensor.is_inference():  # those have no version counter
            self._seen.append((weakref.ref(tensor), tensor._version))

    def take(self, tensor: Tensor) -> bool:
        """Whether it is one of them; it is none any more: it is about to be overwritten, which counts no version."""
        found = False
        for _ in range(len(self._seen)):  # each in its turn: `remove` would compare the tensors behind the references
            entry = self._seen.popleft()
            if entry[0]() is tensor:
                found = found or entry[1] == tensor._version
            else:
                self._seen.append(entry)
        return found


_recent_finite = _RecentlyFinite()


def conv_forward(input: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, convolution: Convolution) -> Tensor:
    """z = conv(input) + conv_bias; a large one is accumulated onto zeros from the pool."""
    shape = conv_output_shape(input.shape, conv_weight.shape, convolution)
    size = shape[0] * shape[1] * shape[2] * shape[3] * input.dtype.itemsize
    if (
        size < buffer_pool.SMALLEST
        or conv_memory_format(input, conv_weight) != torch.channels_last
        or reference.unreliable_in_channels_last(input.device, input.shape, conv_weight.shape, convolution.stride)
    ):
        return reference.conv_forward(input, conv_weight, conv_bias, convolution)
    zeros = _channels_last_empty(shape, input.dtype).zero_()
    bias = None if conv_bias is None else conv_bias.to(input.dtype)
    operands = (input.contiguous(memory_format=torch.channels_last), conv_weight.to(input.dtype), bias)
    return _convolution_onto(zeros, *operands, *_onednn_order(convolution), "add", 1.0, None, [], "")


def conv_backward(
    grad_output: Tensor,
    input: Tensor,
    conv_weight: Tensor,
    convolution: Convolution,
    needs_grad: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(grad_input, grad_weight, grad_bias) by PyTorch's own convolutions, a large grad_input in pooled memory.

    For a 1x1 kernel it is the convolution of grad_output with the transposed weight, accumulated onto zeros: a little
    slower than oneDNN's own primitive, but without the page faults of fresh memory, which cost more.  (A 3x3 kernel
    could be turned likewise; in float32 that doubled the rounding error.)
    """
    stride, padding, _, groups = convolution
    if not (
        needs_grad[0]
        and input.nbytes >= POOLED_GRADIENT
        and input.is_contiguous(memory_format=torch.channels_last)
        and conv_weight.shape[2:] == (1, 1)
        and (stride, padding, groups) == ((1, 1), (0, 0), 1)
    ):
        return reference.conv_backward(grad_output, input, conv_weight, convolution, needs_grad)
    grad_weight = grad_bias = None
    if needs_grad[1] or needs_grad[2]:
        others = (False, needs_grad[1], needs_grad[2])
        _, grad_weight, grad_bias = reference.conv_backward(grad_output, input, conv_weight, convolution, others)
    zeros = _channels_last_empty(input.shape, input.dtype).zero_()
    operands = (grad_output.contiguous(memory_format=torch.channels_last), conv_weight.transpose(0, 1), None)
    grad_input = _convolution_onto(zeros, *operands, *_onednn_order(convolution), "add", 1.0, None, [], "")
    return grad_input, grad_weight, grad_bias


def _onednn_order(convolution: Convolution) -> tuple[Pair, Pair, Pair, int]:
    return convolution.padding, convolution.stride, convolution.dilation, convolution.groups


def _accumulator(shape: tuple[int, ...], dtype: torch.dtype, residual: Tensor | None) -> tuple[Tensor | None, bool]:
    """The tensor the primitive adds its result to, if any, and whether all of its values are finite."""
    if residual is None:
        size = shape[0] * shape[1] * shape[2] * shape[3] * dtype.itemsize
        if size < MAPPED_ANEW:
            return None, True
        return _channels_last_empty(shape, dtype).zero_(), True
    output = _channels_last_empty(shape, dtype)
    if residual.shape[1] < shape[1]:
        return place_padded(residual, output), _all_finite(output)
    if residual.stride() == output.stride():
        return output, cpu_kernels.copy_finite(residual, output)
    return output.copy_(residual), _all_finite(output)


def _channels_last_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    _, channels, height, width = shape
    return buffer_pool.empty(shape, (channels * height * width, 1, width * channels, channels), dtype)


def _run(output: Tensor | None, input: Tensor, packed: _Packed, relu: bool) -> Tensor:
    operands = (input, packed.weight, packed.bias, *_onednn_order(packed.convolution))
    if output is None:
        return _convolution(*operands, "relu" if relu else "none", [], "")
    return _convolution_onto(output, *operands, "add", 1.0, "relu" if relu else None, [], "")


def _all_finite(tensor: Tensor) -> bool:
    return cpu_kernels.copy_finite(tensor, None)


def _unchanged(dtype: torch.dtype, parameters: Parameters, convolution: Convolution, eps: float) -> list[_Packed]:
    """The packings of a weight that still hold: all are of the same values, so one look is enough."""
    conv_weight = parameters[0]
    entries = _packed.get((id(conv_weight), dtype))
    if not entries:
        return []
    entry = entries[0]
    holds = (
        entry.source() is conv_weight
        and entry.version == conv_weight._version
        and entry.address == conv_weight.data_ptr()
        and entry.convolution == convolution
        and entry.eps == eps
        and cpu_kernels.snapshot_matches(*parameters, entry.snapshot)
    )
    return entries if holds else []


def _of_shape(entries: list[_Packed], shape: torch.Size) -> _Packed | None:
    for entry in entries:
        if entry.input_shape == shape:
            return entry
    return None


def _pack(
    input: Tensor,
    parameters: Parameters,
    convolution: Convolution,
    bn: BatchNorm,
    entries: list[_Packed],
) -> _Packed:
    """A new packing, kept beside the others of this weight that still hold."""
    conv_weight, _, _, weight, bias, conv_bias = parameters
    # Tensors made under inference_mode have no version counter: there is nothing to hold a packing against.
    version = None if conv_weight.is_inference() else conv_weight._version
    with torch.no_grad():
        snapshot = torch.empty(cpu_kernels.snapshot_size(*parameters), dtype=torch.uint8, device="cpu")
        comparable = cpu_kernels.snapshot(*parameters, snapshot)
        mean, scale = reference.inference_statistics(bn)
        shift = -mean if conv_bias is None else conv_bias.float() - mean
        if weight is not None:
            scale = scale * weight.float()
        shift = shift * scale if bias is None else torch.addcmul(bias.float(), shift, scale)
        folded = (conv_weight.detach().float() * scale.view(-1, 1, 1, 1)).to(input.dtype)
        finite = bool(folded.isfinite().all() and shift.isfinite().all())
        packed = _onednn._reorder_convolution_weight(
            folded.contiguous(), *_onednn_order(convolution), list(input.shape)
        )
    key = (id(conv_weight), input.dtype)
    entry = _Packed(
        source=weakref.ref(conv_weight, lambda _: _packed.pop(key, None)),
        version=version or 0,
        address=conv_weight.data_ptr(),
        snapshot=snapshot,
        convolution=convolution,
        eps=bn.eps,
        input_shape=input.shape,
        output_shape=conv_output_shape(input.shape, conv_weight.shape, convolution),
        weight=packed,
        bias=shift.to(input.dtype),
        finite=finite,
    )
    if comparable and version is not None:
        _packed[key] = [*entries, entry]
    return entry
