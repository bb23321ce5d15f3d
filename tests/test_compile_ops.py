"""The registered operators under torch.compile and PyTorch's own checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import resfuse

pytestmark = [
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
    run = OPS[op]
    compiled = torch.compile(lambda t: run(t, training), fullgraph=True, backend="aot_eager")
    ours, eager = tensors(*layouts), tensors(*layouts)
    output, expected = compiled(ours), run(eager, training)
    assert output.stride() == expected.stride()
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    for name in ours:
        torch.testing.assert_close(ours[name], eager[name])  # the running statistics among them
        torch.testing.assert_close(ours[name].grad, eager[name].grad, rtol=1e-4, atol=1e-4)


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


def samples() -> list[tuple[str, tuple[Any, ...]]]:
    """One call or more of every registered operator."""
    found: list[tuple[str, tuple[Any, ...]]] = []
    for layouts in LAYOUTS:
        t = tensors(*layouts, grad=False)
        x, r, w, b = t["input"], t["residual"], t["weight"], t["bias"]
        conv = ([1, 1], [1, 1], [1, 1], 1)
        z = resfuse.conv_bn_act(x, t["conv_weight"], None, None, training=True, padding=1)
        mean, invstd = torch.randn(8), torch.rand(8)
        running = (t["running_mean"], t["running_var"])
        found += [
            ("add_relu_forward", (x, r)),
            ("add_relu_backward", (r, x)),
            ("bn_act_train", (x, *running, w, b, r, True, 0.1, 1e-5)),
            ("bn_act_train", (x, None, None, None, None, None, False, 0.1, 1e-5)),
            ("bn_act_eval", (x, *running, w, None, r, True, 1e-5)),
            ("bn_act_backward", (r, x, x, w, mean, invstd, True, True, True)),
            ("bn_act_backward", (r, x, None, None, mean, invstd, False, False, False)),
            ("conv_bn_act_train", (x, t["conv_weight"], *running, w, b, None, r, True, *conv, 0.1, 1e-5)),
            ("conv_bn_act_eval", (x, t["conv_weight"], *running, w, b, b, None, False, *conv, 1e-5)),
            ("conv_forward", (x, t["conv_weight"], None, *conv)),
            ("conv_backward", (z, x, t["conv_weight"], *conv, [True, True, True])),
            ("conv_backward", (z, x, t["conv_weight"], *conv, [False, True, False])),
        ]
    return found


def test_every_operator_has_a_sample() -> None:
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("resfuse::")}
    assert names == {name for name, _ in samples()}


@pytest.mark.parametrize(("name", "args"), samples(), ids=lambda value: value if isinstance(value, str) else "")
def test_opcheck(name: str, args: tuple[Any, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.resfuse, name).default, args)
