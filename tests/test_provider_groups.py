"""Providers that replace fused groups of a module: folding, the groups, what is asked of ATen and of cuDNN."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("torchvision")

from benchmarks.cases import networks
from benchmarks.cases.modules import AddReLU
from benchmarks.providers import UnsuitableError
from benchmarks.providers.cudnn_aten import AtenCudnn
from benchmarks.providers.cudnn_graph import CudnnGraph
from benchmarks.providers.folding import fold
from tests.stand_ins import SETTING, Graphs, Operators, calibrated, modules

# torch.export warns of its own internals
pytestmark = [pytest.mark.filterwarnings(f"ignore::{name}") for name in ("DeprecationWarning", "FutureWarning")]


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("conv_bias", [False, True])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_a_folded_batch_norm_computes_the_same(affine: bool, conv_bias: bool, eps: float) -> None:
    conv = nn.Conv2d(6, 8, 3, groups=2, bias=conv_bias, dtype=torch.double).to(memory_format=torch.channels_last)
    bn = nn.BatchNorm2d(8, eps=eps, affine=affine, dtype=torch.double).eval()
    for tensor in (bn.running_mean, bn.running_var, bn.weight, bn.bias):
        if tensor is not None:
            nn.init.uniform_(tensor, 1e-3, 2)
    folded = fold(conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps)
    input = torch.randn(2, 6, 5, 5, dtype=torch.double)
    torch.testing.assert_close(F.conv2d(input, *folded, groups=2), bn(conv(input)).detach(), rtol=1e-12, atol=1e-12)
    assert folded.weight.stride() == conv.weight.stride()
    assert not folded.weight.requires_grad and not folded.bias.requires_grad


def test_folding_rounds_once() -> None:
    weight, var = torch.tensor([[[[3.0]]]], dtype=torch.bfloat16), torch.tensor([0.3], dtype=torch.bfloat16)
    folded = fold(weight, None, torch.tensor([1.0]), var, None, None, 0.0)
    assert folded.weight.item() == (3 * var.double().rsqrt()).bfloat16().item()
    assert folded.bias.item() == (-var.double().rsqrt()).bfloat16().item()


@pytest.mark.parametrize("name", modules())
def test_groups_become_fused_operators_of_aten(name: str) -> None:
    module, shapes = modules()[name]
    module, *inputs = calibrated(module, *shapes)
    expected = copy.deepcopy(module)(*inputs)
    operators = Operators()
    provider = AtenCudnn("", (operators.conv_relu, operators.conv_add_relu))
    step = provider.prepare(module, tuple(inputs), SETTING)
    found = step(*(provider.convert(tensor) for tensor in inputs))
    torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-10)
    assert operators.calls
    assert all(call["alpha"] == 1 for name, call in operators.calls if name == "cudnn_convolution_add_relu")


def test_a_block_is_one_operator_per_convolution() -> None:
    module, input = calibrated(networks.build_block("resnet50", "layer2.0"), (1, 256, 6, 6))
    operators = Operators()
    step = AtenCudnn("", (operators.conv_relu, operators.conv_add_relu)).prepare(module, (input,), SETTING)
    step(input)
    # conv1, conv2 and, with the projection, an ordinary convolution, as the residual, conv3
    names = ["cudnn_convolution_relu", "cudnn_convolution_relu", "cudnn_convolution_add_relu"]
    assert [name for name, _ in operators.calls] == names
    assert [call["stride"] for _, call in operators.calls] == [[1, 1], [2, 2], [1, 1]]
    operators.calls.clear()
    step(2 * input)
    assert len(operators.calls) == 3


@pytest.mark.parametrize("name", modules())
def test_groups_become_graphs_of_cudnn(name: str) -> None:
    module, shapes = modules()[name]
    module, *inputs = calibrated(module, *shapes)
    expected = copy.deepcopy(module)(*inputs)
    graphs = Graphs()
    provider = CudnnGraph("", graphs)
    step = provider.prepare(module, tuple(inputs), SETTING)
    found = step(*(provider.convert(tensor) for tensor in inputs))
    torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-10)
    for group, operations in zip(graphs.groups, graphs.operations, strict=True):
        wanted = ["conv", "bias", *(["add"] if group.residual else []), *(["relu"] if group.relu else [])]
        assert operations == wanted


def test_without_a_convolution_there_is_nothing_to_offer() -> None:
    inputs = (torch.rand(1, 2, 3, 3), torch.rand(1, 2, 3, 3))
    for provider in (AtenCudnn(""), CudnnGraph("", Graphs())):
        with pytest.raises(UnsuitableError, match="no convolution"):
            provider.prepare(AddReLU(), inputs, SETTING)


def test_operators_of_aten_take_what_they_are_given() -> None:
    """The two names exist in torch and point to the operators whose schemas the tests above bind to."""
    for name in ("cudnn_convolution_relu", "cudnn_convolution_add_relu"):
        with pytest.raises((RuntimeError, NotImplementedError), match=name):
            getattr(torch, name)(*operator_arguments(name))


def operator_arguments(name: str) -> tuple[Any, ...]:
    image, weight = torch.rand(1, 2, 3, 3), torch.rand(2, 2, 1, 1)
    residual = (image, 1.0) if "add" in name else ()
    return image, weight, *residual, torch.rand(2), [1, 1], [0, 0], [1, 1], 1
