"""Batch norm's settings in the modules of `resfuse.nn`: all of them change what one call computes or leaves behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from resfuse.nn import fused_call
from tests import models
from tests.nn.pairs import WithResidual, assert_module_matches, own_block, pair

NORMS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.BatchNorm2d(8),
    "eps": lambda: nn.BatchNorm2d(8, eps=0.1),
    "momentum": lambda: nn.BatchNorm2d(8, momentum=0.7),
    "momentum-0": lambda: nn.BatchNorm2d(8, momentum=0.0),
    "cumulative": lambda: nn.BatchNorm2d(8, momentum=None),
    "untracked": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "not-affine": lambda: nn.BatchNorm2d(8, affine=False),
    "frozen": lambda: FrozenBatchNorm2d(8, eps=0.01),
    "synchronised": lambda: nn.SyncBatchNorm(8, momentum=None),  # among several processes: test_distributed
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("residual", [False, True])
def test_norm_settings(name: str, residual: bool) -> None:
    eager, fused = pair(nn.Conv2d(8, 8, 3, padding=1), NORMS[name](), nn.ReLU())
    input = models.random_input((2, 8, 5, 5))
    if residual:
        fused, eager = WithResidual(fused), WithResidual(eager)
    assert_module_matches(fused, eager, input)


@pytest.mark.parametrize("name", NORMS)
def test_reasons_agree_with_the_calls(name: str) -> None:
    _, fused = pair(bn=NORMS[name]())
    assert fused_call.reason_against(fused.conv, fused.bn) is None


def test_statistics_switched_off_after_construction() -> None:
    eager, fused = pair()
    for model in (eager, fused):
        model.bn.track_running_stats = False
    assert_module_matches(fused, eager, models.random_input((2, 6, 5, 5)))
    for model in (eager, fused):
        model.bn.running_mean = model.bn.running_var = None
    assert_module_matches(fused, eager, models.random_input((2, 6, 5, 5)))


def test_one_value_per_channel() -> None:
    _, fused = pair()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fused.train()(torch.zeros(1, 6, 1, 1))
    assert fused.bn.num_batches_tracked == 0
    fused.eval()(torch.zeros(1, 6, 1, 1))


def test_momentum_none_is_the_average_of_all_batches() -> None:
    _, fused = pair(bn=nn.BatchNorm2d(8, momentum=None))
    fused.bn.reset_running_stats()
    inputs = [models.random_input((4, 6, 5, 5), seed) for seed in range(3)]
    with torch.no_grad():
        for input in inputs:
            fused.train()(input)
        means = torch.stack([fused.conv(input).mean((0, 2, 3)) for input in inputs])
    torch.testing.assert_close(fused.bn.running_mean, means.mean(0))
    assert fused.bn.num_batches_tracked == 3


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["basic", "bottleneck-stride"])
def test_layout_of_the_output_is_eagers(name: str, memory_format: torch.memory_format) -> None:
    fused, eager = own_block(name), models.block(name)
    for training in (True, False):
        for weights in (torch.contiguous_format, torch.channels_last):
            for model in (fused, eager):
                model.to(memory_format=weights).train(training)
            input = models.block_input(name).to(memory_format=memory_format)
            assert fused(input).stride() == eager(input).stride()
