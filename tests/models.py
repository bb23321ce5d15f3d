"""Models for the tests of modules and surgery, built by name from a seed, and how a fused one is held against eager.

Whole networks are compared in float64: the only difference that is left is that of the modules' logic.  In float32,
where the contract applies, single blocks are, on an input that leaves no sign of a ReLU to rounding
(`decided_input`).
"""

from __future__ import annotations

import copy
import io
import itertools
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from resfuse import contract, functional, fuse_, unfuse_
from resfuse.fuse import FuseReport

Evaluate = Callable[[Any, Tensor], Tensor]
"""Runs a model: its differentiable output for an input, as one tensor."""

IMAGE = (4, 3, 32, 32)
TORCHVISION = ("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2")
TIMM = ("resnet18", "resnet50", "resnet50d", "resnext50_32x4d")


def state(model: nn.Module) -> list[Any]:
    """All that `fuse_` could change: classes, instance attributes, and each tensor's identity, layout and values."""
    found: list[Any] = []
    for name, module in model.named_modules():
        found.append((name, id(module), type(module), sorted(module.__dict__), module.training))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        checksum = zlib.crc32(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
        found.append((name, id(tensor), tensor.stride(), tensor.requires_grad, tensor.dtype, checksum))
    return found


def chain_of_blocks() -> nn.Module:
    """Residual blocks of every kind, one after the other."""
    return nn.Sequential(
        BasicBlock(8, 8), BasicBlock(8, 8), Bottleneck(8, 2), Bottleneck(8, 4, downsample=projection(8, 16, 1))
    )


def reloaded(model: nn.Module) -> nn.Module:
    """The model after pickling."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def conv_bn_relu(channels: int = 8) -> nn.Sequential:
    """`fuse_` makes one call of them."""
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch norm random parameters and statistics, negative weights among them.

    A fresh one has weight 1, bias 0, mean 0 and variance 1 (or weight 0, at the end of a block), which hides mistakes.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
            if getattr(module, "running_mean", None) is not None and module.weight is not None:
                module.weight.uniform_(0.3, 1, generator=generator)
                module.weight[::7] *= -1
                module.bias.normal_(0, 0.3, generator=generator)
    return model


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The module that `build` makes from a seed, with random batch norms."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomise(build(), seed)


def model(name: str, num_classes: int = 10) -> nn.Module:
    """A whole model: "torchvision/resnet18", "timm/resnet50d", ..."""
    library, _, architecture = name.partition("/")
    if library == "torchvision":
        return seeded(lambda: torchvision.models.get_model(architecture, weights=None, num_classes=num_classes))
    return seeded(lambda: timm.create_model(architecture, pretrained=False, num_classes=num_classes))


def both(build: Callable[[], nn.Module], **options: Any) -> tuple[nn.Module, nn.Module, FuseReport]:
    """(fused, eager, report) of the same model."""
    eager = seeded(build)
    fused = copy.deepcopy(eager)
    return fused, eager, fuse_(fused, **options)


def calls_by_kind(report: FuseReport) -> dict[str, int]:
    calls: dict[str, int] = {}
    for module in report.fused:
        calls[module.kind] = calls.get(module.kind, 0) + len(module.ops)
    return calls


def small_resnet(block: type[nn.Module] = BasicBlock, layers: tuple[int, ...] = (1, 1, 1, 1)) -> nn.Module:
    """A torchvision ResNet with few blocks, for tests that run it often."""
    return seeded(lambda: torchvision.models.ResNet(block, list(layers), num_classes=10))


def projection(channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """torchvision's downsample."""
    return nn.Sequential(nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


# Constructor arguments of torchvision's blocks, and whether they need a projection.
BLOCKS: dict[str, tuple[type[nn.Module], dict[str, object]]] = {
    "basic": (BasicBlock, {"inplanes": 16, "planes": 16}),
    "basic-stride": (BasicBlock, {"inplanes": 8, "planes": 16, "stride": 2}),
    "bottleneck": (Bottleneck, {"inplanes": 32, "planes": 8}),
    "bottleneck-stride": (Bottleneck, {"inplanes": 16, "planes": 8, "stride": 2}),
    "bottleneck-dilated": (Bottleneck, {"inplanes": 32, "planes": 8, "dilation": 2}),
    "resnext": (Bottleneck, {"inplanes": 32, "planes": 8, "groups": 4, "base_width": 32}),
    "wide": (Bottleneck, {"inplanes": 32, "planes": 8, "base_width": 128}),
    "odd-channels": (Bottleneck, {"inplanes": 20, "planes": 5}),
}


def block_options(name: str) -> dict[str, object]:
    """Constructor arguments of a block in `BLOCKS`, with the projection where the shapes differ."""
    block, options = BLOCKS[name]
    stride, inplanes = int(options.get("stride", 1)), int(options["inplanes"])  # type: ignore[call-overload]
    outplanes = int(options["planes"]) * block.expansion  # type: ignore[call-overload]
    if stride != 1 or inplanes != outplanes:
        return {**options, "downsample": projection(inplanes, outplanes, stride)}
    return dict(options)


def block(name: str) -> nn.Module:
    """A torchvision block of `BLOCKS`."""
    return seeded(lambda: BLOCKS[name][0](**block_options(name)))


def block_input(name: str, batch: int = 2, seed: int = 1) -> Tensor:
    """An input for it, of an odd size."""
    return random_input((batch, int(BLOCKS[name][1]["inplanes"]), 9, 9), seed)  # type: ignore[call-overload]


def random_input(shape: tuple[int, ...], seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normally distributed values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def decided_input(eager: nn.Module, shape: tuple[int, ...], margin: float = 2e-5) -> Tensor:
    """A float32 input for which no ReLU of the model sees a value that rounding could give another sign.

    Where it could, one element's gradient appears or vanishes, and no bound on the gradients would hold.
    """
    smallest: list[float] = []
    truth = copy.deepcopy(eager).double()
    for module in truth.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(lambda _, args: smallest.append(args[0].abs().min().item()))
    for seed in itertools.count(1):
        smallest.clear()
        input = random_input(shape, seed)
        truth(input.double())
        if min(smallest, default=1.0) > margin:
            return input
    raise AssertionError


def call(model: nn.Module, input: Tensor) -> Tensor:
    """Runs a model that takes a tensor and returns one."""
    return model(input)


def results(model: nn.Module, input: Tensor, seed: int = 2, evaluate: Evaluate = call) -> dict[str, Tensor]:
    """Output, gradients and buffers after one forward and backward of the model, whose gradients start at None."""
    model.zero_grad(set_to_none=True)
    input = input.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    output = evaluate(model, input)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
    output.backward(grad.to(output))
    found = {"output": output.detach(), "grad_input": input.grad}
    found |= {f"grad of {name}": parameter.grad for name, parameter in model.named_parameters()}
    found |= {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def assert_same(fused: nn.Module, eager: nn.Module, input: Tensor, evaluate: Evaluate = call) -> None:
    """Hold a fused model against eager in float64, forward and backward, in the mode they are in."""
    assert fused.training == eager.training
    found, expected = (results(model, input.double(), evaluate=evaluate) for model in (fused, eager))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        scale = max(tensor.abs().max().item(), 1e-3)  # what cancels has the rounding errors of what it cancelled from
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=1e-8 * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_contract(fused: nn.Module, eager: nn.Module, input: Tensor) -> None:
    """Hold a fused model against the contract in the input's dtype, forward and backward, in the mode they are in."""
    assert fused.training == eager.training
    truth = results(copy.deepcopy(eager).double(), input.double())
    eagers = [
        results(copy.deepcopy(eager).to(memory_format=memory_format), input.to(memory_format=memory_format))
        for memory_format in (torch.contiguous_format, torch.channels_last)
    ]
    found = results(fused, input)
    assert found.keys() == truth.keys()
    deviations = [
        contract.measure(name, found[name], [one[name] for one in eagers], truth[name], input.dtype)
        for name in truth
        if truth[name].is_floating_point()
    ]
    broken = [str(deviation) for deviation in deviations if deviation.violated]
    assert not broken, "\n".join(broken)
    for name, tensor in truth.items():
        if not tensor.is_floating_point():
            assert torch.equal(found[name], tensor), name


def assert_equal_before_and_after(
    build: Callable[[], nn.Module], shape: tuple[int, ...], evaluate: Evaluate = call
) -> FuseReport:
    """Fuse a model: forward, gradients and statistics in both modes, and state_dicts in both directions, are eager's.

    Every call that the report lists is made, and no other.
    """
    eager = seeded(build)
    fused = seeded(build, seed=3)
    report = fuse_(fused)
    assert list(fused.state_dict()) == list(eager.state_dict())
    fused.load_state_dict(eager.state_dict())
    for training in (True, False):
        with counted_calls() as calls:
            assert_same(
                fused.double().train(training), eager.double().train(training), random_input(shape), evaluate=evaluate
            )
        assert calls.total == report.fused_ops
    restored = seeded(build, seed=4).double()
    restored.load_state_dict(fused.state_dict())
    with torch.no_grad():
        found, expected = (evaluate(model.eval(), random_input(shape).double()) for model in (restored, eager))
    torch.testing.assert_close(found, expected)
    unfuse_(fused)
    assert [type(module) for module in fused.modules()] == [type(module) for module in eager.modules()]
    return report


class Calls:
    """Counts of the operators' calls."""

    def __init__(self) -> None:
        self.conv_bn_act = self.bn_act = self.add_relu = 0

    @property
    def total(self) -> int:
        return self.conv_bn_act + self.bn_act + self.add_relu


@contextmanager
def counted_calls() -> Iterator[Calls]:
    """Count the calls of fused operators, so that a module that fell back does not pass for a fused one.

    Convolutions in inference count each, though one call may compute several.
    """
    calls, inference = Calls(), functional.inference

    def counting_inference(input: Tensor, several: Any, *args: Any) -> Tensor | None:
        output = inference(input, several, *args)
        calls.conv_bn_act += 0 if output is None else len(several)
        return output

    def counting(name: str, kind: str) -> Callable[..., Tensor]:
        function = getattr(functional, name)

        def call(*args: object, **options: object) -> Tensor:
            setattr(calls, kind, getattr(calls, kind) + 1)
            return function(*args, **options)

        return call

    names = {"packed_conv_bn_act": "conv_bn_act", "bn_act": "bn_act", "add_relu": "add_relu"}
    patches = {name: counting(name, kind) for name, kind in names.items()}
    with mock.patch.multiple(functional, inference=counting_inference, **patches):
        yield calls


def compiles(test: Callable[..., None]) -> Callable[..., None]:
    """For tests that call torch.compile, which does things that torch itself warns about."""
    for message in (".*should not be instantiated", "`torch.jit.script_method` is deprecated"):
        test = pytest.mark.filterwarnings(f"ignore:{message}:DeprecationWarning")(test)
    return test
