"""What the processes of test_distributed.py run: `torchrun ... distributed_worker.py DIRECTORY SCENARIO...`.

Starting processes takes much longer than what they check, so one start serves all scenarios.  Each process writes
DIRECTORY/<rank>.json: the name of each scenario it has run and None, or the traceback of what failed.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from timm.layers.norm_act import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck

import resfuse
import resfuse.nn as rnn
from resfuse.functional import sync_bn_act
from resfuse.layout import empty_result
from tests import contract, models
from tests.shapes import bn_act_call

SCENARIOS: dict[str, Callable[[], None]] = {}
IMAGE = (5, 3, 48, 48)


def scenario(function: Callable[[], None]) -> Callable[[], None]:
    SCENARIOS[function.__name__] = function
    return function


def rank() -> int:
    return dist.get_rank()


def share(tensor: Tensor, sizes: tuple[int, int] = (2, 3)) -> Tensor:
    """This process's part of a batch; by default the parts are unequal."""
    return tensor.split(sizes)[rank()]


def gathered(tensor: Tensor) -> Tensor:
    """The parts of all processes as one batch."""
    parts: list[Any] = [None, None]
    dist.all_gather_object(parts, tensor.detach())
    return torch.cat(parts)


def summed(tensor: Tensor) -> Tensor:
    """The sum over the processes, in float64, which adds no error of its own."""
    total = tensor.detach().double()
    dist.all_reduce(total)
    return total.to(tensor.dtype)


def assert_equal_everywhere(tensor: Tensor) -> None:
    parts: list[Any] = [None, None]
    dist.all_gather_object(parts, tensor.detach())
    assert torch.equal(*parts)


def to_sync(model: nn.Module, group: Any = None) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model, group)


class Traffic:
    """Which collectives ran, and how many elements each took."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def count(self, name: str) -> int:
        return sum(call == name for call, _ in self.calls)


@contextlib.contextmanager
def recorded_traffic() -> Iterator[Traffic]:
    """Record the collectives that Python code starts (DDP's own are C++)."""
    traffic = Traffic()
    names = [name for name in dir(dist) if name.startswith(("all_", "reduce", "broadcast", "gather", "scatter"))]

    def recording(name: str) -> Callable[..., Any]:
        function = getattr(dist, name)

        def call(*args: Any, **options: Any) -> Any:
            sizes = [arg.numel() for arg in args if isinstance(arg, Tensor)]
            traffic.calls.append((name, min(sizes, default=0)))
            return function(*args, **options)

        return call

    functions = {name: recording(name) for name in names if callable(getattr(dist, name))}
    with mock.patch.multiple(dist, **functions):
        yield traffic


# DistributedDataParallel


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
def ddp_gradients_keep_the_contract() -> None:
    """In float32 the averaged gradients are as near to the truth as eager's."""
    shape = (4, 8, 9, 9)
    eager = models.block("basic-stride")
    fused = copy.deepcopy(eager)
    resfuse.fuse_(fused)
    input = torch.cat([models.decided_input(eager, (2, *shape[1:]), margin=2e-5) * scale for scale in (1, 2)])
    found, expected, truth = (
        models.results(DistributedDataParallel(model), share(input, (2, 2)).to(dtype))
        for model, dtype in (
            (fused, torch.float32),
            (copy.deepcopy(eager), torch.float32),
            (copy.deepcopy(eager).double(), torch.float64),
        )
    )
    assert found.keys() == truth.keys()
    for name, tensor in truth.items():
        if tensor.is_floating_point():
            resfuse.contract.check(name, found[name], expected[name], tensor, torch.float32)


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
    models_ = []
    for fuse in (True, False):
        model = models.small_resnet().double()
        if fuse:
            resfuse.fuse_(model)
        wrapped = DistributedDataParallel(model)
        for step, context in enumerate((wrapped.no_sync, contextlib.nullcontext)):
            with context():
                wrapped(share(models.random_input((4, 3, 48, 48), step).double(), (2, 2))).square().sum().backward()
        models_.append(model)
    for found, expected in zip(*(model.parameters() for model in models_), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-7, atol=1e-9)


# Synchronised batch norm: the operator


def assert_operator_keeps_the_contract(call: contract.Call, sizes: tuple[int, int]) -> None:
    """Both processes together against eager batch norm of the whole batch, in the same dtype and in float64."""
    grad_output = contract.random_grad_output(call, torch.Generator().manual_seed(1))
    leaves: dict[str, Tensor | None] = {}
    for name, tensor in call.tensors.items():
        if tensor is not None:
            tensor = share(tensor, sizes) if tensor.dim() == 4 else tensor.clone()
            tensor = tensor.detach().requires_grad_(name not in contract.RUNNING)
        leaves[name] = tensor
    sync_options = {name: value for name, value in call.options.items() if name != "training"}
    output = sync_bn_act(**leaves, **sync_options)  # type: ignore[arg-type]
    assert output.stride() == empty_result(leaves["input"]).stride()  # type: ignore[arg-type]
    output.backward(share(grad_output, sizes))
    found = {"output": gathered(output)}
    for name, leaf in leaves.items():
        if leaf is None:
            continue
        if name in contract.RUNNING:
            assert_equal_everywhere(leaf)
            found[name] = leaf
        else:
            assert leaf.grad is not None
            assert leaf.grad.dtype == leaf.dtype
            found[f"grad_{name}"] = (gathered if leaf.dim() == 4 else summed)(leaf.grad)
    eager = contract.results(contract.EAGER, call, grad_output)
    truth = contract.results(contract.EAGER, call.truth(), grad_output.double())
    assert found.keys() == truth.keys()
    contract.assert_within_contract(found, eager, truth, call.input.dtype, contract.term_sizes(call, grad_output))


@scenario
def operator_keeps_the_contract() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16):
        for layout in ("nchw", "nhwc"):
            for activation in ("relu", "identity"):
                call = bn_act_call(
                    (5, 13, 6, 7), dtype, layout=layout, residual_layout=layout, activation=activation, training=True
                )
                assert_operator_keeps_the_contract(call, (2, 3))


@scenario
def operator_without_parameters_residual_or_statistics() -> None:
    for affine in (True, False):
        call = bn_act_call((5, 6, 4, 3), residual_layout=None, affine=affine, training=True, momentum=0.3, eps=1e-3)
        assert_operator_keeps_the_contract(call, (4, 1))
        assert_operator_keeps_the_contract(call.replace(running_mean=None, running_var=None), (1, 4))


@scenario
def operator_in_parameter_dtypes() -> None:
    """Parameters and statistics in bfloat16, as after `model.bfloat16()`."""
    call = bn_act_call((5, 6, 4, 3), torch.bfloat16, parameter_dtype=torch.bfloat16, training=True)
    assert_operator_keeps_the_contract(call, (2, 3))


@scenario
def operator_with_an_empty_batch_on_one_process() -> None:
    for sizes in ((0, 5), (5, 0)):
        for dtype in (torch.float32, torch.bfloat16):
            assert_operator_keeps_the_contract(bn_act_call((5, 6, 4, 3), dtype, training=True), sizes)


@scenario
def operator_with_one_value_on_each_process() -> None:
    """One value per channel is enough here, two being those of the group."""
    assert_operator_keeps_the_contract(bn_act_call((2, 10, 1, 1), training=True), (1, 1))


@scenario
def operator_with_large_means() -> None:
    """Statistics are merged without cancellation: a mean 300 times the deviation costs no more than in eager."""
    assert_operator_keeps_the_contract(bn_act_call((5, 13, 6, 7), mean=300.0, training=True), (2, 3))


@scenario
def operator_with_images_of_unequal_sizes() -> None:
    """Each process has its own N, H and W: each value counts the same, as in one batch of all of them."""
    values = models.random_input((1, 7, 1, 50)).double()
    own, shape = values.split((12, 38), 3)[rank()], ((1, 7, 3, 4), (1, 7, 2, 19))[rank()]
    mean, var = torch.zeros(7).double(), torch.ones(7).double()
    output = sync_bn_act(own.reshape(shape), mean, var, activation="identity")
    expected = nn.functional.batch_norm(values, None, None, training=True)
    torch.testing.assert_close(output.reshape(own.shape), expected.split((12, 38), 3)[rank()])
    torch.testing.assert_close(mean, 0.1 * values.mean((0, 2, 3)))
    torch.testing.assert_close(var, 0.9 + 0.1 * values.var((0, 2, 3)))


@scenario
def operator_repeats_bit_for_bit() -> None:
    call = bn_act_call((5, 13, 6, 7), torch.bfloat16, training=True)
    found = []
    for _ in range(2):
        leaves = {name: None if t is None else t.clone() for name, t in call.tensors.items()}
        for name in ("input", "weight", "bias", "residual"):
            leaves[name] = (share(leaves[name]) if leaves[name].dim() == 4 else leaves[name]).requires_grad_()  # type: ignore[union-attr, arg-type]
        sync_bn_act(**leaves).float().square().sum().backward()  # type: ignore[arg-type]
        found.append([leaf.grad if leaf.requires_grad else leaf for leaf in leaves.values() if leaf is not None])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@scenario
def operator_refuses_bad_arguments_before_it_communicates() -> None:
    input, vector = torch.zeros(2, 3, 4, 4), torch.ones(3)
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"input": input[0]}, ValueError, "input: expected 4 dimensions"),
        ({"weight": torch.ones(4)}, ValueError, "weight: expected shape"),
        ({"activation": "gelu"}, ValueError, "activation: expected"),
        ({"residual": input[:, :2]}, ValueError, "residual: expected shape"),
        ({"residual": input.double()}, TypeError, "residual: expected dtype"),
        ({"running_mean": None}, ValueError, "running_mean: expected a tensor"),
        ({"input": input.int()}, TypeError, "input: expected a floating-point"),
    ]
    with recorded_traffic() as traffic:
        for change, error, message in bad:
            arguments = {"input": input, "running_mean": vector, "running_var": vector, **change}
            with pytest.raises(error, match=message):
                sync_bn_act(**arguments)
    assert traffic.calls == []
    assert torch.equal(vector, torch.ones(3))


# Synchronised batch norm: models


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
def conversion_before_fusing() -> None:
    for block in (BasicBlock, Bottleneck):
        eager = models.small_resnet(block)
        fused = to_sync(copy.deepcopy(eager))
        assert resfuse.fuse_(fused).fused_ops == resfuse.fuse_(copy.deepcopy(eager)).fused_ops
        assert_model_equals_whole_batch(fused, eager)


@scenario
def conversion_after_fusing() -> None:
    for block in (BasicBlock, Bottleneck):
        eager = models.small_resnet(block)
        fused = copy.deepcopy(eager)
        resfuse.fuse_(fused)
        fused = to_sync(fused)
        assert_model_equals_whole_batch(fused, eager)
        resfuse.unfuse_(fused)
        assert {type(module) for module in fused.modules()} >= {block, nn.SyncBatchNorm}


@scenario
def own_modules() -> None:
    """resfuse.nn: each converts, SyncBNAct2d with its activation and residual."""

    class WithResidual(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, input: Tensor) -> Tensor:
            return self.module(input, input.flip(2))

    fused = models.seeded(
        lambda: nn.Sequential(
            rnn.ConvBNAct2d(3, 8, 3, padding=1),
            WithResidual(rnn.BNAct2d(8)),
            rnn.BasicBlock(8, 8),
            rnn.PreActBasicBlock(8, 8),
            rnn.BNAct2d(8, activation="identity", momentum=None),
        )
    )
    eager = copy.deepcopy(fused)
    with resfuse.use_backend("reference"):  # plain eager PyTorch, and not synchronised
        assert_model_equals_whole_batch(to_sync(fused), eager, (5, 3, 8, 8))


@scenario
def networks_of_the_papers() -> None:
    """Shortcuts padded with zeros, pre-activation, and blocks that are computed again without counting twice."""
    for build in (
        lambda: resfuse.models.cifar_resnet(8, shortcut="A"),
        lambda: resfuse.models.cifar_resnet(8, shortcut="C", checkpoint=2),
        lambda: resfuse.models.cifar_preact_resnet(8),
    ):
        fused = models.seeded(build)
        eager = copy.deepcopy(fused)
        with resfuse.use_backend("reference"):
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
    assert {name for name, _ in traffic.calls} == {"all_gather_into_tensor"}
    assert sorted(size for _, size in traffic.calls) == sorted(2 * count + 1 for count in channels)
    with recorded_traffic() as traffic:
        output.sum().backward()
    assert {name for name, _ in traffic.calls} == {"all_reduce"}
    assert sorted(size for _, size in traffic.calls) == sorted(2 * count for count in channels)


@scenario
def no_communication_in_eval() -> None:
    eager = models.small_resnet()
    fused = to_sync(copy.deepcopy(eager))
    report = resfuse.fuse_(fused)
    input = share(models.random_input(IMAGE))
    with recorded_traffic() as traffic, models.counted_calls() as calls:
        models.assert_same(fused.double().eval(), eager.double().eval(), input.double())
    assert traffic.calls == []
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
    assert traffic.calls == []
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
def checkpointing() -> None:
    """The recomputation of each block exchanges its statistics again."""

    class Checkpointed(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            for module in self:
                input = checkpoint(module, input, use_reentrant=False)
            return input

    eager = models.seeded(lambda: Checkpointed(BasicBlock(8, 8), Bottleneck(8, 2)))
    fused = to_sync(copy.deepcopy(eager))
    resfuse.fuse_(fused)
    assert_model_equals_whole_batch(fused, eager, (5, 8, 6, 6))


@scenario
def statistics_without_gradients() -> None:
    """`no_grad` in training, as when statistics are estimated anew: one all-gather per layer, nothing saved."""
    eager = models.small_resnet().double()
    fused = to_sync(copy.deepcopy(eager))
    resfuse.fuse_(fused)
    input = models.random_input(IMAGE).double()
    with torch.no_grad(), recorded_traffic() as traffic:
        output = fused(share(input))
        expected = eager(input)
    assert not output.requires_grad
    assert traffic.count("all_gather_into_tensor") == len(traffic.calls)
    torch.testing.assert_close(gathered(output), expected)
    torch.testing.assert_close(fused.state_dict(), eager.state_dict())


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


# FSDP2


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


# On a GPU


@scenario
def equals_torch_sync_batchnorm_on_gpus() -> None:
    """torch.nn.SyncBatchNorm itself, which runs on GPUs only, against the operator, both held to float64."""
    device = f"cuda:{rank() % torch.cuda.device_count()}"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for layout in ("nchw", "nhwc"):
            call = bn_act_call((5, 13, 6, 7), dtype, layout=layout, residual_layout=None, training=True)
            call = contract.dataclasses.replace(call, options={**call.options, "activation": "identity"})
            grad_output = contract.random_grad_output(call, torch.Generator().manual_seed(1))
            torch_bn = nn.SyncBatchNorm(13).to(device)
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(torch_bn, name).data.copy_(call.tensors[name])  # type: ignore[arg-type]
            own_bn = to_sync(rnn.BNAct2d(13, activation="identity")).to(device)
            own_bn.load_state_dict(torch_bn.state_dict())
            results = []
            for bn in (own_bn, torch_bn):
                own = share(call.input).to(device).requires_grad_()
                output = bn(own)
                output.backward(share(grad_output).to(output))
                found = {"output": gathered(output.cpu()), "grad_input": gathered(own.grad.cpu())}  # type: ignore[union-attr]
                found |= {f"grad_{name}": summed(p.grad.cpu()) for name, p in bn.named_parameters()}  # type: ignore[union-attr]
                results.append(found | {name: getattr(bn, name).cpu() for name in contract.RUNNING})
            truth = contract.results(contract.EAGER, call.truth(), grad_output.double())
            terms = contract.term_sizes(call, grad_output)
            contract.assert_within_contract(results[0], results[1], truth, dtype, terms)


def main(directory: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    outcomes: dict[str, str | None] = {}
    for name in names:
        torch.manual_seed(0)
        try:
            SCENARIOS[name]()
            outcomes[name] = None
        except Exception:
            outcomes[name] = traceback.format_exc()
        Path(directory, f"{rank()}.json").write_text(json.dumps(outcomes))
        failed: list[Any] = [None, None]
        dist.all_gather_object(failed, outcomes[name])
        if any(failed):  # the processes may have stopped in different places
            break
    dist.barrier()  # gloo (torch 2.11) hangs if it is destroyed while it lets go of a collective's tensors
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
