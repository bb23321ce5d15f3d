"""Modules in a fused call beside the same modules spelled out, for the tests of resfuse.nn."""

from __future__ import annotations

import copy
from typing import Any

import torchvision
from torch import Tensor, nn

import resfuse.nn as rnn
from resfuse.nn.lazy import add_, call, evaluated
from tests import models

OWN_BLOCKS = {
    torchvision.models.resnet.BasicBlock: rnn.BasicBlock,
    torchvision.models.resnet.Bottleneck: rnn.Bottleneck,
}


def own_block(name: str) -> nn.Module:
    """The block of resfuse.nn for a torchvision block of `models.BLOCKS`, with the same state."""
    block = OWN_BLOCKS[models.BLOCKS[name][0]](**models.block_options(name))
    block.load_state_dict(models.block(name).state_dict())
    return block


class Eager(nn.Module):
    """The eager equivalent of a fused module, spelled out."""

    def __init__(self, conv: nn.Module, bn: nn.Module, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.bn, self.act = conv, bn, act

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        output = self.bn(self.conv(input))
        if residual is not None:
            output += residual
        return output if self.act is None else self.act(output)


class Called(Eager):
    """The same modules in a fused call."""

    @evaluated
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Any:
        output = call(self.bn, call(self.conv, input))
        if residual is not None:
            output = add_(output, residual)
        return output if self.act is None else call(self.act, output)


class WithResidual(nn.Module):
    """Gives a module a residual made of its input, so that both take one argument."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input: Tensor) -> Tensor:
        return self.module(input, input.flip(2))


class Alone(WithResidual):
    """The same without a residual."""

    def forward(self, input: Tensor) -> Tensor:
        return self.module(input)


class OnlyNorm(nn.Module):
    """Gives a batch norm the names that it has in `Eager`."""

    def __init__(self, bn: nn.Module) -> None:
        super().__init__()
        self.bn = bn

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.bn(input, residual)


class Everything(nn.Module):
    """Every module of resfuse.nn that has no other class behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = rnn.ConvBNAct2d(3, 16, 7, 2, 3)
        projection = models.projection(16, 32, 2)
        self.blocks = nn.Sequential(rnn.BasicBlock(16, 16), rnn.Bottleneck(16, 8, 2, projection))
        self.preact = nn.Sequential(rnn.PreActBasicBlock(32, 32), rnn.PreActBottleneck(32, 8))
        self.bn, self.add = rnn.BNAct2d(32), rnn.AddReLU()
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.preact(self.blocks(self.stem(input)))
        return self.head(self.add(self.bn(hidden, hidden), hidden))


def pair(conv: nn.Module | None = None, bn: nn.Module | None = None, act: nn.Module | None = None) -> tuple[Any, Any]:
    """(eager, fused) with equal but separate modules."""
    eager = models.seeded(
        lambda: Eager(conv or nn.Conv2d(6, 8, 3, padding=1), bn or nn.BatchNorm2d(8), act or nn.ReLU(inplace=True))
    )
    twin = copy.deepcopy(eager)
    return eager, Called(twin.conv, twin.bn, twin.act)


def assert_module_matches(
    fused: nn.Module, eager: nn.Module, input: Tensor, fused_calls: int = 1, modes: tuple[bool, ...] = (True, False)
) -> None:
    """In float64, through several steps: each mode twice, so that what one call leaves behind enters the next."""
    fused, eager = fused.double(), eager.double()
    for training in modes + modes:
        with models.counted_calls() as calls:
            models.assert_same(fused.train(training), eager.train(training), input)
        assert calls.conv_bn_act + calls.bn_act == fused_calls
