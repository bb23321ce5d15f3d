"""Training of fused models by DistributedDataParallel and, fully sharded, by FSDP2."""

from __future__ import annotations

import contextlib
import copy

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.resnet import BasicBlock, Bottleneck

import resfuse
from tests import models
from tests.distributed.scenario import assert_equal_everywhere, rank, scenario, share, to_sync


def ddp_training(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gradients, buffers and parameters after three steps of DDP training, each process with its part of a batch."""
    wrapped = DistributedDataParallel(model.to(dtype), bucket_cap_mb=1)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    for step in range(3):
        input = share(models.random_input((4, 3, 48, 48), step, dtype), (2, 2))
        target = torch.tensor([[1, 5], [7, 3]])[rank()]
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(input), target, label_smoothing=0.1).backward()
        optimizer.step()
    found = {f"grad of {name}": parameter.grad for name, parameter in model.named_parameters()}
    return {name: tensor for name, tensor in found.items() if tensor is not None} | model.state_dict()


@scenario
def ddp_equals_eager_ddp() -> None:
    """Gradients, running statistics and weights of fused models in DDP are those of eager ones in DDP."""
    for block in (BasicBlock, Bottleneck):
        eager = models.small_resnet(block)
        fused = copy.deepcopy(eager)
        report = resfuse.fuse_(fused)
        with models.counted_calls() as calls:
            found = ddp_training(fused, torch.float64)
        assert calls.conv_bn_act == 3 * report.fused_ops
        expected = ddp_training(eager, torch.float64)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(
                found[name], tensor, rtol=1e-7, atol=1e-9, msg=lambda text, n=name: f"{n} {text}"
            )
            if "running" not in name and "num_batches" not in name:  # those are each process's own
                assert_equal_everywhere(found[name])


@scenario
def ddp_with_compile() -> None:
    """torch.compile of a fused model inside of DDP, gradients averaged as without it."""
    torch._dynamo.reset()
    eager = models.small_resnet()
    fused = copy.deepcopy(eager)
    resfuse.fuse_(fused)
    input = share(models.random_input((4, 3, 48, 48)), (2, 2)).double()
    expected = models.results(DistributedDataParallel(eager.double()), input)
    found = models.results(torch.compile(DistributedDataParallel(fused.double()), backend="aot_eager"), input)
    for name, tensor in expected.items():
        key = name.replace("grad of module", "grad of _orig_mod.module").replace("buffer ", "buffer _orig_mod.")
        torch.testing.assert_close(found[key], tensor, rtol=1e-7, atol=1e-9)


@scenario
def ddp_without_synchronisation() -> None:
    """Gradient accumulation: no_sync leaves each process its own gradients, the next backward averages the sum."""
    eager = models.small_resnet().double()
    fused = copy.deepcopy(eager)
    resfuse.fuse_(fused)
    for model in (fused, eager):
        wrapped = DistributedDataParallel(model)
        for step, context in enumerate((wrapped.no_sync, contextlib.nullcontext)):
            with context():
                wrapped(share(models.random_input((4, 3, 48, 48), step).double(), (2, 2))).square().sum().backward()
    for found, expected in zip(fused.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-7, atol=1e-9)


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


@scenario
def recomputation() -> None:
    """The same bits as without, for synchronised batch norm, DDP and FSDP2.

    FSDP2 frees a layer's parameters while the layers behind it, which compute its output again, run backward.
    """

    def synchronised(model: nn.Module, recompute: bool) -> nn.Module:
        resfuse.fuse_(to_sync(model), recompute=recompute)
        return model

    def in_ddp(model: nn.Module, recompute: bool) -> nn.Module:
        resfuse.fuse_(model, recompute=recompute)
        return DistributedDataParallel(model)

    def sharded(model: nn.Module, recompute: bool) -> nn.Module:
        resfuse.fuse_(model, memory_format=torch.preserve_format, recompute=recompute)
        for module in (model.layer1[0], model.layer2[0], model):  # type: ignore[index, union-attr]
            fully_shard(module)
        return model

    for wrap in (synchronised, in_ddp, sharded):
        found = []
        for recompute in (False, True):
            model = wrap(models.small_resnet(Bottleneck), recompute)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            for step in range(2):
                optimizer.zero_grad()
                model(share(models.random_input((4, 3, 48, 48), step), (2, 2))).square().mean().backward()
                optimizer.step()
            found.append([getattr(tensor, "full_tensor", lambda t=tensor: t)() for tensor in model.parameters()])
        assert all(map(torch.equal, *found))
