"""The operators under torch.compile; PyTorch's own checks of them are in tests/ops/test_opcheck.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import resfuse

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # torch.compile warns of its own internals
]


def tensors(layout: str, weight_layout: str = "channels_last", grad: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    formats = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}

    def normal(*shape: int, memory: str = layout) -> Tensor:
        values = torch.randn(*shape, generator=generator)
        return values.contiguous(memory_format=formats[memory]).requires_grad_(grad)

    return {
        "input": normal(2, 8, 6, 5),
        "conv_weight": normal(8, 8, 3, 3, memory=weight_layout),
        "weight": torch.randn(8, generator=generator).requires_grad_(grad),
        "bias": torch.randn(8, generator=generator).requires_grad_(grad),
        "residual": normal(2, 8, 6, 5),
        "running_mean": torch.zeros(8),
        "running_var": torch.ones(8),
    }


def add_relu(t: dict[str, Tensor], training: bool) -> Tensor:
    return resfuse.add_relu(t["input"], t["residual"])


def bn_act(t: dict[str, Tensor], training: bool) -> Tensor:
    return resfuse.bn_act(**{k: v for k, v in t.items() if k != "conv_weight"}, training=training)  # type: ignore[arg-type]


def conv_bn_act(t: dict[str, Tensor], training: bool) -> Tensor:
    return resfuse.conv_bn_act(**t, padding=1, training=training)  # type: ignore[arg-type]


OPS: dict[str, Callable[[dict[str, Tensor], bool], Tensor]] = {
    "add_relu": add_relu,
    "bn_act": bn_act,
    "conv_bn_act": conv_bn_act,
}
LAYOUTS = [("nchw", "nchw"), ("channels_last", "channels_last"), ("nchw", "channels_last")]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
def test_compiled_equals_eager(layouts: tuple[str, str], training: bool, op: str) -> None:
    """Whole graph, forward and every gradient; running statistics updated exactly once."""
    torch._dynamo.reset()
    run = functools.partial(OPS[op], training=training)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(compiled, run, tensors(*layouts), tensors(*layouts))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_settings_of_a_convolution(training: bool) -> None:
    """No two of them are equal, so that none can pass for another on the way through the registered operators."""
    torch._dynamo.reset()
    t, weight = tensors("channels_last"), torch.randn(6, 4, 3, 2, requires_grad=True)
    settings: dict[str, Any] = {"stride": (2, 1), "padding": (4, 3), "dilation": (1, 2), "groups": 2}

    def run(x: Tensor) -> Tensor:
        return resfuse.conv_bn_act(x, weight, torch.zeros(6), torch.ones(6), training=training, **settings)

    outputs = run(t["input"]), torch.compile(run, fullgraph=True, backend="aot_eager")(t["input"])
    torch.testing.assert_close(outputs[1], outputs[0])
    expected, found = (torch.autograd.grad(output.square().sum(), [t["input"], weight]) for output in outputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_inductor(training: bool) -> None:
    """The default compiler, which asserts the strides that the fakes promise; also without gradients or resized."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: resfuse.add_relu(conv_bn_act(t, training), bn_act(t, False)), fullgraph=True)
    ours, eager = tensors("channels_last"), tensors("channels_last")
    run = lambda t: resfuse.add_relu(conv_bn_act(t, training), bn_act(t, False))  # noqa: E731
    torch.testing.assert_close(compiled(ours), run(eager))
    torch.testing.assert_close(ours["running_mean"], eager["running_mean"])
    compiled(ours).sum().backward()
    run(eager).sum().backward()
    torch.testing.assert_close(ours["conv_weight"].grad, eager["conv_weight"].grad, rtol=1e-4, atol=1e-4)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(compiled(ours), run(eager))
    for name in ("input", "residual"):
        larger = torch.randn(3, 8, 9, 4).to(memory_format=torch.channels_last)
        ours[name], eager[name] = larger, larger
    torch.testing.assert_close(compiled(ours), run(eager))


def cast(t: dict[str, Tensor], dtype: torch.dtype, names: tuple[str, ...]) -> dict[str, Tensor]:
    return {k: v.detach().to(dtype).requires_grad_(v.requires_grad) if k in names else v for k, v in t.items()}


def assert_same(compiled: Callable[..., Tensor], run: Callable[..., Tensor], ours: Any, eager: Any) -> None:
    """Output, gradients and running statistics, bit for bit: the same kernels run."""
    output, expected = compiled(ours), run(eager)
    assert (output.dtype, output.stride()) == (expected.dtype, expected.stride())
    assert torch.equal(output, expected)
    output.float().square().sum().backward()
    expected.float().square().sum().backward()
    for name in ours:
        assert torch.equal(ours[name], eager[name]), name
        if eager[name].grad is None:
            assert ours[name].grad is None, name
        else:
            assert ours[name].grad.dtype == ours[name].dtype
            assert torch.equal(ours[name].grad, eager[name].grad), name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_bfloat16(parameters: torch.dtype, training: bool, op: str) -> None:
    """Gradients come in the dtype of what they belong to, though the kernels' sums are float32."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: OPS[op](t, training), fullgraph=True, backend="aot_eager")

    def make() -> dict[str, Tensor]:
        t = cast(tensors("channels_last"), torch.bfloat16, ("input", "conv_weight", "residual"))
        return cast(t, parameters, ("weight", "bias", "running_mean", "running_var"))

    assert_same(compiled, lambda t: OPS[op](t, training), make(), make())


@pytest.mark.parametrize("frozen", [("weight", "bias"), ("input",), ("input", "conv_weight", "weight", "residual")])
def test_some_gradients(frozen: tuple[str, ...]) -> None:
    torch._dynamo.reset()
    for op, training in (("bn_act", True), ("conv_bn_act", True), ("conv_bn_act", False)):
        run = functools.partial(OPS[op], training=training)
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        ours, eager = (
            {k: v.detach() if k in frozen else v for k, v in tensors("channels_last").items()} for _ in range(2)
        )
        assert_same(compiled, run, ours, eager)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast(training: bool) -> None:
    torch._dynamo.reset()

    def run(t: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return conv_bn_act(t, training)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    ours, eager = tensors("channels_last"), tensors("channels_last")
    assert_same(compiled, run, ours, eager)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context: Callable[[], Any], training: bool, op: str) -> None:
    """The registered operators take the place of the Function; running statistics still change exactly once."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: OPS[op](t, training), fullgraph=True, backend="aot_eager")
    ours, eager = tensors("channels_last"), tensors("channels_last")
    with context():
        output, expected = compiled(ours), OPS[op](eager, training)
    torch.testing.assert_close(output, expected)
    assert not output.requires_grad
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(ours[name], eager[name])
        assert (ours[name] == tensors("channels_last")[name]).all() is not (training and op != "add_relu")


def test_dynamic_shapes_compile_once() -> None:
    """One graph for all sizes but the channels."""
    torch._dynamo.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(lambda t: conv_bn_act(t, True), fullgraph=True, backend=count, dynamic=True)
    for shape in ((2, 8, 6, 5), (3, 8, 9, 7), (5, 8, 12, 12)):
        t = tensors("channels_last", grad=False)
        t |= {name: torch.randn(shape).to(memory_format=torch.channels_last) for name in ("input", "residual")}
        expected = conv_bn_act({name: tensor.clone() for name, tensor in t.items()}, True)
        torch.testing.assert_close(compiled(t), expected)
    assert graphs == 1


@pytest.mark.parametrize("op", ["add_relu", "bn_act"])
def test_one_tensor_in_two_places(op: str) -> None:
    """torch 2.11 drops one of the two gradients of a tensor that an autograd.Function takes twice."""
    torch._dynamo.reset()

    def run(x: Tensor) -> Tensor:
        if op == "add_relu":
            return resfuse.add_relu(x, x)
        return resfuse.bn_act(x, None, None, residual=x, training=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    input = torch.randn(2, 8, 6, 5, requires_grad=True)
    expected = torch.autograd.grad(run(input).square().sum(), input)
    assert torch.equal(torch.autograd.grad(compiled(input).square().sum(), input)[0], expected[0])
