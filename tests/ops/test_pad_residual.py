"""A residual of fewer channels than the output: option A's shortcut, added without a padded tensor."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import resfuse
from resfuse.nn import BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck, ZeroPadShortcut, fused_call
from tests import contract, models, shapes
from tests.contract import Call
from tests.shapes import check_all

pytestmark = pytest.mark.usefixtures("one_thread")

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def every_second_pixel(tensor: Tensor) -> Tensor:
    """The same values as every second pixel of a larger tensor of the same memory format."""
    large = torch.empty_like(tensor).repeat(1, 1, 2, 2).contiguous(memory_format=_format(tensor)).fill_(torch.nan)
    view = large[:, :, ::2, ::2]
    view.copy_(tensor)
    return view


def _format(tensor: Tensor) -> torch.memory_format:
    return torch.contiguous_format if tensor.is_contiguous() else torch.channels_last


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: shapes.LAYOUTS[name] for name in ("nchw", "nhwc", "nhwc_slice_of_channels")},
    "every_second_pixel": lambda tensor: every_second_pixel(shapes.LAYOUTS["nhwc"](tensor)),
    "nchw_every_second_pixel": every_second_pixel,
}


def call_of(op: str, channels: int, dtype: torch.dtype, layout: str, residual: str, **options: Any) -> Call:
    """A call whose residual has some of the output's channels."""
    if op == "bn_act":
        call = shapes.bn_act_call((2, 16, 6, 5), dtype, layout=layout, **options)
    else:
        conv = shapes.Convolution((2, 8, 11, 9), 16, (3, 3), (2, 2), (1, 1))
        call = shapes.conv_bn_act_call(conv, dtype, layout=layout, **options)
    narrow = call.tensors["residual"][:, :channels].contiguous()
    return Call(op, call.replace(residual=LAYOUTS[residual](narrow)).tensors, {**call.options, "pad_residual": True})


@MODES
@pytest.mark.parametrize("dtype", shapes.DTYPES)
@pytest.mark.parametrize("op", ["bn_act", "conv_bn_act"])
@pytest.mark.usefixtures("poisoned_memory")
def test_contract(op: str, dtype: torch.dtype, training: bool) -> None:
    """Output, every gradient and the statistics, for residuals of all kinds; with all channels it is the usual one."""
    cases = [*itertools.product(("nchw", "nhwc"), LAYOUTS, (8,)), ("nhwc", "nhwc", 16), ("nhwc", "nhwc", 1)]
    for layout, residual, channels in cases:
        call = call_of(op, channels, dtype, layout, residual, training=training)
        check_all(call, interpret=(layout, residual) == ("nhwc", "every_second_pixel"))


@MODES
@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("op", ["bn_act", "conv_bn_act"])
def test_gradients_are_derivatives(op: str, activation: str, training: bool) -> None:
    """To second order."""
    values = shapes.Values(torch.float64)
    tensors = {"input": values.normal(2, 3, 4, 3), **values.batch_norm(3)}
    tensors["residual"] = every_second_pixel(values.normal(2, 2, 4, 3))
    options = {"training": training, "activation": activation, "pad_residual": True}
    if op == "conv_bn_act":
        tensors["conv_weight"], options["padding"] = values.normal(3, 3, 3, 1), (1, 0)
    call = Call(op, tensors, options)
    names = ["input", "residual", "weight"]
    inputs = [call.tensors[name].detach().requires_grad_() for name in names]

    def run(*tensors: Tensor) -> Tensor:
        fresh = call.map(torch.clone).replace(**dict(zip(names, tensors, strict=True)))
        return contract.forward(contract.FUSED, fresh)

    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs, atol=1e-4)


@MODES
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # of torch.compile, of its internals
@pytest.mark.parametrize("op", ["bn_act", "conv_bn_act"])
def test_compiled(op: str, training: bool) -> None:
    torch._dynamo.reset()
    call = call_of(op, 8, torch.float32, "nhwc", "every_second_pixel", training=training)
    grad = contract.random_grad_output(call, torch.Generator().manual_seed(0))
    expected = contract.results(contract.FUSED, call, grad)
    functions = {op: torch.compile(contract.FUSED[op], fullgraph=True, backend="aot_eager")}
    found = contract.results(functions, call, grad)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


@pytest.mark.parametrize("op", ["bn_act", "conv_bn_act"])
def test_a_residual_of_another_dtype_under_autocast(op: str) -> None:
    """Eager promotes the sum."""
    call = call_of(op, 8, torch.bfloat16, "nhwc", "nhwc")
    call = call.replace(residual=call.tensors["residual"].float())
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (contract.forward(functions, call) for functions in (contract.FUSED, contract.EAGER))
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("op", ["bn_act", "conv_bn_act"])
@pytest.mark.parametrize("shape", [(2, 17, 6, 5), (2, 0, 6, 5), (2, 8, 5, 5), (1, 8, 6, 5), (8, 6, 5)])
def test_bad_residual(op: str, shape: tuple[int, ...]) -> None:
    call = call_of(op, 8, torch.float32, "nchw", "nchw", training=True)
    before = call.tensors["running_mean"].clone()
    with pytest.raises(ValueError, match=r"residual: expected shape \(2, 16, 6, 5\), or with fewer channels, got"):
        contract.forward(contract.FUSED, call.replace(residual=torch.zeros(shape)))
    plain = Call(op, call.tensors, {name: value for name, value in call.options.items() if name != "pad_residual"})
    with pytest.raises(ValueError, match=r"residual: expected shape \(2, 16, 6, 5\), got \(2, 8, 6, 5\)"):
        contract.forward(contract.FUSED, plain)
    assert torch.equal(call.tensors["running_mean"], before)


def test_a_narrow_residual_is_not_overwritten() -> None:
    call = call_of("conv_bn_act", 8, torch.float32, "nhwc", "nhwc")
    kept, expected = call.tensors["residual"].clone(), contract.forward(contract.EAGER, call)
    for name, _ in shapes.running("conv_bn_act", torch.float32):
        with torch.no_grad(), resfuse.use_backend(name):
            found = resfuse.conv_bn_act(**call.tensors, **call.options, overwrite_residual=True)
        torch.testing.assert_close(found, expected)
        assert torch.equal(call.tensors["residual"], kept)


class Pads(TorchDispatchMode):
    """Counts the operators that would make a padded tensor."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.constant_pad_nd, torch.ops.aten.cat)
        return func(*args, **(kwargs or {}))


def block(cls: Any) -> nn.Module:
    return models.seeded(lambda: cls(16, 32 // cls.expansion, 2, ZeroPadShortcut(16, 32, 2)))


@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
@pytest.mark.parametrize("cls", [BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck])
def test_the_shortcut_costs_no_tensor(cls: Any, mode: str) -> None:
    """No padded copy of the input is made in forward."""
    module = block(cls).to(memory_format=torch.channels_last).train(mode == "train")
    input = models.random_input((2, 16, 12, 12)).to(memory_format=torch.channels_last)
    # Under a mode modules call PyTorch's operators: this one only counts, and must not be seen.
    hidden = mock.patch.object(fused_call, "_dispatch_modes", return_value=0)
    with torch.set_grad_enabled(mode != "inference"), hidden, Pads() as pads, models.counted_calls() as calls:
        module(input)
    assert calls.total > 0
    assert pads.count == 0


@pytest.mark.parametrize("cls", [BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck])
def test_hooks_see_the_padded_tensor(cls: Any) -> None:
    """Whoever looks at the shortcut is shown what it returns, and the block computes the same."""
    module = block(cls).eval()
    input, seen = models.random_input((2, 16, 7, 9)), []
    expected = module(input)
    module.downsample.register_forward_hook(lambda _module, _args, output: seen.append(output))
    torch.testing.assert_close(module(input), expected)
    assert torch.equal(seen[0], F.pad(input[:, :, ::2, ::2], (0, 0, 0, 0, 0, 16)))


@pytest.mark.parametrize("cls", [BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck])
@pytest.mark.parametrize("where", ["conv", "norm"])
def test_where_the_modules_are_called(cls: Any, where: str) -> None:
    """A hook on the last convolution or norm: the operator is not used, and the sum is the same."""
    module, twin = block(cls).double(), block(cls).double()
    last = [child for name, child in module.named_children() if name.startswith("conv" if where == "conv" else "bn")][
        -1
    ]
    last.register_forward_hook(lambda *_: None)
    for training in (True, False):
        models.assert_same(module.train(training), twin.train(training), models.random_input((2, 16, 7, 9)))


def test_shortcut_alone() -> None:
    shortcut = ZeroPadShortcut(3, 5, 2)
    input = models.random_input((2, 3, 5, 4))
    assert torch.equal(shortcut(input), F.pad(input[:, :, ::2, ::2], (0, 0, 0, 0, 0, 2)))
    assert shortcut.select(input).data_ptr() == input.data_ptr()
    assert not list(shortcut.state_dict())
    assert repr(shortcut) == "ZeroPadShortcut(3, 5, stride=2)"
    with pytest.raises(ValueError, match="out_channels: expected at least in_channels, 5, got 3"):
        ZeroPadShortcut(5, 3)
    with pytest.raises(ValueError, match="stride: expected at least 1, got 0"):
        ZeroPadShortcut(3, 3, 0)
    with pytest.raises(ValueError, match=r"input: expected 3 channels, got shape \(2, 4, 5, 4\)"):
        shortcut(torch.zeros(2, 4, 5, 4))
