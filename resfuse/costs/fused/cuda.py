"""The backend `cuda`: the kernels of csrc/cuda, and cuDNN's gradients of convolutions.

Tiles and splits come from the functions that choose them (`cuda_conv.planned`).  How many blocks are resident, which a
library asks the driver, follows here from what the kernels promise the compiler (`__launch_bounds__`).
"""

from __future__ import annotations

import torch

from resfuse.backends import cuda_conv
from resfuse.backends.integers import cdiv
from resfuse.costs import convolution
from resfuse.costs.cost import Cost, Kernels, kernel
from resfuse.costs.device import Device
from resfuse.costs.fused.call import FusedCall
from resfuse.costs.fused.gpu import gpu
from resfuse.costs.operation import TensorInfo

RESIDENT_BLOCKS = {(128, 128): 2, (128, 64): 3, (64, 64): 4, (32, 64): 4}
"""Blocks per multiprocessor of each tile: kBlocksPerProcessor in csrc/cuda/conv_launch.cuh."""
RESIDENT_BLOCKS_WITHOUT_TENSOR_CORES = {(128, 128): 1, (128, 64): 2, (64, 64): 4, (32, 64): 4}

_RESERVED_SHARED_MEMORY = 1024 + 8192  # by CUDA, and for vectors and merging in a block that keeps what it read


def forward(call: FusedCall, device: Device) -> Kernels:
    device = gpu(device)
    if call.name == "add_relu":
        return (kernel(3 * call.dz),)
    if call.conv_weight is None:
        return (*call.placing, _bn_forward(call, device))
    return (*call.placing, *_conv_forward(call, call.conv_weight, device))


def backward(call: FusedCall, device: Device) -> Kernels:
    """Batch norm's one launch and cuDNN's gradients, as the Functions of resfuse.ops call them."""
    device = gpu(device)
    if call.name == "add_relu":
        return (kernel(3 * call.dz),)
    found = [_bn_backward(call, device)]
    if call.conv_weight is not None:
        operands = call.input, call.conv_weight, call.output
        if call.computes_z_again:
            found[:0] = _conv_forward(call.convolution_alone(), call.conv_weight, device)
        needs_input, needs_weight, needs_bias = call.needs_conv
        found += convolution.backward(
            *operands, needs_input=needs_input, needs_weight=needs_weight, needs_bias=needs_bias
        )
    return tuple(found)


def kept_on_chip(call: FusedCall, device: Device, tensors: int) -> float:
    """What share of so many activations the blocks of a reduction, one per multiprocessor, keep in shared memory."""
    room = device.num_sms * max(0, device.shared_memory - _RESERVED_SHARED_MEMORY)
    return min(1.0, room / (tensors * call.dz)) if call.dz else 1.0


def _bn_forward(call: FusedCall, device: Device) -> Cost:
    residual = call.dz if call.residual is not None else 0
    again = 0
    if call.training:
        again = round((1 - kept_on_chip(call, device, 1)) * call.dz)
    return kernel(call.dz, again, residual, call.dz, call.vectors)


def _bn_backward(call: FusedCall, device: Device) -> Cost:
    operands = (2 + call.relu) * call.dz  # dy, x and y
    masked = call.dz if call.masked_residual else 0
    dx = call.dz if call.needs_dz else 0
    again = 0
    if call.training and call.needs_dz:
        read = 2 if masked or not call.relu else 3  # g or dy, and x; or dy, y and x
        again = round((1 - kept_on_chip(call, device, 2)) * read * call.dz)
    return kernel(operands, masked, again, dx, call.vectors)


def _conv_forward(call: FusedCall, weight: TensorInfo, device: Device) -> Kernels:
    """One launch, or two, behind the casts and paddings that the kernels need."""
    plan = cuda_conv.planned(
        torch.Size(call.input.shape), torch.Size(weight.shape), *call.conv, call.training, call.input.dtype,
        device.num_sms,
    )  # fmt: skip
    flops = convolution.convolution_flops(call.output, weight)  # without the zeros of padded channels
    before, x, weight = _operands(call.input, weight, plan.channels)
    residual = call.dz if call.residual is not None else 0
    reads, writes = x.bytes + weight.bytes, residual + call.dz + call.vectors
    tile, resident = _tile(call, x, plan, device)
    tiles_m, tiles_n = _tiles(call, tile)
    if not call.training:
        splits = plan.config.splits
        if splits == 1:
            return (*before, kernel(reads, writes, flops=flops))
        partial = 4 * splits * tiles_m * tiles_n * tile[0] * tile[1]  # sums of whole tiles, written and read
        if tiles_m * tiles_n * splits > resident:
            return (*before, kernel(reads, partial, flops=flops), kernel(partial, writes))
        return (*before, kernel(reads, 2 * partial, writes, flops=flops))
    tiles_per_part = cdiv(tiles_m, max(1, resident // tiles_n))
    parts = cdiv(tiles_m, tiles_per_part)
    if parts * tiles_n > resident:
        return (*before, kernel(reads, call.dz, flops=flops), kernel(call.dz, writes))
    again = call.dz * (tiles_m - parts) // tiles_m  # the last tile of each block is still in registers
    return (*before, kernel(reads, call.dz, again, writes, flops=flops))


def _operands(x: TensorInfo, weight: TensorInfo, channels: int) -> tuple[Kernels, TensorInfo, TensorInfo]:
    """What is launched before the convolution, and what it reads: see `cuda_conv._operands`."""
    if channels == x.shape[1]:
        read = TensorInfo(weight.shape, x.dtype)
        return ((kernel(weight.bytes, read.bytes),) if weight.dtype != x.dtype else ()), x, read
    before: list[Cost] = []
    wide_x, wide_weight = (TensorInfo((t.shape[0], channels, *t.shape[2:]), x.dtype) for t in (x, weight))
    for given, wide in ((x, wide_x), (weight, wide_weight)):
        before += [kernel(wide.bytes), kernel(given.bytes, given.numel * x.dtype.itemsize)]  # zeros, then the copy
    return tuple(before), wide_x, wide_weight


def _tile(call: FusedCall, x: TensorInfo, plan: cuda_conv.Plan, device: Device) -> tuple[tuple[int, int], int]:
    """The tile, and how many blocks of it the device holds: where memory allows no 16-byte copies, it decides."""
    assert call.conv_weight is not None
    row = x.shape[1] // call.groups * x.dtype.itemsize
    packs_rows = call.groups == 1 and x.shape[1] < 16 and call.conv_weight.shape[3] > 1 and call.dilation[1] == 1
    if row % 16 == 0 and not packs_rows:
        tile = (plan.config.block_m, plan.config.block_n)
    else:
        tile = (128, 64) if row % 8 == 0 else (64, 64)
    tensor_cores = x.dtype != torch.float32 or torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    blocks = RESIDENT_BLOCKS if tensor_cores else RESIDENT_BLOCKS_WITHOUT_TENSOR_CORES
    return tile, blocks[tile] * device.num_sms


def _tiles(call: FusedCall, tile: tuple[int, int]) -> tuple[int, int]:
    n, filters, height, width = call.output.shape
    return cdiv(n * height * width, tile[0]), call.groups * cdiv(filters // call.groups, tile[1])
