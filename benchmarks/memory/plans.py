"""What a training step would keep if it kept less: the plans of the design, counted from the shapes alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.memory.networks import Network

BITS = 8
"""Of a byte: a mask of one bit per element."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """A tensor that the fused training step keeps for backward, per image."""

    role: str
    """ "input": what the first convolution reads.  "z": a convolution's output, raw.  "y": after batch norm and ReLU,
    read by the next convolution of its block, or by the pooling after the stem.  "pool": the pooling's output, read by
    the first block.  "block": a block's output; "projected": that of a block whose shortcut is a convolution.
    "positions": of the maxima.  "head": what comes after the blocks."""
    stage: int
    """How many times the number of pixels has changed before."""
    elements: int
    itemsize: int

    @property
    def bytes(self) -> int:
        return self.elements * self.itemsize


def kept_tensors(network: Network, dtype: torch.dtype) -> tuple[Kept, ...]:
    """What the fused step keeps of one image, in the order of the forward; statistics and weights are not among it.

    Nothing is computed: the network runs on the meta device.

    Args:
        network: a model or block of `networks`.
        dtype: of the activations; float32 or, under autocast, another.
    """
    with torch.device("meta"):
        module, image = network.make().eval(), torch.empty(network.shape(1))
    found: list[Kept] = []
    extents: list[int] = []

    def keep(role: str, tensor: Tensor, itemsize: int = dtype.itemsize) -> None:
        if tensor.dim() == 4 and (not extents or extents[-1] != tensor.shape[-1]):
            extents.append(tensor.shape[-1])
        found.append(Kept(role, len(extents), tensor.numel(), itemsize))

    def after_conv(path: str, output: Tensor) -> None:
        keep("z", output)
        parent, _, name = path.rpartition(".")
        block = module.get_submodule(parent)
        convolutions = [child for child, layer in block.named_children() if isinstance(layer, nn.Conv2d)]
        ends_block = hasattr(block, "downsample") and name == convolutions[-1]
        # A block's end has a ReLU after the addition, and a shortcut's projection has none.
        if not ends_block and "downsample" not in path.split("."):
            keep("y", output)

    handles = []
    for path, child in module.named_modules():
        if isinstance(child, nn.Conv2d):
            handles.append(child.register_forward_hook(lambda _, args, output, path=path: after_conv(path, output)))
        elif isinstance(child, nn.MaxPool2d):
            handles.append(child.register_forward_hook(lambda _, args, output: keep("pool", output)))
            handles.append(child.register_forward_hook(lambda _, args, output: keep("positions", output, 8)))
        elif hasattr(child, "downsample"):
            role = "projected" if isinstance(child.downsample, nn.Sequential) else "block"
            handles.append(child.register_forward_hook(lambda _, args, output, role=role: keep(role, output)))
        elif isinstance(child, nn.Linear):
            handles.append(child.register_forward_hook(lambda _, args, output: _keep_head(keep, args, output)))
    keep("input", image)
    try:
        module(image)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(found)


def _keep_head(keep: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
    keep("head", args[0])  # for the linear layer's weight
    keep("head", output, 4)  # log-softmax, in float32
    keep("head", output.new_empty(1), 8)  # the label


def now(kept: tuple[Kept, ...]) -> int:
    """Bytes per image that the fused step keeps at present: everything."""
    return sum(tensor.bytes for tensor in kept)


def byte_positions(kept: tuple[Kept, ...]) -> int:
    """The same, but positions of maxima in one byte (an offset in the window) and not in an int64."""
    return sum(tensor.elements if tensor.role == "positions" else tensor.bytes for tensor in kept)


def prologues(kept: tuple[Kept, ...]) -> int:
    """Besides, no "y": the next convolution computes it from z where it reads it, in forward and in backward.

    z then also gives the mask of the ReLU.
    """
    return byte_positions(tuple(tensor for tensor in kept if tensor.role != "y"))


def raw_outputs(kept: tuple[Kept, ...]) -> int:
    """Besides, of a block's output only one bit per element, the ReLU's mask, where backward can compute it again.

    That it can, by element-wise passes without a convolution, from the raw outputs of its last convolution and of its
    projection; or from the former and the output of the block before, of the same shape.  It does so a stage at a time;
    then the outputs of that stage exist, too: see `recomputed`.
    """
    total = 0
    for index, tensor in enumerate(kept):
        if _is_recomputed(kept, index):
            total += -(-tensor.elements // BITS)
        elif tensor.role == "positions":
            total += tensor.elements
        elif tensor.role != "y":
            total += tensor.bytes
    return total


def recomputed(kept: tuple[Kept, ...]) -> int:
    """The most bytes per image that `raw_outputs` computes again for one stage."""
    stages: dict[int, int] = {}
    for index, tensor in enumerate(kept):
        if _is_recomputed(kept, index):
            stages[tensor.stage] = stages.get(tensor.stage, 0) + tensor.bytes
    return max(stages.values(), default=0)


def _is_recomputed(kept: tuple[Kept, ...], index: int) -> bool:
    tensor = kept[index]
    if tensor.role != "block":
        return tensor.role == "projected"
    before = [other for other in kept[:index] if other.role in ("input", "pool", "block", "projected")][-1]
    return (before.elements, before.stage) == (tensor.elements, tensor.stage)


PLANS = {"now": now, "positions": byte_positions, "prologues": prologues, "raw outputs": raw_outputs}
