"""Gradients: checked numerically in float64, to second order, for every subset of inputs, and as autograd expects."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad, gradcheck

import resfuse
from tests import contract, shapes
from tests.contract import Call

pytestmark = pytest.mark.usefixtures("one_thread")

Function = Callable[..., Tensor]
OPTIONS = tuple(itertools.product([True, False], ["relu", "identity"], [True, False], [True, False]))
CASES = [("add_relu",), *((op, *options) for op in ("bn_act", "conv_bn_act") for options in OPTIONS)]
EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))


def make(op: str, training: bool = True, activation: str = "relu", extra: bool = True, residual: bool = True) -> Call:
    """A small call in float64; `extra` are the affine parameters, or the convolution's bias."""
    options: dict[str, Any] = {"training": training, "activation": activation}
    options["residual_layout"] = "nchw" if residual else None
    if op == "add_relu":
        return shapes.add_relu_call((2, 3, 4), torch.float64)
    if op == "bn_act":
        return shapes.bn_act_call((2, 3, 3, 2), torch.float64, affine=extra, **options)
    conv = shapes.Convolution((2, 4, 5, 4), 6, (3, 2), (2, 1), (1, 0), groups=2)
    return shapes.conv_bn_act_call(conv, torch.float64, conv_bias=extra, **options)


def as_function(functions: contract.Functions, call: Call) -> tuple[Function, list[Tensor]]:
    """A call as a function of its differentiable tensors, and those."""
    inputs = [call.tensors[name].detach().requires_grad_() for name in call.differentiable]  # type: ignore[union-attr]

    def run(*tensors: Tensor) -> Tensor:
        fresh = call.map(torch.clone)  # a numerical derivative calls many times, and training updates statistics
        return contract.forward(functions, fresh.replace(**dict(zip(call.differentiable, tensors, strict=True))))

    return run, inputs


@EACH_CASE
def test_gradcheck(case: tuple[Any, ...]) -> None:
    assert gradcheck(*as_function(contract.FUSED, make(*case)))


def second(functions: contract.Functions, call: Call) -> tuple[Tensor, ...]:
    run, inputs = as_function(functions, call)
    first = torch.autograd.grad(run(*inputs).pow(2).sum(), inputs, create_graph=True)
    return torch.autograd.grad(sum(grad.pow(3).sum() for grad in first), inputs, allow_unused=True)  # type: ignore[arg-type]


@EACH_CASE
def test_second_derivatives_equal_eager(case: tuple[Any, ...]) -> None:
    call = make(*case)
    torch.testing.assert_close(second(contract.FUSED, call), second(contract.EAGER, call))


def test_second_derivatives_on_the_backend_in_float32() -> None:
    """create_graph=True leaves the kernels, which have no derivative of their own, for differentiable operations."""
    call = make("conv_bn_act", extra=False).map(Tensor.float)
    torch.testing.assert_close(second(contract.FUSED, call), second(contract.EAGER, call), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_every_subset_of_gradients(training: bool) -> None:
    """Unneeded gradients are not computed, needed ones do not depend on which others are."""
    fused, inputs = as_function(contract.FUSED, make("conv_bn_act", training))
    full = torch.autograd.grad(fused(*inputs).sum(), inputs)
    for subset in itertools.product([True, False], repeat=len(inputs)):
        leaves = [tensor.detach().requires_grad_(needs) for tensor, needs in zip(inputs, subset, strict=True)]
        output = fused(*leaves)
        assert output.requires_grad is any(subset)
        if any(subset):
            output.sum().backward()
        for leaf, needs, grad in zip(leaves, subset, full, strict=True):
            assert (leaf.grad is not None) is needs
            if needs:
                torch.testing.assert_close(leaf.grad, grad)


@pytest.fixture
def layer() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    memory = {"memory_format": torch.channels_last}
    return (
        torch.randn(2, 8, 6, 5).to(**memory).requires_grad_(),
        torch.randn(16, 8, 3, 3).to(**memory).requires_grad_(),
        torch.zeros(16),
        torch.ones(16),
    )


def test_statistics_of_an_eval_forward_survive_training(layer: tuple[Tensor, ...]) -> None:
    """backward uses the running statistics of its forward, whatever has happened to them since."""
    input, _, _, _ = layer
    mean, var, scale = torch.zeros(8), torch.ones(8), torch.ones(8, requires_grad=True)
    output = resfuse.bn_act(input, mean, var, scale)
    expected = torch.autograd.grad(output.sum(), [input, scale], retain_graph=True)
    resfuse.bn_act(input.detach() * 5, mean, var, training=True)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), [input, scale]), expected)


@pytest.mark.parametrize(("activation", "has_residual"), [("relu", True), ("relu", False), ("identity", True)])
def test_output_modified_in_place(activation: str, has_residual: bool, layer: tuple[Tensor, ...]) -> None:
    """An error if backward reads the output (the ReLU's mask behind a residual), the right gradient if it does not."""
    input, residual = layer[0], torch.ones_like(layer[0]) if has_residual else None
    output = resfuse.bn_act(input, None, None, residual=residual, training=True, activation=activation)
    output.mul_(2)
    if activation == "relu" and has_residual:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.square().sum().backward()
    else:
        (grad,) = torch.autograd.grad(output.square().sum(), input)
        eager = F.batch_norm(input, None, None, training=True) + (1 if has_residual else 0)
        eager = (torch.relu(eager) if activation == "relu" else eager) * 2
        torch.testing.assert_close(grad, torch.autograd.grad(eager.square().sum(), input)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_backward_inside_of_autocast(training: bool, layer: tuple[Tensor, ...]) -> None:
    """A float32 forward has float32 gradients wherever backward is called, z that it computes again included."""
    input, weight, mean, var = layer
    scale = torch.ones(16, requires_grad=True)
    output = resfuse.conv_bn_act(input, weight, mean, var, scale, training=training, padding=1)
    expected = torch.autograd.grad(output.square().sum(), [input, weight, scale], retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(output.square().sum(), [input, weight, scale])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_first_gradient_with_create_graph_in_bfloat16(training: bool) -> None:
    """The differentiable form of backward is as accurate as the kernels: its statistics are float32 too."""
    torch.manual_seed(0)
    input = (torch.randn(8, 4, 9, 9) * 0.1 + 4).bfloat16().requires_grad_()
    weight = torch.ones(4, requires_grad=True)
    grad = torch.randn(8, 4, 9, 9).bfloat16()
    output = resfuse.bn_act(input, torch.full((4,), 4.0), torch.full((4,), 0.01), weight, training=training)
    expected = torch.autograd.grad(output, [input, weight], grad, retain_graph=True)
    found = torch.autograd.grad(output, [input, weight], grad, create_graph=True)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by the first dual number of a process
@pytest.mark.parametrize("op", ["add_relu", "bn_act", "conv_bn_act"])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_forward_mode_is_refused(op: str, requires_grad: bool, layer: tuple[Tensor, ...]) -> None:
    """Rather than a tangent that is silently lost."""
    input, weight, mean, var = layer
    input = input.detach().requires_grad_(requires_grad)
    calls = {
        "add_relu": lambda x: resfuse.add_relu(x, input),
        "bn_act": lambda x: resfuse.bn_act(x, mean[:8], var[:8]),
        "conv_bn_act": lambda x: resfuse.conv_bn_act(x, weight.detach(), mean, var),
    }
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(input, torch.ones_like(input))
        with pytest.raises(RuntimeError, match=r"forward AD|jvp"):
            calls[op](dual)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_torch_func_is_refused(transform: Any) -> None:
    """Rather than a gradient that is silently zero."""
    input = torch.randn(2, 3, 4, 4)
    with pytest.raises(RuntimeError, match=r"torch\.func transforms are not supported"):
        transform(lambda x: resfuse.add_relu(x, x).sum())(input)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("backend", [name for name in shapes.BACKENDS if "cpu" in shapes.devices_of(name)])
def test_saved_tensors_are_read_once(backend: str, create_graph: bool) -> None:
    """Activation checkpointing computes them at the first read, and refuses a second."""
    unpacked: list[int] = []

    def unpack(entry: tuple[int, Tensor]) -> Tensor:
        unpacked.append(entry[0])
        return entry[1]

    count = itertools.count()
    call = shapes.conv_bn_act_call(shapes.CONVOLUTIONS["3x3"], layout="nhwc", residual_layout="nhwc", training=True)
    with resfuse.use_backend(backend), torch.autograd.graph.saved_tensors_hooks(lambda t: (next(count), t), unpack):
        leaves = {name: t if name in contract.RUNNING else t.requires_grad_() for name, t in call.tensors.items()}
        output = resfuse.conv_bn_act(**leaves, **call.options)
        saved = next(count)
        torch.autograd.grad(output.sum(), leaves["input"], create_graph=create_graph)
    first_ones = [index for index in unpacked if index < saved]
    assert len(first_ones) == len(set(first_ones)) == saved
