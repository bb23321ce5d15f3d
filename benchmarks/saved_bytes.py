"""Bytes that a residual block keeps between forward and backward: fused, and in eager PyTorch with in-place ReLUs.

Counted are the storages of all tensors saved for backward, each once, the block's input among them.  Parameters,
buffers, and weights that autocast has cast, are not counted.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Sequence

import torch
from rich.console import Console
from torch import Tensor, nn

import resfuse
from benchmarks import options, records, report
from benchmarks.options import DTYPES
from benchmarks.providers.base import Setting, in_layout
from benchmarks.records import Record, Subject


@dataclasses.dataclass(frozen=True)
class Block:
    """A residual block of torchvision's ResNets and the size of its input, for images of 224x224."""

    kind: str
    inplanes: int
    planes: int
    extent: int
    stride: int = 1

    @property
    def name(self) -> str:
        projected = " + projection" if self._projected else ""
        return f"{self.kind} {self.inplanes}-{self.planes * self._expansion}{projected}"

    def build(self) -> nn.Module:
        from torchvision.models import resnet

        downsample = None
        channels = self.planes * self._expansion
        if self._projected:
            conv = nn.Conv2d(self.inplanes, channels, 1, self.stride, bias=False)
            downsample = nn.Sequential(conv, nn.BatchNorm2d(channels))
        return getattr(resnet, self.kind)(self.inplanes, self.planes, self.stride, downsample)

    @property
    def _expansion(self) -> int:
        return 4 if self.kind == "Bottleneck" else 1

    @property
    def _projected(self) -> bool:
        return self.stride != 1 or self.inplanes != self.planes * self._expansion


BLOCKS = (
    Block("BasicBlock", 64, 64, 56),
    Block("BasicBlock", 64, 128, 56, stride=2),
    Block("Bottleneck", 64, 64, 56),
    Block("Bottleneck", 256, 64, 56),
    Block("Bottleneck", 256, 128, 56, stride=2),
    Block("Bottleneck", 2048, 512, 7),
)


def saved_bytes(block: nn.Module, input: Tensor, setting: Setting) -> int:
    """What one training forward of a block keeps for backward."""
    parameters = list(block.parameters())
    own = {tensor.untyped_storage().data_ptr() for tensor in (*parameters, *block.buffers())}
    weights = {parameter.shape for parameter in parameters if parameter.dim() > 1}
    storages: dict[int, torch.UntypedStorage] = {}  # kept alive: an address is not used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.shape not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), setting.autocast():
        output = block(input)
    del output
    return sum(storage.nbytes() for storage in storages.values())


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    console = Console(highlight=False)
    conditions = records.current_conditions(args.device, torch.get_num_threads())
    report.show_conditions(console, conditions)
    rows: list[Record] = []
    for dtype in args.dtype:
        found = []
        setting = Setting("train", DTYPES[dtype], args.device, conditions.threads)
        for block in BLOCKS:
            shape = (args.batch, block.inplanes, block.extent, block.extent)
            for provider, count in _compare(block, shape, setting).items():
                subject = Subject(
                    "block", block.name, provider, "train", records.shape_text(shape), dtype, "channels_last"
                )
                found.append(subject.record("saved_bytes", [count], "B", conditions))
        title = f"Saved for backward by a block in training, batch {args.batch}, {dtype}"
        report.show_table(console, report.pair_table(title, found, "MB", 1e-6))
        rows += found
    path = args.output / "saved_bytes.csv"
    records.update(path, rows)
    console.print(f"Wrote {path}", soft_wrap=True)
    return 0


def _compare(block: Block, shape: tuple[int, ...], setting: Setting) -> dict[str, int]:
    eager = in_layout(block.build().to(setting.device), "channels_last").train()
    fused = copy.deepcopy(eager)
    resfuse.fuse_(fused)
    input = torch.randn(shape).to(setting.device, memory_format=torch.channels_last)
    if setting.dtype != torch.float32:
        input = input.to(setting.dtype)  # as the block before leaves it
    input.requires_grad_()
    return {
        "eager_channels_last": saved_bytes(eager, input, setting),
        "resfuse": saved_bytes(fused, input, setting),
    }


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saved_bytes", description=options.summary(__doc__))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=8, help="images (default %(default)s)")
    options.add_common(parser)
    return options.parse(parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
