"""Gradients: checked numerically in float64, to second order, for every subset of inputs, and as autograd expects."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import resfuse
from tests import contract, shapes

pytestmark = pytest.mark.usefixtures("one_thread")

Function = Callable[..., Tensor]
Case = tuple[Function, Function, list[Tensor]]


def float64(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def bn_case(training: bool, activation: str, affine: bool, with_residual: bool) -> Case:
    """A fused call and its eager equivalent as functions of the differentiable inputs."""
    channels = 3
    inputs = [float64(2, channels, 3, 2)]
    inputs += [float64(channels, seed=1), float64(channels, seed=2)] if affine else []
    inputs += [float64(2, channels, 3, 2, seed=3)] if with_residual else []

    def unpack(rest: tuple[Tensor, ...]) -> dict[str, Any]:
        options: dict[str, Any] = {"residual": rest[-1] if with_residual else None}
        options |= {"weight": rest[0], "bias": rest[1]} if affine else {}
        # New ones each time: training updates them, and a numerical derivative calls many times.
        mean = torch.linspace(-1, 1, channels, dtype=torch.float64)
        return options | {"running_mean": mean, "running_var": mean + 2, "training": training}

    def fused(input: Tensor, *rest: Tensor) -> Tensor:
        return resfuse.bn_act(input, **unpack(rest), activation=activation)

    def eager(input: Tensor, *rest: Tensor) -> Tensor:
        return contract.eager_bn_act(input, **unpack(rest), activation=activation)

    return fused, eager, inputs


def conv_case(training: bool, activation: str, conv_bias: bool, with_residual: bool) -> Case:
    conv: dict[str, Any] = {"stride": (2, 1), "padding": (1, 0), "dilation": 1, "groups": 2}
    inputs = [float64(2, 4, 5, 4), float64(6, 2, 3, 2, seed=1), float64(6, seed=2), float64(6, seed=3)]
    inputs += [float64(6, seed=4)] if conv_bias else []
    shape = F.conv2d(inputs[0], inputs[1], **conv).shape
    inputs += [float64(*shape, seed=5)] if with_residual else []

    def running() -> dict[str, Any]:
        mean = torch.linspace(-1, 1, 6, dtype=torch.float64)
        return {"running_mean": mean, "running_var": mean + 2, "training": training}

    def call(function: Function) -> Function:
        def run(input: Tensor, conv_weight: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
            return function(
                input, conv_weight, weight=weight, bias=bias, conv_bias=rest[0] if conv_bias else None,
                residual=rest[-1] if with_residual else None, activation=activation, **conv, **running(),
            )  # fmt: skip

        return run

    fused, eager = call(resfuse.conv_bn_act), call(contract.eager_conv_bn_act)
    return fused, eager, inputs


FLAGS = list(itertools.product([True, False], ["relu", "identity"], [True, False], [True, False]))
CASES = [("bn", *flags) for flags in FLAGS] + [("conv", *flags) for flags in FLAGS]
EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
SOME_CASES = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] if number % 5 else []) for number, case in enumerate(CASES)],
    ids=lambda case: "-".join(map(str, case)),
)


def make(case: tuple[Any, ...]) -> Case:
    return (bn_case if case[0] == "bn" else conv_case)(*case[1:])


@EACH_CASE
def test_gradcheck(case: tuple[Any, ...]) -> None:
    fused, _, inputs = make(case)
    assert gradcheck(fused, inputs)


def test_gradcheck_add_relu() -> None:
    inputs = [float64(2, 3, 4), float64(2, 3, 4, seed=1)]
    assert gradcheck(resfuse.add_relu, inputs)
    assert gradgradcheck(resfuse.add_relu, inputs)


@SOME_CASES
def test_gradgradcheck(case: tuple[Any, ...]) -> None:
    fused, _, inputs = make(case)
    assert gradgradcheck(fused, inputs)


@EACH_CASE
def test_second_derivatives_equal_eager(case: tuple[Any, ...]) -> None:
    fused, eager, inputs = make(case)

    def second(function: Function) -> tuple[Tensor, ...]:
        output = function(*inputs)
        first = torch.autograd.grad(output.pow(2).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(grad.pow(3).sum() for grad in first), inputs, allow_unused=True)  # type: ignore[arg-type]

    torch.testing.assert_close(second(fused), second(eager))


def test_second_derivatives_on_the_backend_in_float32() -> None:
    """create_graph=True leaves the kernels, which have no derivative of their own, for differentiable operations."""
    input, weight = (float64(*shape).detach().float().requires_grad_() for shape in ((2, 4, 5, 4), (6, 2, 3, 2)))
    running = (torch.zeros(6), torch.ones(6))
    conv: dict[str, Any] = {"stride": (2, 1), "padding": (1, 0), "groups": 2}

    def second(output: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(output.pow(2).sum(), [input, weight], create_graph=True)
        return torch.autograd.grad(sum(grad.pow(2).sum() for grad in first), [input, weight])  # type: ignore[arg-type]

    fused = resfuse.conv_bn_act(input, weight, *running, training=True, **conv)
    eager = torch.relu(F.batch_norm(F.conv2d(input, weight, **conv), *running, training=True))
    torch.testing.assert_close(second(fused), second(eager), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_every_subset_of_gradients(training: bool) -> None:
    """Unneeded gradients are not computed, needed ones do not depend on which others are."""
    fused, _, inputs = conv_case(training, "relu", True, True)
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


def test_retain_graph(layer: tuple[Tensor, ...]) -> None:
    input, weight, mean, var = layer
    output = resfuse.conv_bn_act(input, weight, mean, var, training=True, padding=1)
    expected = torch.autograd.grad(output.sum(), [input, weight], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), [input, weight]), expected)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.sum().backward()


@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_output_modified_in_place(activation: str, layer: tuple[Tensor, ...]) -> None:
    """As in eager: an error if backward needs the output (the ReLU's mask), the right gradient if it does not."""
    input = layer[0]
    output = resfuse.bn_act(input, None, None, training=True, activation=activation)
    output.mul_(2)
    if activation == "relu":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.square().sum().backward()
    else:
        (grad,) = torch.autograd.grad(output.square().sum(), input)
        eager = F.batch_norm(input, None, None, training=True).mul_(2)
        torch.testing.assert_close(grad, torch.autograd.grad(eager.square().sum(), input)[0], rtol=1e-4, atol=1e-5)


def test_no_graph_without_need(layer: tuple[Tensor, ...]) -> None:
    input, weight, mean, var = layer
    with torch.no_grad():
        assert not resfuse.conv_bn_act(input, weight, mean, var).requires_grad
    frozen = resfuse.conv_bn_act(input.detach(), weight.detach(), mean, var)
    assert frozen.grad_fn is None


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
