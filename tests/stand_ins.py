"""What stands in the tests of providers for cuDNN, with modules that need all of what it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from resfuse.calibration import calibrate_
from torch import Tensor, nn

from benchmarks.cases import networks
from benchmarks.cases.modules import ConvBNAddReLU, PreActBlock
from benchmarks.providers import Setting
from benchmarks.providers.cudnn_plans import Execute, describe
from benchmarks.providers.groups import Group

SETTING = Setting("inference", torch.float64, torch.device("cpu"), 1, level="block")


def calibrated(module: nn.Module, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    """The module with batch norms as in a trained network, in eval mode, and inputs for it."""
    torch.manual_seed(0)
    inputs = [torch.randn(shape) for shape in shapes]
    calibrate_(module, *inputs)
    return module.eval().to(dtype), *(tensor.to(dtype) for tensor in inputs)


def modules() -> dict[str, tuple[nn.Module, tuple[tuple[int, ...], ...]]]:
    """What has to be rewritten correctly, and the shapes of its inputs."""
    bare = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 2, 2, 2), nn.BatchNorm2d(8, eps=0.1, affine=False), nn.ReLU())
    end = ConvBNAddReLU(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8, eps=0.05))
    return {
        "conv bias, groups, dilation, stride, eps, no affine": (bare, ((2, 6, 9, 11),)),
        "a residual before the ReLU": (end, ((2, 4, 5, 6), (2, 8, 5, 6))),
        "a projection": (networks.build_block("resnet18", "layer2.0"), ((1, 64, 6, 6),)),
        "groups, stride": (networks.build_block("resnext50_32x4d", "layer2.0"), ((1, 256, 6, 6),)),
        "pre-activation": (PreActBlock(8, 16, 2, mid=4), ((2, 8, 6, 6),)),
        "a shortcut without parameters": (networks.build("cifar_resnet20"), ((1, 3, 32, 32),)),
    }


class Operators:
    """In the place of ATen's two: the documented formula, and the arguments by the names of the operators' schemas."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def conv_relu(self, *args: Any) -> Tensor:
        return self._compute("cudnn_convolution_relu", args)

    def conv_add_relu(self, *args: Any) -> Tensor:
        return self._compute("cudnn_convolution_add_relu", args)

    def _compute(self, name: str, args: tuple[Any, ...]) -> Tensor:
        names = [argument.name for argument in getattr(torch.ops.aten, name).default._schema.arguments]
        given = dict(zip(names, args, strict=True))
        self.calls.append((name, given))
        output = F.conv2d(
            given["self"], given["weight"], given["bias"],
            given["stride"], given["padding"], given["dilation"], given["groups"],
        )  # fmt: skip
        return F.relu(output + given["alpha"] * given["z"] if "z" in given else output)


class Described:
    """A tensor of a graph: what computes it from the tensors that have names."""

    def __init__(self, compute: Callable[[Mapping[str, Tensor]], Tensor]) -> None:
        self.compute = compute

    def set_output(self, value: bool) -> Described:
        assert value
        return self

    def set_data_type(self, data_type: str) -> Described:
        return self


class EagerGraph:
    """In the place of `cudnn.pygraph`: the operations as cuDNN documents them, by PyTorch."""

    def __init__(self, **types: str) -> None:
        assert types["intermediate_data_type"] == types["compute_data_type"] == "FLOAT"
        self.operations: list[str] = []

    def tensor(self, name: str, dim: list[int], stride: list[int], data_type: str) -> Described:
        def given(tensors: Mapping[str, Tensor]) -> Tensor:
            found = tensors[name]
            found = found.view(1, -1, 1, 1) if found.dim() == 1 else found
            assert list(found.shape) == dim
            assert found.as_strided(dim, stride).equal(found)
            return found

        return Described(given)

    def conv_fprop(self, image: Described, weight: Described, name: str, **geometry: list[int]) -> Described:
        def convolve(given: Mapping[str, Tensor]) -> Tensor:
            x, w = image.compute(given), weight.compute(given)
            order = (geometry["stride"], geometry["padding"], geometry["dilation"])
            return F.conv2d(x, w, None, *order, x.shape[1] // w.shape[1])

        return self._add(name, convolve)

    def bias(self, input: Described, bias: Described, name: str) -> Described:
        return self._add(name, lambda given: input.compute(given) + bias.compute(given))

    def add(self, a: Described, b: Described, name: str) -> Described:
        return self._add(name, lambda given: a.compute(given) + b.compute(given))

    def relu(self, input: Described, name: str) -> Described:
        return self._add(name, lambda given: F.relu(input.compute(given)))

    def _add(self, name: str, compute: Callable[[Mapping[str, Tensor]], Tensor]) -> Described:
        self.operations.append(name)
        return Described(compute)


class Graphs:
    """In the place of cuDNN: computes the graph that a group is described by, into the tensor that it is given."""

    def __init__(self) -> None:
        self.groups: list[Group] = []
        self.operations: list[list[str]] = []

    def __call__(self, group: Group) -> Execute:
        names = {name: name for name in ("FLOAT", "HALF", "BFLOAT16", "DOUBLE")}
        module = SimpleNamespace(data_type=SimpleNamespace(**names), pygraph=EagerGraph)
        graph, tensors = describe(module, group)
        self.groups.append(group)
        self.operations.append(graph.operations)

        def execute(given: Mapping[str, Tensor]) -> None:
            assert given.keys() == tensors.keys()
            given["y"].copy_(tensors["y"].compute(given))

        return execute
