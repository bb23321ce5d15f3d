"""Models with synchronised batch norm: each process computes its part of what one computes for the whole batch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from timm.layers.norm_act import BatchNormAct2d, convert_sync_batchnorm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.resnet import BasicBlock, Bottleneck

import resfuse
import resfuse.nn as rnn
from resfuse.functional import sync_bn_act
from tests import models
from tests.distributed.scenario import (
    IMAGE,
    assert_equal_everywhere,
    gathered,
    rank,
    recorded_traffic,
    scenario,
    share,
    summed,
    to_sync,
)
from tests.nn.pairs import WithResidual
from tests.shapes import bn_act_call


def assert_model_equals_whole_batch(
    fused: nn.Module, eager: nn.Module, shape: tuple[int, ...] = IMAGE, sizes: tuple[int, int] = (2, 3)
) -> None:
    """Each process with its part of a batch against eager with all of it, in float64: everything, and twice."""
    fused, eager = fused.double(), eager.double()
    for seed in (1, 2):
        input = models.random_input(shape, seed).double()
        expected = models.results(eager, input)
        fused.zero_grad()
        own = share(input, sizes).clone().requires_grad_()
        output = fused(own)
        grad = torch.randn(expected["output"].shape, generator=torch.Generator().manual_seed(2)).double()
        output.backward(share(grad, sizes))
        found = {"output": gathered(output), "grad_input": gathered(own.grad)}  # type: ignore[arg-type]
        for name, parameter in fused.named_parameters():
            if parameter.grad is not None:
                found[f"grad of {name}"] = summed(parameter.grad)
        for name, buffer in fused.named_buffers():
            assert_equal_everywhere(buffer)
            found[f"buffer {name}"] = buffer
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            scale = max(tensor.abs().max().item(), 1e-3)
            torch.testing.assert_close(
                found[name], tensor, rtol=0, atol=1e-8 * scale, msg=lambda text, name=name: f"{name}: {text}"
            )


@scenario
def conversion() -> None:
    """Before or after `fuse_`, of either block."""
    for block, first in ((BasicBlock, to_sync), (Bottleneck, resfuse.fuse_)):
        eager = models.small_resnet(block)
        fused = copy.deepcopy(eager)
        if first is to_sync:
            fused = to_sync(fused)
            assert resfuse.fuse_(fused).fused_ops == resfuse.fuse_(copy.deepcopy(eager)).fused_ops
        else:
            resfuse.fuse_(fused)
            fused = to_sync(fused)
        assert_model_equals_whole_batch(fused, eager)
        resfuse.unfuse_(fused)
        assert {type(module) for module in fused.modules()} >= {block, nn.SyncBatchNorm}


@scenario
def own_modules() -> None:
    """Each module of resfuse.nn converts, SyncBNAct2d with its activation and residual; so do whole networks.

    Shortcuts padded with zeros, pre-activation, and blocks that are computed again without counting twice.
    """
    for build in (
        lambda: nn.Sequential(
            rnn.ConvBNAct2d(3, 8, 3, padding=1),
            WithResidual(rnn.BNAct2d(8)),
            rnn.BasicBlock(8, 8),
            rnn.BNAct2d(8, activation="identity", momentum=None),
        ),
        lambda: resfuse.models.cifar_resnet(8, shortcut="A"),
        lambda: resfuse.models.cifar_resnet(8, shortcut="C", checkpoint=2),
        lambda: resfuse.models.cifar_preact_resnet(8),
    ):
        fused = models.seeded(build)
        eager = copy.deepcopy(fused)
        with resfuse.use_backend("reference"):  # plain eager PyTorch, and not synchronised
            assert_model_equals_whole_batch(to_sync(fused), eager, (5, 3, 16, 16))


@scenario
def norm_settings() -> None:
    for options in ({"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1}):
        eager = models.seeded(lambda options=options: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, **options)))
        fused = to_sync(copy.deepcopy(eager))
        resfuse.fuse_(fused)
        assert_model_equals_whole_batch(fused, eager, (5, 3, 8, 8))


@scenario
def timm_norm_with_activation() -> None:
    """timm's own conversion keeps the activation of its BatchNormAct2d, inside of its SyncBatchNormAct."""
    eager = models.seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), BatchNormAct2d(6, inplace=False)))
    fused = convert_sync_batchnorm(copy.deepcopy(eager))
    assert resfuse.fuse_(fused).fused_ops == 1
    assert_model_equals_whole_batch(fused, eager, (5, 3, 8, 8))


@scenario
def inside_of_ddp() -> None:
    """DDP averages what the processes have; on a CPU it refuses SyncBatchNorm modules, so they come after it."""
    eager = models.small_resnet(Bottleneck).double()
    fused = copy.deepcopy(eager)
    resfuse.fuse_(fused)
    wrapped = DistributedDataParallel(fused)
    to_sync(fused)
    input = models.random_input(IMAGE).double()
    wrapped(share(input)).square().sum().backward()
    eager(input).square().sum().backward()
    for found, expected in zip(fused.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(2 * found.grad, expected.grad, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(fused.state_dict(), eager.state_dict())


@scenario
def one_collective_each_way_per_layer() -> None:
    fused = to_sync(models.small_resnet(Bottleneck))
    report = resfuse.fuse_(fused)
    channels = [module.num_features for module in fused.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert len(channels) == report.fused_ops
    input = share(models.random_input(IMAGE))
    with recorded_traffic() as traffic:
        output = fused(input)
    assert {name for name, _ in traffic} == {"all_gather_into_tensor"}
    assert sorted(size for _, size in traffic) == sorted(2 * count + 1 for count in channels)
    with recorded_traffic() as traffic:
        output.sum().backward()
    assert {name for name, _ in traffic} == {"all_reduce"}
    assert sorted(size for _, size in traffic) == sorted(2 * count for count in channels)


@scenario
def no_communication_in_eval() -> None:
    eager = models.small_resnet()
    fused = to_sync(copy.deepcopy(eager))
    report = resfuse.fuse_(fused)
    input = share(models.random_input(IMAGE))
    with recorded_traffic() as traffic, models.counted_calls() as calls:
        models.assert_same(fused.double().eval(), eager.double().eval(), input.double())
    assert traffic == []
    assert calls.conv_bn_act == report.fused_ops  # and convolutions are fused, too


@scenario
def nothing_is_stale_after_a_broadcast() -> None:
    """Collectives write past PyTorch's version counters; inference notices all the same."""
    for part in ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
        eager = models.seeded(
            lambda: nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()), rank()
        )
        fused = copy.deepcopy(eager)
        resfuse.fuse_(fused)
        input = models.random_input((2, 3, 6, 6))
        with torch.no_grad():
            for _ in range(2):
                fused.eval()(input)
            for model in (fused, eager):
                dist.broadcast(model.state_dict()[part], 0)
            torch.testing.assert_close(fused(input), eager.eval()(input))


@scenario
def group_of_one() -> None:
    """A process group with this process alone: batch norm of its own batch, fused with the convolution."""
    groups = [dist.new_group([0]), dist.new_group([1])]
    eager = models.small_resnet()
    fused = to_sync(copy.deepcopy(eager), groups[rank()])
    report = resfuse.fuse_(fused)
    with recorded_traffic() as traffic, models.counted_calls() as calls:
        models.assert_same(fused.double(), eager.double(), share(models.random_input(IMAGE)).double())
    assert traffic == []
    assert calls.conv_bn_act == report.fused_ops
    call = bn_act_call((3, 4, 5, 5), training=True)
    found = sync_bn_act(call.input, None, None, process_group=groups[rank()])
    assert torch.equal(found, resfuse.bn_act(call.input, None, None, training=True))
    with pytest.raises(ValueError, match="process_group: expected a group with this process in it"):
        sync_bn_act(call.input, None, None, process_group=groups[1 - rank()])
    for group in groups:
        if dist.get_rank(group) >= 0:
            dist.destroy_process_group(group)


@scenario
def hooks_on_one_process_only() -> None:
    """A hook keeps the first process from fusing; both exchange the same, and the hook runs."""
    eager = models.small_resnet()
    fused = to_sync(copy.deepcopy(eager))
    resfuse.fuse_(fused)
    seen = []
    if rank() == 0:
        fused.bn1.register_forward_hook(lambda module, args, output: seen.append(output))  # type: ignore[union-attr]
        fused.layer2[0].conv2.register_forward_hook(lambda *_: seen.append(None))  # type: ignore[union-attr, index]
        fused.layer3[0].downsample[1].register_full_backward_hook(lambda *_: seen.append(None))  # type: ignore[union-attr, index]
    assert_model_equals_whole_batch(fused, eager)
    assert len(seen) == (6 if rank() == 0 else 0)
    if rank() == 0:
        handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(None))
        seen.clear()
    assert_model_equals_whole_batch(fused, eager)
    if rank() == 0:
        handle.remove()
        assert len(seen) > 2 * 9
    assert not any("forward" in module.__dict__ for module in fused.modules())


@scenario
def autocast() -> None:
    """Every layer's output has the dtype of eager's, and about its values."""
    eager = models.small_resnet()
    fused = to_sync(copy.deepcopy(eager))
    resfuse.fuse_(fused)
    input = models.random_input(IMAGE)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = fused(share(input)), eager(input)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert (gathered(found) - expected).norm() < 0.05 * expected.norm()
    found.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in fused.parameters())  # type: ignore[union-attr]
    wide = share(models.random_input((5, 6, 4, 4)))
    with torch.autocast("cpu", torch.bfloat16):  # a residual in another dtype promotes, as in eager
        assert sync_bn_act(wide.bfloat16(), None, None, residual=wide).dtype == torch.float32


@scenario
def compiled() -> None:
    """torch.compile takes the whole model, collectives included, in one graph."""
    torch._dynamo.reset()
    eager = models.small_resnet()
    fused = to_sync(copy.deepcopy(eager))
    resfuse.fuse_(fused)
    twin = copy.deepcopy(fused)
    fused.forward = torch.compile(fused.forward, fullgraph=True, backend="aot_eager")  # type: ignore[method-assign]
    assert_model_equals_whole_batch(fused, eager)
    for name, buffer in twin.named_buffers():  # it counted the batches, too
        if "num_batches" in name:
            assert fused.get_buffer(name) == buffer + 2
