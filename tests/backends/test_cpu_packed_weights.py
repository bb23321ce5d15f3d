"""The CPU backend's folded, packed weights: never stale, never leaked, and NaN passes through as in eager."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resfuse
from resfuse.backends import cpu_conv, cpu_kernels

pytestmark = [
    pytest.mark.skipif("cpu" not in resfuse.available_backends(), reason="the CPU library is not built"),
    pytest.mark.usefixtures("one_thread"),
]


class Layer(nn.Module):
    """conv, bn, ReLU: `forward` is fused, `eager` what it must equal."""

    def __init__(self, channels: int = 24, groups: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=True)
        self.bn = nn.BatchNorm2d(channels)
        nn.init.normal_(self.bn.weight)
        nn.init.normal_(self.bn.bias)
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.5, 2)
        self.eval()

    def forward(self, input: Tensor, residual: Tensor | None = None, **options: Any) -> Tensor:
        conv, bn = self.conv, self.bn
        call: dict[str, Any] = {
            "conv_bias": conv.bias, "residual": residual, "padding": conv.padding, "stride": conv.stride,
            "dilation": conv.dilation, "groups": conv.groups, "eps": bn.eps,
        }  # fmt: skip
        return resfuse.conv_bn_act(
            input, conv.weight, bn.running_mean, bn.running_var, bn.weight, bn.bias, **call | options
        )

    def eager(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        output = self.bn(self.conv(input))
        return torch.relu(output if residual is None else output + residual)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def input() -> Tensor:
    return torch.randn(2, 24, 7, 9, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)


def assert_equal_to_eager(layer: Layer, *inputs: Tensor) -> None:
    # Folding reorders the roundings of a few hundred products of order one.
    torch.testing.assert_close(layer(*inputs), layer.eager(*inputs), rtol=1e-4, atol=1e-4, equal_nan=True)


@contextmanager
def record_calls(owner: Any, name: str) -> Iterator[list[tuple[Any, ...]]]:
    calls, original = [], getattr(owner, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, lambda *args: (calls.append(args), original(*args))[1])
        yield calls


def optimizer_step(layer: Layer) -> None:
    with torch.enable_grad():
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        layer(torch.ones(1, 24, 4, 4)).sum().backward()
        optimizer.step()


def torchs_own_batch_norm(layer: Layer) -> None:
    """PyTorch updates the running statistics without counting a new version of them."""
    version = layer.bn.running_mean._version
    F.batch_norm(torch.randn(4, 24, 3, 3) * 9 + 5, layer.bn.running_mean, layer.bn.running_var, training=True)
    assert layer.bn.running_mean._version == version


def own_training_step(layer: Layer) -> None:
    bn = layer.bn
    resfuse.bn_act(torch.randn(4, 24, 3, 3) * 9 + 5, bn.running_mean, bn.running_var, training=True)


CHANGES: dict[str, Callable[[Layer], object]] = {
    "conv.weight in place": lambda layer: layer.conv.weight.mul_(2),
    "one element in place": lambda layer: layer.conv.weight[3, 1, 1, 2].add_(50),
    "conv.weight.data": lambda layer: layer.conv.weight.data.mul_(2),
    "conv.weight replaced": lambda layer: setattr(layer.conv, "weight", nn.Parameter(layer.conv.weight * 2)),
    "conv.weight.data replaced": lambda layer: setattr(layer.conv.weight, "data", layer.conv.weight * 2),
    "conv.bias in place": lambda layer: layer.conv.bias.add_(1),
    "bn.weight in place": lambda layer: layer.bn.weight.mul_(-1),
    "bn.weight.data": lambda layer: layer.bn.weight.data.mul_(-1),
    "bn.bias.data of one channel": lambda layer: layer.bn.bias.data[17].add_(3),
    "running_mean in place": lambda layer: layer.bn.running_mean.add_(1),
    "running_var.data": lambda layer: layer.bn.running_var.data.mul_(4),
    "eps": lambda layer: setattr(layer.bn, "eps", 0.5),
    "load_state_dict": lambda layer: layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()}),
    "optimizer": optimizer_step,
    "F.batch_norm in training": torchs_own_batch_norm,
    "resfuse.bn_act in training": own_training_step,
    "stride": lambda layer: setattr(layer.conv, "stride", (2, 1)),
    "padding": lambda layer: setattr(layer.conv, "padding", (0, 2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_goes_stale(change: str, input: Tensor) -> None:
    layer = Layer()
    before = layer(input)
    assert_equal_to_eager(layer, input)
    CHANGES[change](layer)
    after = layer(input)
    assert before.shape != after.shape or not torch.equal(before, after)
    assert_equal_to_eager(layer, input)


def test_the_packing_is_used_again(input: Tensor) -> None:
    layer = Layer()
    layer(input)
    (entry,) = cpu_conv._packed[id(layer.conv.weight), torch.float32]
    layer(input)
    assert cpu_conv._packed[id(layer.conv.weight), torch.float32] == [entry]


def test_one_packing_for_each_of_a_few_shapes(input: Tensor) -> None:
    """oneDNN would reorder a weight that was packed for another shape at every call; too many are not kept either."""
    layer = Layer()
    for height in range(1, 8):
        assert_equal_to_eager(layer, input[:, :, :height])
    entries = cpu_conv._packed[id(layer.conv.weight), torch.float32]
    assert [entry.input_shape[2] for entry in entries] == [1, 2, 3, 4]
    layer.conv.weight.mul_(2)
    assert_equal_to_eager(layer, input[:, :, :3])
    assert len(cpu_conv._packed[id(layer.conv.weight), torch.float32]) == 1


def test_one_weight_two_batch_norms(input: Tensor) -> None:
    first, second = Layer(), Layer()
    second.conv = first.conv
    second.bn.running_mean.add_(2)
    for _ in range(2):
        assert_equal_to_eager(first, input)
        assert_equal_to_eager(second, input)


def test_entries_die_with_the_weight(input: Tensor) -> None:
    before = len(cpu_conv._packed)
    layer = Layer()
    layer(input)
    assert len(cpu_conv._packed) == before + 1
    del layer
    gc.collect()
    assert len(cpu_conv._packed) == before


def test_tensors_without_version_counters(input: Tensor) -> None:
    with torch.inference_mode():
        layer = Layer()
        assert_equal_to_eager(layer, input)
        layer.conv.weight[0, 0, 0, 1] += 100  # an element that the snapshot does not sample
        assert_equal_to_eager(layer, input)


def test_views_are_read_where_they_lie(input: Tensor) -> None:
    layer = Layer()
    stacked = torch.randn(2, 24)
    layer.bn.running_mean = stacked.t()[:, 1]  # not contiguous
    layer.conv.weight = nn.Parameter(torch.randn(24, 48, 3, 3)[:, ::2])
    assert_equal_to_eager(layer, input)
    stacked[1] += 1
    assert_equal_to_eager(layer, input)


class TestNotFinite:
    """oneDNN's own ReLU maps NaN to 0."""

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("groups", [1, 4, 24])
    @pytest.mark.parametrize("where", ["input", "residual", "both"])
    def test_in_one_element(self, value: float, groups: int, where: str, input: Tensor) -> None:
        layer, residual = Layer(groups=groups), torch.randn_like(input)
        if where != "residual":
            input[1, 5, 3, 4] = value
        if where != "input":
            residual[0, 7, 2, 2] = value
        assert_equal_to_eager(layer, input, residual)
        assert_equal_to_eager(layer, input)
        expected = layer.eager(input, residual)
        assert not expected.isfinite().all() or (where == "residual" and value < 0)
        output = layer(input, residual, overwrite_residual=True)
        assert output.data_ptr() == residual.data_ptr()
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4, equal_nan=True)

    def test_two_infinities_of_opposite_sign(self, input: Tensor) -> None:
        input[0, 3, 2, 2], input[0, 4, 2, 3] = float("inf"), -float("inf")
        assert_equal_to_eager(Layer(), input)

    @pytest.mark.parametrize("parameter", ["conv.weight", "conv.bias", "bn.weight", "bn.bias", "bn.running_mean"])
    def test_in_one_parameter(self, parameter: str, input: Tensor) -> None:
        layer = Layer()
        tensor = layer.state_dict()[parameter]
        tensor.view(-1)[tensor.numel() // 2] = float("nan")
        assert layer(input).isnan().any()
        assert_equal_to_eager(layer, input)

    @pytest.mark.parametrize("touch", [None, "in place", "inference mode"])
    def test_residual_that_was_the_input_of_an_earlier_convolution(self, touch: str | None, input: Tensor) -> None:
        """It is not looked at again, unless it may have changed since."""
        first, last = Layer(), Layer()
        first.bn.bias.fill_(9)  # every pixel has a positive channel
        with torch.inference_mode() if touch == "inference mode" else torch.no_grad():
            input = input.clone(memory_format=torch.channels_last)
            inner = first(input)
            if touch is not None:
                input[0, 7, 2, 2] = float("nan")
            expected = last.eager(inner, input)
            with record_calls(cpu_kernels, "copy_finite") as looks:
                output = last(inner, input, overwrite_residual=True)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
        assert len(looks) == (0 if touch is None else 1)

    def test_a_residual_that_was_overwritten_is_looked_at_again(self, input: Tensor) -> None:
        """The tensor is the same and no version was counted, but its finite values are gone."""
        first, last = Layer(), Layer()
        first.bn.bias.fill_(9)  # every pixel has a positive channel
        inner = first(input)
        bad = inner.clone(memory_format=torch.channels_last)
        bad[1, 5, 3, 4] = float("nan")
        output = last(bad, input, activation="identity", overwrite_residual=True)
        assert output.data_ptr() == input.data_ptr() and output.isnan().any()
        expected = last.eager(inner, output)
        found = last(inner, output, overwrite_residual=True)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)

    def test_pixels_without_a_positive_channel_are_legitimate(self, input: Tensor) -> None:
        layer = Layer()
        layer.bn.bias.fill_(-100)
        output = layer(input)
        assert torch.equal(output, torch.zeros_like(output))


def test_an_overwritten_residual_among_other_tensors_that_were_found_finite() -> None:
    """They are told apart by identity: comparing them would compare their elements."""
    seen = cpu_conv._RecentlyFinite()
    first, second = torch.zeros(2, 3), torch.zeros(2, 3)
    for tensor in (first, second, first):
        seen.add(tensor)
    assert seen.take(second)
    assert not seen.take(second)
    assert seen.take(first)
    assert not seen.take(first)
