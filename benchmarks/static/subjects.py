"""What is counted: operators, residual blocks and models, each in eager PyTorch and fused."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resfuse

EAGER, FUSED = "eager_channels_last", "resfuse"
MODES = ("inference", "train", "frozen")


class Op(nn.Module):
    """act(BN(conv(input)) [+ residual]) or a part of it, by resfuse's functions if `fused`, else by PyTorch's."""

    def __init__(self, op: str, channels: int, channels_out: int = 0, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.op, self.fused = op, False
        out = channels_out or channels
        if op == "conv_bn_act":
            self.conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
        if op != "add_relu":
            self.bn = nn.BatchNorm2d(out)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Both (N, C, H, W); batch statistics in training."""
        return self._fused(input, residual) if self.fused else self._eager(input, residual)

    def _fused(self, input: Tensor, residual: Tensor | None) -> Tensor:
        if self.op == "add_relu":
            assert residual is not None
            return resfuse.add_relu(input, residual)
        bn = self.bn
        vectors = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
        if self.op == "bn_act":
            return resfuse.bn_act(input, *vectors, residual=residual, training=self.training)
        geometry: dict[str, Any] = {"stride": self.conv.stride, "padding": self.conv.padding}
        return resfuse.conv_bn_act(
            input, self.conv.weight, *vectors, residual=residual, training=self.training, **geometry
        )

    def _eager(self, input: Tensor, residual: Tensor | None) -> Tensor:
        output = self.conv(input) if self.op == "conv_bn_act" else input
        if self.op != "add_relu":
            bn = self.bn
            vectors = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
            output = F.batch_norm(output, *vectors, training=self.training)
        if residual is not None:
            output = output + residual if output is input else output.add_(residual)
        return F.relu_(output)


@dataclasses.dataclass(frozen=True)
class Subject:
    """Something to count, with the shape of its input."""

    level: str
    name: str
    shape: tuple[int, ...]
    build: Callable[[], nn.Module]
    """The eager module."""
    residual: tuple[int, ...] | None = None
    """The shape of the residual that it takes besides."""

    def calls(self, provider: str, dtype: torch.dtype = torch.float32, modes: Iterable[str] = MODES) -> Iterator[Call]:
        """One per mode, on a module of their own."""
        torch.manual_seed(0)
        eager = self.build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if provider == FUSED:
            _fuse(eager)
        for mode in modes:
            if mode == "frozen" and self.level == "model":
                continue  # as its blocks
            module = copy.deepcopy(eager).train(mode == "train")
            yield Call(self, provider, mode, module, dtype)


class Call:
    """A subject in one mode.  Its phases are run one after the other, each as often as one likes.

    In bfloat16, inference has a module of that dtype; training has autocast, float32 parameters, and for anything but a
    model an input that an earlier layer left in bfloat16.
    """

    def __init__(self, subject: Subject, provider: str, mode: str, module: nn.Module, dtype: torch.dtype) -> None:
        self.subject, self.provider, self.mode, self.module = subject, provider, mode, module
        self._differentiates = mode != "inference"
        self._autocast = self._differentiates and dtype != torch.float32
        if not self._differentiates:
            module.to(dtype)
        narrow = torch.float32 if self._autocast and subject.level == "model" else dtype
        shapes = [subject.shape] + ([subject.residual] if subject.residual else [])
        self.inputs = [_images(shape, narrow) for shape in shapes]
        for tensor in self.inputs:
            tensor.requires_grad_(self._differentiates and subject.level != "model")
        self._output = self._gradient = torch.empty(0)

    def prepare(self) -> None:
        """Run once: packs weights, loads libraries, and makes the gradient of the output."""
        self._forward()
        self._gradient = torch.ones_like(self._output)
        if self._differentiates:
            self._backward()

    def phases(self) -> dict[str, Callable[[], object]]:
        """Forward, and backward of the last forward where there is one."""
        found: dict[str, Callable[[], object]] = {"forward": self._forward}
        return found | ({"backward": self._backward} if self._differentiates else {})

    def parameters(self) -> list[Tensor]:
        """Parameters and buffers."""
        return [*self.module.parameters(), *self.module.buffers()]

    def _forward(self) -> Tensor:
        with torch.set_grad_enabled(self._differentiates), self._context():
            self._output = self.module(*self.inputs)
        return self._output

    def _backward(self) -> object:
        leaves = [tensor for tensor in (*self.inputs, *self.module.parameters()) if tensor.requires_grad]
        return torch.autograd.grad(self._output, leaves, self._gradient)

    def _context(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self._autocast)


def _images(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(shape, generator=generator).to(dtype)
    return images.contiguous(memory_format=torch.channels_last)


def _fuse(module: nn.Module) -> None:
    if isinstance(module, Op):
        module.fused = True
    else:
        resfuse.fuse_(module)


def _block(kind: str, inplanes: int, planes: int, stride: int = 1) -> nn.Module:
    from torchvision.models import resnet

    block = getattr(resnet, kind)
    channels = planes * block.expansion
    downsample = None
    if stride != 1 or inplanes != channels:
        convolution = nn.Conv2d(inplanes, channels, 1, stride, bias=False)
        downsample = nn.Sequential(convolution, nn.BatchNorm2d(channels))
    return block(inplanes, planes, stride, downsample)


def _model(name: str) -> nn.Module:
    from torchvision import models

    return models.get_model(name, weights=None)


def _op(name: str, *args: int, residual: bool = False, channels: int = 16) -> Subject:
    build = functools.partial(Op, name.partition(" ")[0], channels, *args)
    extra = (2, args[0] if args else channels, 8, 8) if residual else None
    return Subject("op", name, (2, channels, 8, 8), build, extra)


def models(batch: int, size: int, names: Iterable[str] = ("resnet18", "resnet50")) -> tuple[Subject, ...]:
    """Of torchvision, for images of that size."""
    return tuple(Subject("model", name, (batch, 3, size, size), functools.partial(_model, name)) for name in names)


OPS = (
    _op("add_relu", residual=True),
    _op("bn_act"),
    _op("bn_act + residual", residual=True),
    _op("conv_bn_act 1x1", 32),
    _op("conv_bn_act 1x1 + residual", 32, residual=True),
    _op("conv_bn_act 3x3", 32, 3),
    _op("conv_bn_act 3x3 / 2", 32, 3, 2),
    _op("conv_bn_act 7x7 / 2", 16, 7, 2, channels=3),
)
BLOCKS = (
    Subject("block", "BasicBlock", (2, 16, 8, 8), functools.partial(_block, "BasicBlock", 16, 16)),
    Subject("block", "BasicBlock + projection", (2, 16, 8, 8), functools.partial(_block, "BasicBlock", 16, 32, 2)),
    Subject("block", "Bottleneck", (2, 32, 8, 8), functools.partial(_block, "Bottleneck", 32, 8)),
    Subject("block", "Bottleneck + projection", (2, 32, 8, 8), functools.partial(_block, "Bottleneck", 32, 16, 2)),
)
"""Small, and as torchvision's ResNets have them: what is launched and saved for these is so for all sizes."""
STAGES = (
    Subject("block", "BasicBlock 64", (128, 64, 56, 56), functools.partial(_block, "BasicBlock", 64, 64)),
    Subject("block", "Bottleneck 256", (128, 256, 56, 56), functools.partial(_block, "Bottleneck", 256, 64)),
    Subject("block", "Bottleneck 256-512", (128, 256, 56, 56), functools.partial(_block, "Bottleneck", 256, 128, 2)),
)
"""At the sizes of ResNet-18 and ResNet-50, for what is not computed but predicted."""
