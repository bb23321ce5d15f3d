"""Capture in CUDA graphs, as far as it can be tested without a GPU: what would break or invalidate a graph.

A captured call must not read values of the device, and must not leave tensors behind, which would live in the graph's
memory pool.  Tensors on the meta device have neither values nor memory: a kernel's Python that reads one raises.  That
captured launches have counters of their own, and that no first contact is made meanwhile, is tested beside those.
"""

from __future__ import annotations

import gc
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resfuse
from resfuse.backends import cuda, cuda_conv, sm90, triton
from resfuse.layout import conv_output_shape
from resfuse.types import BatchNorm, Convolution, Pooling
from tests import shapes
from tests.backends.operands import Operands

SHAPE = (4, 64, 14, 14)


def result(input: Tensor, conv_weight: Tensor, *_: Any) -> Tensor:
    """The output of an operator that allocates it."""
    n, _, h, w = conv_output_shape(input.shape, conv_weight.shape, Convolution((1, 1), (1, 1), (1, 1), 1))
    return input.new_empty((n, conv_weight.shape[0], h, w)).contiguous(memory_format=torch.channels_last)


@pytest.fixture(params=["cuda", "sm90", "triton"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A backend whose launches do nothing."""
    if request.param == "triton":
        if (reason := triton.import_failure()) is not None:
            pytest.skip(reason)
        from resfuse.backends.triton import launch
        from resfuse.backends.triton.config import H100

        with launch.collected(H100):
            yield triton
        return
    for module in (cuda, cuda_conv, sm90):
        for name, value in vars(module).items():
            if isinstance(value, torch._ops.OpOverload):
                returns = bool(value._schema.returns)
                monkeypatch.setattr(module, name, result if returns else lambda *_: None)
    monkeypatch.setattr(cuda, "_OPERATORS", types.SimpleNamespace(bn_workspace_size=lambda _: 1024))
    yield cuda if request.param == "cuda" else sm90


def calls_of(kernels: Any) -> dict[str, Callable[[], Any]]:
    """A call of each kernel on the meta device."""
    x = torch.empty(SHAPE, dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)
    w = torch.empty(64, 64, 3, 3, dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)
    v = torch.empty(64, device="meta")
    convolution = Convolution((1, 1), (1, 1), (1, 1), 1)
    calls: dict[str, Callable[[], Any]] = {"conv_forward": lambda: kernels.conv_forward(x, w, None, convolution)}
    for training in (True, False):
        bn = BatchNorm(v, v, v, v, training, 0.1, 1e-5)
        calls[f"conv_bn_act_forward {training=}"] = lambda bn=bn: kernels.conv_bn_act_forward(
            x, w, None, convolution, bn, x, True
        )
    if kernels is not sm90:
        operands = Operands(kernels, SHAPE, torch.bfloat16, "cpu", "nhwc")
        for name, tensor in operands.tensors.items():
            if isinstance(tensor, Tensor):
                operands.tensors[name] = tensor.to("meta")
        calls |= operands.calls()
    if kernels is cuda:
        pooling = Pooling((3, 3), (2, 2), (1, 1), (1, 1), False)
        calls["max_pool_forward"] = lambda: cuda.max_pool_forward(x, pooling)
        calls["max_pool_backward"] = lambda: cuda.max_pool_backward(x, x.byte(), torch.Size((4, 64, 28, 28)), pooling)
    return calls


def on_meta() -> int:
    gc.collect()
    return sum(type(one) is Tensor and one.is_meta for one in gc.get_objects())


def test_kernels_read_no_values_and_leave_nothing_behind(kernels: Any) -> None:
    calls = calls_of(kernels)
    before = on_meta()
    for name, call in calls.items():
        assert call() is not None
        assert on_meta() == before, name


READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


@pytest.fixture
def no_host_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of tensors cannot be read, as while a stream is captured."""

    def refuse(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    for name in READS:
        monkeypatch.setattr(Tensor, name, refuse)


class Net(nn.Module):
    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16, momentum=momentum)
        self.block = resfuse.nn.BasicBlock(16, 16)
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, input: Tensor) -> Tensor:
        return self.block(self.pool(torch.relu(self.bn(self.conv(input))))).mean((2, 3))


@pytest.mark.usefixtures("no_host_reads")
@pytest.mark.parametrize("backend", [name for name in shapes.BACKENDS if name in ("reference", "cuda_emulator")])
def test_a_training_step_reads_no_values(backend: str) -> None:
    """Not even the count of batches, which advances on the device."""
    model = Net().to(memory_format=torch.channels_last)
    resfuse.fuse_(model)
    with resfuse.use_backend(backend):
        for _ in range(2):
            model(torch.randn(2, 3, 16, 16)).sum().backward()
        with torch.no_grad():
            model.eval()(torch.randn(2, 3, 16, 16))
    assert torch.equal(model.bn.num_batches_tracked, torch.tensor(2))


@pytest.mark.usefixtures("no_host_reads")
@pytest.mark.parametrize("fused", [True, False])
def test_a_cumulative_average_cannot_be_captured(fused: bool) -> None:
    """`momentum=None` divides by the count of batches on the host, in eager too."""
    model = Net(momentum=None)
    if fused:
        resfuse.fuse_(model)
    with pytest.raises(RuntimeError, match="capturing"):
        model(torch.randn(2, 3, 16, 16))


def test_fused_modules_have_no_hooks() -> None:
    """`torch.cuda.make_graphed_callables` refuses modules that have some."""
    model = Net()
    resfuse.fuse_(model)
    for module in model.modules():
        assert not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
