"""`fuse_(model, recompute=True)`: less is kept for backward, and every gradient has the same bits as without."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck

import resfuse
from resfuse import fuse_, unfuse_
from resfuse import models as zoo
from resfuse.backends import cpu
from tests import models, shapes
from tests.fuse.styles import STYLES, TRAPS, C

pytestmark = pytest.mark.usefixtures("one_thread")

INPUT = (2, C, 6, 6)
BACKENDS = pytest.mark.parametrize("backend", [name for name in shapes.BACKENDS if "cpu" in shapes.devices_of(name)])


def twins(build: Callable[[], nn.Module], **options: Any) -> tuple[nn.Module, nn.Module]:
    """The same model fused with and without recomputation."""
    plain = models.seeded(build)
    lean = copy.deepcopy(plain)
    fuse_(plain, **options)
    fuse_(lean, recompute=True, **options)
    return lean, plain


def chain() -> nn.Module:
    """Two blocks of each kind behind a stem, one of them with a projection."""
    return nn.Sequential(*models.conv_bn_relu(), *models.chain_of_blocks(), *models.conv_bn_relu(16)[:2])


def kept(run: Callable[[], object], model: nn.Module) -> int:
    """Bytes that are saved for backward, each storage once, parameters and buffers left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # which keeps its address from being used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in storages.values())


def assert_same_bits(lean: nn.Module, plain: nn.Module, input: Tensor, evaluate: models.Evaluate = models.call) -> None:
    found, expected = (models.results(model, input, evaluate=evaluate) for model in (lean, plain))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def drawn_alike(model: Any, input: Tensor) -> Tensor:
    torch.manual_seed(3)
    return model(input)


@pytest.mark.parametrize("name", [*STYLES, *TRAPS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["cpu", "reference"])
def test_every_way_of_writing_a_block(name: str, dtype: torch.dtype) -> None:
    """Between other layers, so that its input and its output are of fused calls, and alone."""
    build = STYLES[name][0] if name in STYLES else TRAPS[name]
    for model in (build, lambda: nn.Sequential(*models.conv_bn_relu(), build(), *models.conv_bn_relu()[1:])):
        lean, plain = (twin.to(dtype) for twin in twins(model))
        input = models.random_input(INPUT, dtype=dtype)
        for training in (True, False):
            try:
                expected = models.results(plain.train(training), input, evaluate=drawn_alike)
            except RuntimeError:  # it writes to what was saved
                continue
            found = models.results(lean.train(training), input, evaluate=drawn_alike)
            assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        input.requires_grad_()
        sizes = [kept(functools.partial(drawn_alike, twin.train(), input), twin) for twin in (lean, plain)]
        assert sizes[0] <= sizes[1] + 2048  # copies of parameters


@BACKENDS
def test_twenty_steps_end_with_the_same_weights(backend: str) -> None:
    """Bit for bit, on every backend."""
    lean, plain = twins(lambda: zoo_like_resnet(4))
    input, target = models.random_input((3, 3, 8, 8)), torch.tensor([1, 0, 2])
    with resfuse.use_backend(backend):
        for model in (lean, plain):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
            for _ in range(20):
                optimizer.zero_grad()
                F.cross_entropy(model(input), target).backward()
                optimizer.step()
    for (name, found), expected in zip(lean.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name


def zoo_like_resnet(width: int) -> nn.Module:
    """A small network of someone else's writing, with projections, for a backend that takes its time."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers += [BasicBlock(width, width), Bottleneck(width, width // 2, 2, models.projection(width, 2 * width, 2))]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 3))


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_kept_bytes(block: type[nn.Module]) -> None:
    """Of the stages raw outputs alone; of the stem, whose pool is PyTorch's, as much as without."""
    lean, plain = twins(lambda: models.small_resnet(block, (2, 2, 2, 2)))
    input = models.random_input((2, 3, 64, 64))
    sizes = [kept(lambda model=model: model(input), model) for model in (lean, plain)]
    assert sizes[0] < 0.75 * sizes[1]


@pytest.mark.parametrize("network", ["resnet50", "cifar_resnet", "cifar_preact_resnet"])
def test_networks_of_resfuse(network: str) -> None:
    """Shortcuts of option A, which are views of what they select from, fall back to saving."""
    options: dict[str, Any] = {"width": 4, "shortcut": "A"}
    build = zoo.resnet50 if network == "resnet50" else lambda **o: getattr(zoo, network)(20, **o)
    plain = models.seeded(lambda: build(**options))
    for more in ({}, {"checkpoint": 2}):
        lean = build(recompute=True, **options, **more)
        lean.load_state_dict(plain.state_dict())
        assert_same_bits(lean, copy.deepcopy(plain), models.random_input((2, 3, 33, 33)))
    images = models.random_input((2, 3, 33, 33))
    lean = build(recompute=True, **options)
    assert kept(lambda: lean(images), lean) < 0.85 * kept(lambda: plain(images), plain)


@BACKENDS
def test_residual_of_fewer_channels(backend: str) -> None:
    shortcut = functools.partial(resfuse.nn.ZeroPadShortcut, 8, 12)
    lean, plain = twins(lambda: nn.Sequential(*models.conv_bn_relu(), resfuse.nn.BasicBlock(8, 12, 1, shortcut())))
    with resfuse.use_backend(backend):
        assert_same_bits(lean, plain, models.random_input(INPUT))
        images = models.random_input(INPUT)
        assert kept(lambda: lean(images), lean) < 0.75 * kept(lambda: plain(images), plain)


def test_a_thousand_layers() -> None:
    """A stage's outputs come back by a loop."""
    lean, plain = twins(lambda: nn.Sequential(*models.conv_bn_relu(4), *(BasicBlock(4, 4) for _ in range(500))))
    assert_same_bits(lean, plain, models.random_input((1, 4, 2, 2)))


@BACKENDS
def test_autocast(backend: str) -> None:
    lean, plain = twins(chain)

    def evaluate(model: Any, input: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(input)

    with resfuse.use_backend(backend):
        assert_same_bits(lean, plain, models.random_input(INPUT), evaluate)


def test_frozen_layers() -> None:
    """Frozen parameters, whole stages, and batch norms in eval() within a model in train()."""

    def freeze(model: Any) -> None:
        model[0].requires_grad_(False)
        model[1].eval()
        model[4].requires_grad_(False)
        model[5].eval()
        model[3].conv1.requires_grad_(False)
        model[3].bn2.requires_grad_(False)
        model[6].bn1.eval()

    lean, plain = twins(chain)
    for model in (lean, plain):
        freeze(model)
    assert_same_bits(lean, plain, models.random_input(INPUT))
    for model in (lean, plain):
        model[:5].requires_grad_(False)  # type: ignore[index]
    images = models.random_input(INPUT)
    found, expected = (model(images).sum() for model in (lean, plain))
    for model, loss in ((lean, found), (plain, expected)):
        model.zero_grad()
        loss.backward()
    for one, other in zip(lean.parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def assert_equal_lists(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("scenario", ["accumulated", "retained", "two forwards", "subset"])
def test_graphs_that_are_used_in_other_ways(scenario: str) -> None:
    found = []
    for model in twins(chain):
        first, second = (models.random_input(INPUT, seed) for seed in (1, 2))
        if scenario == "accumulated":
            for input in (first, second):
                model(input).square().sum().backward()
        elif scenario == "retained":
            loss = model(first).square().sum()
            loss.backward(retain_graph=True)
            loss.backward(retain_graph=True)
            loss.backward()
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                loss.backward()
        elif scenario == "two forwards":
            one, other = model(first), model(second)
            other.square().sum().backward()
            one.square().sum().backward()
        else:  # only what the last layers need, again and again
            loss = model(first).square().sum()
            parameters = list(model.parameters())
            for some in (parameters[-3:], parameters[6:9], parameters[:2], parameters):
                for parameter, grad in zip(some, torch.autograd.grad(loss, some, retain_graph=True), strict=True):
                    parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        found.append(gradients(model))
    assert_equal_lists(*found)


def test_a_long_stage_does_not_come_back_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    lean, _ = twins(lambda: nn.Sequential(*models.conv_bn_relu(4), *(BasicBlock(4, 4) for _ in range(36))))
    made: list[weakref.ref[Tensor]] = []
    alive = []

    def noting(*args: Any) -> Tensor:
        output = apply(*args)
        made.append(weakref.ref(output))
        alive.append(sum(ref() is not None for ref in made))
        return output

    apply = cpu.bn_apply
    monkeypatch.setattr(cpu, "bn_apply", noting)
    lean(models.random_input((1, 4, 2, 2))).sum().backward()
    assert max(alive) <= 16  # 2 sqrt(36), and what the readers hold
    assert len(made) <= 2.5 * (1 + 2 * 36)


def test_memory_is_freed_after_backward() -> None:
    """Nothing is computed again that stays, with retain_graph neither; and a dropped graph needs no collector."""
    lean, _ = twins(chain)
    alive: list[weakref.ref[Tensor]] = []
    apply = cpu.bn_apply

    def noting(*args: Any) -> Tensor:
        output = apply(*args)
        alive.append(weakref.ref(output))
        return output

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "bn_apply", noting)
            loss = lean(models.random_input(INPUT)).sum()
            assert not alive
            loss.backward(retain_graph=True)
        assert len(alive) == 12  # all outputs but the last, each once
        assert not any(ref() is not None for ref in alive)
        feature = lean[0](models.random_input(INPUT))  # type: ignore[index]
        output = lean(models.random_input(INPUT))
        node = weakref.ref(output.grad_fn)
        del output, loss, feature
        assert node() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("partly", [False, True], ids=["", "after a part of backward"])
@pytest.mark.parametrize("what", ["weight", "bias", "input"])
def test_in_place_writes_are_noticed(what: str, partly: bool) -> None:
    """As in eager, where backward needs the value of the forward."""
    lean, _ = twins(lambda: nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(), *models.conv_bn_relu()))
    input = models.random_input(INPUT).to(memory_format=torch.channels_last).requires_grad_() * 1
    loss = lean(input).sum()
    if partly:  # the output of the first call is computed again, and its node does not run
        torch.autograd.grad(loss, lean[2].weight, retain_graph=True)  # type: ignore[index, union-attr]
    with torch.no_grad():
        (input if what == "input" else getattr(lean[0], what)).add_(1)  # type: ignore[index]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class WritesToAnActivation(nn.Module):
    def __init__(self, before: bool, recorded: bool) -> None:
        super().__init__()
        self.first, self.second = models.conv_bn_relu(), models.conv_bn_relu()
        self.before, self.recorded = before, recorded

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.before:
            with contextlib.nullcontext() if self.recorded else torch.no_grad():
                y.mul_(0.5)
        z = self.second(y)
        if not self.before:
            with torch.no_grad():
                y.zero_()
        return z


@pytest.mark.parametrize("recorded", [True, False])
def test_activation_written_to_before_it_is_read(recorded: bool) -> None:
    assert_same_bits(*twins(lambda: WritesToAnActivation(True, recorded)), models.random_input(INPUT))


def test_activation_written_to_after_it_was_read() -> None:
    """It is computed again as it was: right, where eager and the plain model raise."""
    lean, plain = twins(lambda: WritesToAnActivation(False, False))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        models.results(plain, models.random_input(INPUT))
    plain.before, plain.recorded = True, True
    found = models.results(lean, models.random_input(INPUT))
    assert found["grad_input"].abs().sum() > 0


class KeepsAFeature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = models.conv_bn_relu(), models.conv_bn_relu()

    def forward(self, x: Tensor) -> Tensor:
        self.feature = self.first(x)
        return torch.cat([self.second(self.feature), F.max_pool2d(self.feature, 3, 1, 1)], 1)


def test_kept_features_and_other_readers() -> None:
    lean, plain = twins(KeepsAFeature)
    assert_same_bits(lean, plain, models.random_input(INPUT))
    assert torch.equal(lean.feature, plain.feature)
    hooked: list[Tensor] = []
    for model in (lean, plain):
        model.first.register_forward_hook(lambda module, args, output: hooked.append(output))  # type: ignore[union-attr]
    assert_same_bits(lean, plain, models.random_input(INPUT))
    assert torch.equal(*hooked)
    for model in (lean, plain):
        model.first.register_full_backward_hook(lambda module, grads, outputs: hooked.append(outputs[0]))  # type: ignore[union-attr]
    assert_same_bits(lean, plain, models.random_input(INPUT))
    assert torch.equal(hooked[-1], hooked[-3])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_on_top(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([models.conv_bn_relu(), *models.chain_of_blocks()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)  # type: ignore[assignment]
            return x

    assert_same_bits(*twins(Checkpointed), models.random_input(INPUT))


def test_second_derivatives() -> None:
    """create_graph=True computes the activations again as functions of the parameters."""
    found = []
    for model in (*twins(chain), models.seeded(chain)):
        input = models.random_input(INPUT).double().requires_grad_()
        parameters = list(model.double().parameters())
        first = torch.autograd.grad(model(input).square().mean(), [input, *parameters], create_graph=True)
        penalty = torch.stack([grad.square().sum() for grad in first]).sum()
        found.append(torch.autograd.grad(penalty, [input, *parameters]))
    for lean, plain, eager in zip(*found, strict=True):
        torch.testing.assert_close(plain, eager, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(lean, eager, rtol=1e-6, atol=1e-9)


def test_batched_gradients() -> None:
    found = []
    for model in twins(chain):
        output = model.double()(models.random_input(INPUT).double())
        vectors = torch.stack([torch.ones_like(output), models.random_input(tuple(output.shape)).double()])
        found.append(torch.autograd.grad(output, list(model.parameters()), vectors, is_grads_batched=True))
    torch.testing.assert_close(*found)


def test_offloading_hooks_see_what_is_kept() -> None:
    lean, plain = twins(chain)

    def evaluate(model: Any, input: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return model(input)

    assert_same_bits(lean, plain, models.random_input(INPUT), evaluate)


def test_without_gradients_nothing_changes() -> None:
    lean, plain = twins(chain)
    images = models.random_input(INPUT)
    with torch.no_grad():
        assert torch.equal(lean(images), plain(images))
    with torch.inference_mode():
        assert torch.equal(lean.eval()(images), plain.eval()(images))


@models.compiles
def test_compiled_models_leave_it_to_the_partitioner() -> None:
    torch._dynamo.reset()
    lean, plain = twins(chain)
    compiled = torch.compile(lean.double(), backend="aot_eager", fullgraph=True)
    expected, found = (
        models.results(model, models.random_input(INPUT).double()) for model in (plain.double(), compiled)
    )
    for key, tensor in expected.items():
        named = key.replace("grad of ", "grad of _orig_mod.").replace("buffer ", "buffer _orig_mod.")
        torch.testing.assert_close(found[named], tensor, rtol=1e-7, atol=1e-9)


def test_copies_keep_it_and_unfuse_takes_it_away() -> None:
    eager = models.seeded(chain)
    lean, plain = twins(chain)
    images = models.random_input(INPUT)
    size = kept(lambda: lean(images), lean)
    assert size < 0.75 * kept(lambda: plain(images), plain)
    for twin in (copy.deepcopy(lean), models.reloaded(lean)):
        assert kept(lambda twin=twin: twin(images), twin) == size
    unfuse_(lean)
    assert [type(module) for module in lean.modules()] == [type(module) for module in eager.modules()]


def test_blocks_of_resfuse_within_a_fused_model() -> None:
    """It counts for everything that is called within."""

    def build() -> nn.Module:
        return torchvision.models.ResNet(resfuse.nn.BasicBlock, [2, 2, 1, 1], num_classes=3)  # type: ignore[arg-type]

    lean, plain = twins(build)
    images = models.random_input((2, 3, 64, 64))
    assert_same_bits(lean, plain, images)
    assert kept(lambda: lean(images), lean) < 0.9 * kept(lambda: plain(images), plain)
