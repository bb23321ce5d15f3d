"""Fused models under torch.compile, export, FX, and on the meta device."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from resfuse import fuse_, unfuse_
from tests import models
from tests.models import IMAGE, both, chain_of_blocks


def test_a_compiled_block_is_called() -> None:
    fused, _, _ = both(chain_of_blocks)
    fused[1]._compiled_call_impl = lambda input: input + 100
    input = models.random_input((2, 8, 6, 6))
    assert fused.eval()[:2](input).min() > 50


def test_blocks_as_leaves_of_an_fx_trace() -> None:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, (BasicBlock, Bottleneck)) or super().is_leaf_module(module, name)

    fused, _, _ = both(chain_of_blocks)
    calls = [node.target for node in Tracer().trace(fused).nodes if node.op == "call_module"]
    assert calls == ["0", "1", "2", "3"]


@models.compiles
@pytest.mark.parametrize("training", [True, False])
def test_compile_fullgraph(training: bool) -> None:
    torch._dynamo.reset()
    fused, eager, _ = both(lambda: torchvision.models.resnet18(num_classes=5))
    compiled = torch.compile(fused.train(training), fullgraph=True, backend="aot_eager")
    eager.train(training)
    input = models.random_input(IMAGE)
    output, expected = compiled(input), eager(input)
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in fused.parameters())
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(fused.get_buffer(name), buffer, rtol=1e-3, atol=1e-4)
    assert fused.layer1[0].bn1.num_batches_tracked == int(training)


def test_meta_device() -> None:
    model = models.small_resnet().to("meta")
    assert len(fuse_(model).fused) == 8
    assert model(torch.empty(IMAGE, device="meta")).shape == (4, 10)
    unfuse_(model)
    assert model.conv1.weight.is_contiguous()
