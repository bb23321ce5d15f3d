"""The tools that people train with, around whole fused models: each gives what it gives around the eager model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torchvision.models.resnet import BasicBlock, Bottleneck

import resfuse
from resfuse import contract
from tests import models

IMAGE = (4, 3, 32, 32)

pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> nn.Sequential:
    """Small, with everything that is fused in it, and a child for each block."""
    return models.seeded(  # type: ignore[return-value]
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)),
            BasicBlock(16, 16),
            BasicBlock(16, 32, 2, models.projection(16, 32, 2)),
            Bottleneck(32, 8),
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
        )
    )


def both(dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, nn.Sequential]:
    """(fused, eager), the same network twice."""
    eager = network().to(dtype)
    fused = copy.deepcopy(eager)
    assert resfuse.fuse_(fused).fused_ops == 9
    return fused, eager


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return models.random_input(IMAGE, step, dtype), torch.randint(10, IMAGE[:1], generator=generator)


def assert_same_state(found: nn.Module, expected: nn.Module) -> None:
    """In float64: the rounding errors of several steps, nothing more."""
    states = found.state_dict(), expected.state_dict()
    assert list(states[0]) == list(states[1])
    for name, tensor in states[1].items():
        torch.testing.assert_close(
            states[0][name], tensor, rtol=1e-7, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
        )


# Optimizers, schedules and the rest of a recipe


def groups_by_name(model: nn.Module) -> list[dict[str, Any]]:
    """As most recipes make them: no weight decay for what is called bias or belongs to a batch norm."""
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    others, decayed = [], []
    for name, parameter in model.named_parameters():
        plain = name.endswith("bias") or name.rpartition(".")[0] in norms
        (others if plain else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def recipe(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: str) -> swa_utils.AveragedModel:
    """Six steps, two batches each, with clipping, a schedule, label smoothing and a moving average."""
    makers: dict[str, Callable[[], Any]] = {
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6),
        "one-cycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=6),
        "steps": lambda: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4]),
    }
    scheduler = makers[schedule]()
    average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    for step in range(6):
        for part in range(2):
            input, target = batch(2 * step + part)
            loss = nn.functional.cross_entropy(model(input), target, label_smoothing=0.1) / 2
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    return average


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, 0.01, momentum=0.9, nesterov=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, 0.003),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, 0.001, momentum=0.9, foreach=True),
}


@pytest.mark.parametrize(("optimizer", "schedule"), [("sgd", "cosine"), ("adamw", "one-cycle"), ("rmsprop", "steps")])
def test_recipe(optimizer: str, schedule: str) -> None:
    """Weight decay by name, accumulation, clipping, schedule, moving average: all end where they end in eager."""
    fused, eager = both()
    averages = [recipe(model, OPTIMIZERS[optimizer](groups_by_name(model)), schedule) for model in (fused, eager)]
    assert_same_state(fused, eager)
    assert_same_state(*averages)
    input, _ = batch(100)
    torch.testing.assert_close(averages[0].eval()(input), averages[1].eval()(input))


def test_optimizer_state_goes_both_ways() -> None:
    """A run begun eager goes on fused, and the other way round, from state dicts alone."""
    ends = []
    for first_fused in (True, False):
        fused, eager = both()
        first, second = (fused, eager) if first_fused else (eager, fused)
        optimizers = [torch.optim.SGD(model.parameters(), 0.01, momentum=0.9) for model in (first, second)]
        for step in range(4):
            if step == 2:
                second.load_state_dict(first.state_dict())
                optimizers[1].load_state_dict(optimizers[0].state_dict())
            model, optimizer = (first, optimizers[0]) if step < 2 else (second, optimizers[1])
            input, target = batch(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(input), target).backward()
            optimizer.step()
        ends.append(second)
    assert_same_state(*ends)


# Mixed precision


def gradients(model: nn.Module, dtype: torch.dtype | None, step: int = 0) -> tuple[Tensor, Tensor]:
    """(logits, all gradients as one vector) of a step, under autocast to `dtype`; in float16 with a scaled loss."""
    input, target = batch(step, next(model.parameters()).dtype)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=dtype == torch.float16)
    with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
        logits = model(input)
        loss = nn.functional.cross_entropy(logits, target)
    model.zero_grad()
    scaler.scale(loss).backward()
    parameters = list(model.parameters())
    scaler.unscale_(torch.optim.SGD(parameters))
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in parameters)
    return logits.detach(), torch.cat([p.grad.flatten() for p in parameters])  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_keeps_the_contract(dtype: torch.dtype) -> None:
    """Whole steps under autocast are as near to float64 as eager's.

    Rounding decides the signs that some ReLUs see, so that the error of one step's gradients is mostly chance: it is
    the root mean square over several steps that is bounded.
    """
    fused, eager = both(torch.float32)
    truth = copy.deepcopy(eager).double()
    errors = torch.zeros(2, 2)
    for step in range(6):
        exact = gradients(truth, None, step)
        for row, model in zip(errors, (fused, eager), strict=True):
            for column, (found, expected) in enumerate(zip(gradients(model, dtype, step), exact, strict=True)):
                row[column] += contract.relative_error(found, expected) ** 2 / 6
    found, expected = errors.sqrt().tolist()
    for name, one, other in zip(("logits", "gradients"), found, expected, strict=True):
        assert one <= contract.FACTOR * other + contract.FLOORS[dtype], (
            f"{name}: E(fused) {one:.2e}, E(eager) {other:.2e}"
        )


def test_scaler_skips_the_same_steps() -> None:
    """An infinite gradient skips the step, halves the scale, and leaves weights alone, not running statistics."""
    scalers, losses = [], []
    pair = both(torch.float32)
    for model in pair:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        scales = []
        for step in range(5):
            input, target = batch(step, torch.float32)
            before = model[0][0].weight.detach().clone()
            with torch.autocast("cpu", torch.float16):
                loss = nn.functional.cross_entropy(model(input), target)
            if step == 1:
                loss = loss * 1e38
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            assert torch.equal(before, model[0][0].weight) is (step == 1)
        scalers.append(scales)
        losses.append(loss.detach())
    assert scalers[0] == scalers[1] == [1024, 512, 512, 1024, 1024]
    torch.testing.assert_close(*losses, rtol=0.05, atol=0.05)
    assert pair[0][0][1].num_batches_tracked == pair[1][0][1].num_batches_tracked == 5


# Gradient checkpointing


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Sequential, how: str) -> None:
        super().__init__()
        self.model, self.how = model, how

    def forward(self, input: Tensor) -> Tensor:
        if self.how == "segments":
            return checkpoint_sequential(self.model, 2, input, use_reentrant=False)
        for module in self.model:
            input = checkpoint(module, input, use_reentrant=self.how == "reentrant")
        return input


@pytest.mark.parametrize("how", ["reentrant", "not-reentrant", "segments"])
def test_checkpointing(how: str) -> None:
    """Statistics are updated by the recomputation too, in eager and here alike."""
    fused, eager = both()
    models.assert_same(Checkpointed(fused, how), Checkpointed(eager, how), batch(0)[0])
    assert fused[0][1].num_batches_tracked == eager[0][1].num_batches_tracked >= 1


# torch.compile


@models.compiles
@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_training_under_autocast(fullgraph: bool) -> None:
    """Forward and backward, mixed precision inside: about what the uncompiled model computes."""
    torch._dynamo.reset()
    fused, _ = both(torch.float32)
    twin = copy.deepcopy(fused)
    twin.compile(backend="aot_eager", fullgraph=fullgraph)
    if not fullgraph:  # a hook inside has its block's parts called, and still nothing is lost
        for model in (fused, twin):
            model[1].bn1.register_forward_hook(lambda module, args, output: output * 1.5)
    for found, expected in zip(gradients(twin, torch.bfloat16), gradients(fused, torch.bfloat16), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-3)
    for (name, found), expected in zip(twin.named_buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3, msg=name)


@models.compiles
@pytest.mark.slow
def test_compiled_by_default_settings() -> None:
    """torch.compile(model) and nothing else: whole training steps by Inductor."""
    torch._dynamo.reset()
    fused, eager = both(torch.float32)
    compiled = torch.compile(fused)
    optimizers = [torch.optim.SGD(model.parameters(), 0.01, momentum=0.9) for model in (fused, eager)]
    for step in range(3):
        input, target = batch(step, torch.float32)
        for model, optimizer in zip((compiled, eager), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(input), target).backward()
            optimizer.step()
    torch.testing.assert_close(fused.state_dict(), eager.state_dict(), rtol=1e-3, atol=1e-4)


# DataParallel


@contextlib.contextmanager
def copies_for_devices() -> Iterator[None]:
    """nn.parallel.replicate without GPUs: what it sends to them is copied instead."""

    def copied(tensors: list[Tensor], devices: list[Any], detach: bool = False) -> list[list[Tensor]]:
        return [[tensor.detach().clone() if detach else tensor.clone() for tensor in tensors] for _ in devices]

    with mock.patch("torch.nn.parallel.replicate._broadcast_coalesced_reshape", copied):
        yield


def test_data_parallel_replicas() -> None:
    """nn.DataParallel runs replicas without parameters, whose gradients reach the original."""
    fused, eager = both()
    input, target = batch(0)
    for model in (fused, eager):
        with copies_for_devices():
            replicas = nn.parallel.replicate(model, [0, 1])
        outputs = [replica(part) for replica, part in zip(replicas, input.chunk(2), strict=True)]
        nn.functional.cross_entropy(torch.cat(outputs), target).backward()
    for found, expected in zip(fused.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
