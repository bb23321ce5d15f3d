"""Fully sharded models (FSDP2)."""

from __future__ import annotations

import copy

import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.resnet import Bottleneck

import resfuse
from tests import models
from tests.distributed.scenario import scenario, share


@scenario
def fully_sharded() -> None:
    """FSDP2 on two processes: outputs, averaged gradients and a step of the optimizer as in eager DDP."""
    eager = models.small_resnet(Bottleneck)
    fused = copy.deepcopy(eager)
    report = resfuse.fuse_(fused, memory_format=torch.preserve_format)
    for module in (fused.layer1[0], fused.layer2[0], fused):  # type: ignore[index, union-attr]
        fully_shard(module)
    wrapped = DistributedDataParallel(eager)
    losses = []
    for model in (fused, wrapped):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for step in range(2):
            optimizer.zero_grad()
            with models.counted_calls() as calls:
                loss = model(share(models.random_input((4, 3, 48, 48), step), (2, 2))).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
        if model is fused:
            assert calls.conv_bn_act == report.fused_ops
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    for (name, found), expected in zip(fused.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(found.full_tensor(), expected.detach(), rtol=1e-3, atol=1e-3, msg=name)
