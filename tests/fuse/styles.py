"""Ways in which people write a residual block, and ways that a fused forward could get wrong.

Each class is a block of 8 channels.  `STYLES` says how many fused calls it makes; the blocks of `TRAPS` do something
that must not change, whatever of it is fused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional

C = 8


def conv3x3() -> nn.Conv2d:
    return nn.Conv2d(C, C, 3, padding=1, bias=False)


def projection() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C))


class Block(nn.Module):
    """The children of a basic block; subclasses have forwards of their own."""

    def __init__(self, shortcut: nn.Module | None = None, **children: Any) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = conv3x3(), nn.BatchNorm2d(C), conv3x3(), nn.BatchNorm2d(C)
        self.shortcut = shortcut or nn.Sequential()
        for name, child in children.items():
            setattr(self, name, child)


class Functional(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        out = F.relu(out)
        return out


class OneExpression(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.bn2(self.conv2(torch.relu_(self.bn1(self.conv1(x))))))


class Clamped(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)).clamp(min=0)
        return torch.add(self.bn2(self.conv2(out)), x).clamp_min_(0)


class Methods(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)).relu_()
        return self.bn2(self.conv2(out)).add_(x).relu()


class Quantisable(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.skip.add_relu(self.bn2(self.conv2(out)), x)


class BuiltInForward(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = nn.ReLU()(self.bn1(self.conv1(x)))
        return nn.ReLU(inplace=True)(x + self.bn2(self.conv2(out)))


class Attribute(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(out)) + x)


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([conv3x3(), conv3x3()])
        self.norms = nn.ModuleDict({"0": nn.BatchNorm2d(C), "1": nn.BatchNorm2d(C)})

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        for i, conv in enumerate(self.convs):
            x = conv(x)
            x = self.norms[str(i)](x)
            if i == 1:
                x = x + identity
            x = F.relu(x)
        return x


class ByName(Block):
    @property
    def norm(self) -> Any:
        return self.bn1

    def forward(self, x: Tensor) -> Tensor:
        name = "conv1"
        return F.relu(self.norm(getattr(self, name)(x)))


class ConvWithNorm(nn.Conv2d):
    """As in detectron2."""

    def __init__(self, *args: Any, norm: Any = None, activation: Any = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


class Detectron(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = ConvWithNorm(C, C, 1, bias=False, norm=norm(C), activation=F.relu)
        self.conv2 = ConvWithNorm(C, C, 3, padding=1, bias=False, norm=norm(C))
        self.shortcut = ConvWithNorm(C, C, 1, bias=False, norm=norm(C))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.conv1(x))
        shortcut = self.shortcut(x)
        out += shortcut
        out = F.relu_(out)
        return out


class ConvLayer(nn.Module):
    """As in transformers and pytorchcv: the caller adds and activates."""

    def __init__(self, activated: bool = True) -> None:
        super().__init__()
        self.convolution, self.normalization = conv3x3(), nn.BatchNorm2d(C)
        self.activation = nn.ReLU() if activated else nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        hidden_state = self.convolution(input)
        hidden_state = self.normalization(hidden_state)
        hidden_state = self.activation(hidden_state)
        return hidden_state


class AddInTheParent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(ConvLayer(), ConvLayer(False))
        self.shortcut, self.activation = ConvLayer(False), nn.ReLU()

    def forward(self, hidden_state: Tensor) -> Tensor:
        residual = hidden_state
        hidden_state = self.layer(hidden_state)
        residual = self.shortcut(residual)
        hidden_state += residual
        hidden_state = self.activation(hidden_state)
        return hidden_state


class FrozenWithoutEps(nn.Module):
    """As in DETR: batch norm by arithmetic, with an eps that is no attribute."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        w, b, rv, rm = (
            getattr(self, n).reshape(1, -1, 1, 1) for n in ("weight", "bias", "running_var", "running_mean")
        )
        scale = w * (rv + 1e-5).rsqrt()
        return x * scale + (b - rm * scale)


class PreActivation(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return out + x


class Inherited(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class OwnMethods(Block):
    def body(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + x)


class Keyword(Block):
    def forward(self, x: Tensor, scale: float = 1.0, *, bias: float = 0.0) -> Tensor:
        return F.relu(self.bn1(input=self.conv1(input=x))) * scale + bias


class Variadic(Block):
    def forward(self, *inputs: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(inputs[0])) + inputs[-1].abs())


class AddedByKeyword(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.add(input=self.bn1(self.conv1(x)), other=x, alpha=2)
        out = torch.clamp(input=out, min=0, out=None) + torch.add(input=out, other=x)
        return self.skip.add(x=out, y=x)


STYLES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "F.relu and +=": (Functional, 2),
    "projection": (lambda: Functional(projection()), 3),
    "one expression": (OneExpression, 2),
    "clamp, torch.add": (Clamped, 2),
    "methods of tensors": (Methods, 2),
    "FloatFunctional": (lambda: Quantisable(skip=FloatFunctional()), 2),
    "nn.ReLU in forward": (BuiltInForward, 2),
    "activation is a function": (lambda: Attribute(act=F.relu), 2),
    "activation is shared": (lambda: Attribute(act=nn.ReLU(inplace=True)), 2),
    "ModuleList and ModuleDict": (Containers, 2),
    "property and getattr": (ByName, 1),
    "detectron2": (Detectron, 3),
    "detectron2, frozen": (lambda: Detectron(FrozenWithoutEps), 3),
    "add in the parent": (AddInTheParent, 3),
    "pre-activation": (PreActivation, 2),
    "super().forward": (Inherited, 2),
    "own methods": (OwnMethods, 1),
    "keyword arguments": (Keyword, 1),
    "sums by keyword": (lambda: AddedByKeyword(skip=FloatFunctional()), 1),
    "*inputs": (Variadic, 1),
}


class UsedTwice(Block):
    def forward(self, x: Tensor) -> Tensor:
        z = self.conv1(x)
        y = F.relu(self.bn1(z))
        return y + z


class NormUsedTwice(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        return F.relu(y) + y * 2


class SumUsedTwice(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        y = y + x
        return F.relu(y) + self.bn2(y)


class Aliased(Block):
    def forward(self, x: Tensor) -> Tensor:
        a = self.bn1(self.conv1(x))
        b = a
        a = F.relu(a)
        return a + b


class InputWritten(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        z = self.conv1(x)
        x.mul_(3)
        return F.relu(self.bn1(z)) + x


class ResidualWritten(Block):
    def forward(self, x: Tensor) -> Tensor:
        residual = x * 1
        z = self.bn1(self.conv1(x))
        z += residual
        residual.mul_(3)
        return F.relu(z) + residual


class ShortcutWrites(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        out = self.bn1(self.conv1(x))
        out += self.shortcut(x)
        return F.relu(out)


class ShortcutWritesInAnExpression(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        return F.relu(self.bn1(self.conv1(x)) + self.shortcut(x))


class ViewWritten(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        half = x[:, :4]
        z = self.conv1(x)
        other = self.relu(half)
        return F.relu(self.bn1(z)) + torch.cat([other, other], 1)


class WeightsSwapped(Block):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv1.weight.data
        self.conv1.weight.data = weight.sign()
        y = self.conv1(x)
        self.conv1.weight.data = weight
        return F.relu(self.bn1(y))


class Captures(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        self.feature = y
        y += x
        return F.relu(y) + self.feature


class ShortcutKeeps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = x * 2
        return self.kept


class AddsToWhatAChildKeeps(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.shortcut(x)
        y += self.bn1(x)
        return F.relu(y) + self.shortcut.kept


class BranchesOnValues(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        y = F.relu(y) if x.sum() > 0 else y + x
        if x.shape[2] % 2:
            y = y * 2
        return self.bn2(self.conv2(y))


class Unread(Block):
    """The statistics of bn1 are updated all the same."""

    def forward(self, x: Tensor) -> Tensor:
        unread = self.bn1(self.conv1(x))
        if self.training:
            unread = self.conv1(x)
        del unread
        self.bn1(self.conv2(x))
        return F.relu(self.bn2(self.conv2(x)))


class Conditional(Block):
    def forward(self, x: Tensor) -> Tensor:
        a = self.bn1(self.conv1(x))
        b = a if self.training else x
        return F.relu(b)


class Repeated(Block):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = F.relu(self.bn1(self.conv1(x)))
        return x


class Unpacked(Block):
    def forward(self, x: Tensor) -> Tensor:
        a, b = self.bn1(self.conv1(x)).chunk(2, 1)
        return torch.cat([F.relu(a), b], 1)


class Nested(Block):
    def forward(self, x: Tensor) -> Tensor:
        def run(conv: Any) -> Tensor:
            return F.relu(self.bn1(conv(x)))

        return run(self.conv1) + sum(self.bn2(conv(x)) for conv in (self.conv1, self.conv2))


class ReadsItsInputInside(Block):
    def forward(self, x: Tensor) -> Tensor:
        scales = [x.mean() * i for i in range(2)]
        return F.relu(self.bn1(self.conv1(x))) * scales[1] + (lambda: x.abs())()


class Random(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        mask = torch.rand(1).to(x)
        return F.relu(y) * mask + self.bn2(self.conv2(x)) * torch.rand(1).to(x)


class OutputsOfALoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleList([conv3x3(), nn.BatchNorm2d(C), nn.ReLU(), conv3x3(), nn.BatchNorm2d(C)])

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for i, module in enumerate(self.features):
            x = module(x)
            if i == 1:
                outputs.append(x)
                continue
        return x + outputs[0]


class BrokenLoop(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        for i in range(3):
            y = self.bn1(self.conv1(x))
            if i == 1:
                break
        x += 1
        while i < 2:
            i += 1
            x = self.bn2(self.conv2(x))
        return F.relu(y) + F.relu(x)


class Contexts(Block):
    def forward(self, x: Tensor) -> Tensor:
        try:
            y = self.bn1(self.conv1(x))
        finally:
            self.finished = True
        with torch.no_grad():
            z = self.bn2(self.conv2(y))
        return F.relu(z) + y


class Counts(Block):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.bn1(self.conv1(x))
        return F.relu(y) * self.calls


class WritesBeforeTheSum(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        out = self.bn1(self.conv1(x))
        return F.relu(self.shortcut(x) + out)


class WritesBeforeTheSumOfTwo(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + out)


class TwoBranches(Block):
    def __init__(self) -> None:
        super().__init__(conv3=conv3x3(), bn3=nn.BatchNorm2d(C), conv4=conv3x3(), bn4=nn.BatchNorm2d(C))

    def forward(self, x: Tensor) -> Tensor:
        a = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        b = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        return F.relu(a + x + b)


class BranchReadLater(TwoBranches):
    def forward(self, x: Tensor) -> Tensor:
        a = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        b = F.relu(self.bn3(self.conv3(x)))
        return F.relu(a + x) + F.relu(self.bn4(self.conv4(b)))


class SharedNorms(Block):
    """Which update their statistics in the order of the calls, though the first result is read last."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.bn1(self.conv1(x))
        b = self.bn1(self.conv2(x * 3))
        c = F.batch_norm(x - 2, self.bn1.running_mean, self.bn1.running_var, training=self.training)
        return F.relu(c) + F.relu(b) + F.relu(a)


class Broadcasts(Block):
    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True)
        return F.relu(self.bn1(self.conv1(x)) + pooled) + F.relu(self.bn2(self.conv2(x[:1])) + x)


class CallsItself(Block):
    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return y if depth == 0 else self.forward(y, depth - 1) + x


class OwnIteration(nn.Sequential):
    def __iter__(self) -> Any:
        return iter([self[0], self[1], self[2], self[0]])


TRAPS: dict[str, Callable[[], nn.Module]] = {
    "conv output used twice": UsedTwice,
    "norm output used twice": NormUsedTwice,
    "sum used twice": SumUsedTwice,
    "alias": Aliased,
    "shortcut writes to its input": lambda: ShortcutWrites(nn.Sequential(nn.ReLU(inplace=True), *projection())),
    "the same in an expression": lambda: ShortcutWritesInAnExpression(
        nn.Sequential(nn.ReLU(inplace=True), *projection())
    ),
    "shortcut writes before a sum": lambda: WritesBeforeTheSum(nn.Sequential(nn.ReLU(inplace=True), *projection())),
    "shortcut writes before a sum of two": lambda: WritesBeforeTheSumOfTwo(
        nn.Sequential(nn.ReLU(inplace=True), *projection())
    ),
    "two branches and a shortcut": TwoBranches,
    "a branch that is read after the sum": BranchReadLater,
    "input written": InputWritten,
    "residual written": ResidualWritten,
    "view written": lambda: ViewWritten(relu=nn.ReLU(inplace=True)),
    "weights swapped": WeightsSwapped,
    "captured feature": Captures,
    "child keeps its output": lambda: AddsToWhatAChildKeeps(ShortcutKeeps()),
    "control flow on values and shapes": BranchesOnValues,
    "result not read": Unread,
    "conditional": Conditional,
    "shared modules": Repeated,
    "unpacked": Unpacked,
    "nested functions": Nested,
    "input read by nested functions": ReadsItsInputInside,
    "random numbers": Random,
    "outputs of a loop": OutputsOfALoop,
    "contexts": Contexts,
    "a loop that is left": BrokenLoop,
    "attribute assigned": Counts,
    "norms shared by branches": SharedNorms,
    "residual broadcasts": Broadcasts,
    "recursion": CallsItself,
    "own __iter__": lambda: OwnIteration(conv3x3(), nn.BatchNorm2d(C), nn.ReLU()),
}
