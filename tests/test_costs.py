"""What does not depend on the clock: kernels per call, and bytes saved for backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import resfuse

pytestmark = pytest.mark.skipif("cpu" not in resfuse.available_backends(), reason="the CPU library is not built")

# Looking at values, not computing any.
_CHECKS = {"resfuse_cpu::rows_live", "resfuse_cpu::copy_finite", "resfuse_cpu::snapshot_matches"}
# No memory is read or written.
_METADATA = {"aten::detach", "aten::view", "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::t"}


class CountKernels(TorchDispatchMode):
    """Counts the operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if name not in _CHECKS | _METADATA:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def kernels(function: Callable[[], object]) -> dict[str, int]:
    function()  # packs weights, loads libraries
    with CountKernels() as mode:
        function()
    return dict(mode.counts)


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(memory_format=torch.channels_last)


@pytest.fixture
def batch_norm() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.zeros(32), torch.ones(32), torch.ones(32), torch.zeros(32)


def test_add_relu() -> None:
    input, residual = channels_last(2, 32, 7, 7), channels_last(2, 32, 7, 7).flip(2)
    assert kernels(lambda: resfuse.add_relu(input, residual)) == {"resfuse_cpu::add_relu_forward": 1}
    output = resfuse.add_relu(input.requires_grad_(), residual)
    backward = kernels(lambda: torch.autograd.grad(output, input, residual, retain_graph=True))
    assert backward == {"resfuse_cpu::add_relu_backward": 1}


@pytest.mark.parametrize("with_residual", [False, True])
def test_bn_act(with_residual: bool, batch_norm: tuple[Tensor, ...]) -> None:
    input = channels_last(2, 32, 7, 7)
    residual = channels_last(2, 32, 7, 7) if with_residual else None

    def run(training: bool) -> Tensor:
        return resfuse.bn_act(input, *batch_norm, residual=residual, training=training)

    assert kernels(lambda: run(False)) == {"resfuse_cpu::bn_eval_forward": 1}
    assert kernels(lambda: run(True)) == {"resfuse_cpu::bn_train_forward": 1}
    input.requires_grad_()
    output = run(True)
    backward = kernels(lambda: torch.autograd.grad(output, input, torch.ones_like(output), retain_graph=True))
    backward.pop("aten::ones_like")
    assert {name for name in backward if name.startswith("resfuse_cpu")} == {
        "resfuse_cpu::bn_backward_reduce",
        "resfuse_cpu::bn_backward_apply",
    }
    assert all(count == 1 for count in backward.values())


@pytest.mark.parametrize(
    ("with_residual", "expected"),
    [(False, "mkldnn::_convolution_pointwise"), (True, "mkldnn::_convolution_pointwise_")],
)
def test_conv_bn_act_eval_is_one_primitive(with_residual: bool, expected: str, batch_norm: tuple[Tensor, ...]) -> None:
    input, weight = channels_last(2, 16, 7, 7), channels_last(32, 16, 3, 3)
    residual = channels_last(2, 32, 7, 7) if with_residual else None
    with torch.no_grad():
        found = kernels(lambda: resfuse.conv_bn_act(input, weight, *batch_norm, padding=1, residual=residual))
    assert found == {expected: 1}


def test_conv_bn_act_train(batch_norm: tuple[Tensor, ...]) -> None:
    input, weight = channels_last(2, 16, 7, 7), channels_last(32, 16, 3, 3).requires_grad_()
    run = lambda: resfuse.conv_bn_act(input, weight, *batch_norm, padding=1, training=True)  # noqa: E731
    found = kernels(run)
    assert found.pop("resfuse_cpu::bn_train_forward") == 1
    assert found == {"aten::convolution": 1} or found == {"aten::mkldnn_convolution": 1}, found


def saved_bytes(function: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Bytes of the different storages that a forward keeps for backward, without those of parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages: dict[int, int] = {}
    keep: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = tensor.numel() * tensor.element_size()
            keep.append(tensor)  # an address must not come again while we count
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keep.append(function())
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("projection", [False, True])
def test_saved_bytes_of_a_bottleneck(dtype: torch.dtype, projection: bool) -> None:
    """Never more than eager with in-place ReLU; the statistics are a few bytes per channel on both sides."""
    wide, narrow = 64, 16
    shapes = {"1": (narrow, wide, 1), "2": (narrow, narrow, 3), "3": (wide, narrow, 1), "d": (wide, wide, 1)}
    weights = {n: channels_last(k, c, r, r, dtype=dtype).requires_grad_() for n, (k, c, r) in shapes.items()}
    norms = {n: (torch.ones(s[0]).requires_grad_(), torch.zeros(s[0]).requires_grad_()) for n, s in shapes.items()}
    input = channels_last(4, wide, 14, 14, dtype=dtype).requires_grad_()

    def fused() -> Tensor:
        def layer(n: str, x: Tensor, residual: Tensor | None = None, activation: str = "relu") -> Tensor:
            return resfuse.conv_bn_act(
                x, weights[n], None, None, *norms[n], padding=1 if n == "2" else 0, residual=residual,
                activation=activation, training=True,
            )  # fmt: skip

        shortcut = layer("d", input, activation="identity") if projection else input
        return layer("3", layer("2", layer("1", input)), shortcut)

    def eager() -> Tensor:
        def layer(n: str, x: Tensor) -> Tensor:
            z = F.conv2d(x, weights[n], padding=1 if n == "2" else 0)
            return F.batch_norm(z, None, None, *norms[n], training=True)

        shortcut = layer("d", input) if projection else input
        output = layer("3", layer("2", layer("1", input).relu_()).relu_())
        return output.add_(shortcut).relu_()

    parameters = [*weights.values(), *(tensor for pair in norms.values() for tensor in pair)]
    found, bound = saved_bytes(fused, parameters), saved_bytes(eager, parameters)
    activations = input.numel() * input.element_size()
    assert found >= 3 * activations  # it does count: the input, z3 and the output alone are that much
    assert found <= bound
    torch.testing.assert_close(fused(), eager(), rtol=0.05, atol=0.05)
