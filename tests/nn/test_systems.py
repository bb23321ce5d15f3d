"""The modules of `resfuse.nn` under autocast, conversion, tracing, transforms, torch.compile and pickle."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

import resfuse.nn as rnn
from tests import models
from tests.models import reloaded
from tests.nn.pairs import Called, Eager, Everything, assert_module_matches, own_block, pair


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_autocast(frozen: bool, training: bool) -> None:
    """The dtypes of eager everywhere: frozen norms promote to float32, an addition rounds to the output's dtype."""
    bns = [FrozenBatchNorm2d(8) if frozen else nn.BatchNorm2d(8) for _ in range(2)]
    eager, fused = zip(*(pair(nn.Conv2d(8, 8, 3, padding=1), bn) for bn in bns), strict=True)

    def run(models_: tuple[nn.Module, ...], input: Tensor, residual: Tensor) -> list[Tensor]:
        hidden = models_[0].train(training)(input)
        return [hidden, models_[1].train(training)(hidden, residual), models_[1](input, residual)]

    input = models.random_input((2, 8, 5, 5))
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (run(pair_, input, input) for pair_ in (eager, fused))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_sync_conversion_keeps_the_activation() -> None:
    for activation in ("relu", "identity"):
        eager = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU() if activation == "relu" else nn.Identity())
        models.randomise(eager)
        fused = nn.Sequential(rnn.BNAct2d(6, activation=activation))
        fused[0].load_state_dict(eager[0].state_dict())
        weight = fused[0].weight
        for model in (copy.deepcopy(fused), reloaded(fused), fused):
            synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
            assert isinstance(synced[0], nn.SyncBatchNorm)
            assert list(synced.state_dict()) == list(eager.state_dict())
            twin = copy.deepcopy(eager).double()
            models.assert_same(synced.double(), twin, models.random_input((2, 6, 5, 5)))
            models.assert_same(synced.eval(), twin.eval(), models.random_input((2, 6, 5, 5)))
        assert synced[0].weight is weight


def test_sync_conversion_of_others_is_left_alone() -> None:
    rnn.BNAct2d(4)
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(4))) is nn.SyncBatchNorm
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(BatchNormAct2d(4))) is nn.SyncBatchNorm


def test_lazy_modules() -> None:
    fused = Called(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU())
    input = models.random_input((2, 6, 5, 5))
    fused(input)  # materialises
    eager = Eager(*map(copy.deepcopy, (fused.conv, fused.bn, fused.act)))
    assert_module_matches(fused, eager, input)


def test_torch_func() -> None:
    block, eager = own_block("basic").eval(), models.block("basic").eval()
    input = models.block_input("basic", batch=3)
    parameters = {name: 2 * tensor.detach() for name, tensor in block.named_parameters()}

    def loss(model: nn.Module) -> Callable[..., Tensor]:
        return lambda state, image: torch.func.functional_call(model, state, (image.unsqueeze(0),)).square().mean()

    found, expected = (
        torch.func.vmap(torch.func.grad(loss(model)), (None, 0))(parameters, input) for model in (block, eager)
    )
    torch.testing.assert_close(found, expected)
    found, expected = (torch.func.functional_call(model, parameters, (input,)) for model in (block, eager))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # used by torch's own formulas
def test_forward_mode_gradients() -> None:
    block, eager = own_block("basic").eval(), models.block("basic").eval()
    input, tangent = models.block_input("basic", seed=1), models.block_input("basic", seed=2)
    found, expected = (torch.func.jvp(model, (input,), (tangent,)) for model in (block, eager))
    torch.testing.assert_close(found, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(input, tangent)
        output = torch.autograd.forward_ad.unpack_dual(block(dual)).tangent
    torch.testing.assert_close(output, expected[1])


def test_meta_and_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    block = own_block("bottleneck-stride")
    shape = block(models.block_input("bottleneck-stride")).shape
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert block.eval()(mode.from_tensor(models.block_input("bottleneck-stride"))).shape == shape
    for training in (True, False):
        meta = block.to("meta").train(training)
        assert meta(models.block_input("bottleneck-stride").to("meta")).shape == shape


@models.compiles
@pytest.mark.slow
def test_compile_with_inductor_every_module() -> None:
    torch._dynamo.reset()
    model = models.seeded(Everything)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True)
    for training in (True, False, True):
        model.train(training), twin.train(training)
        input = models.random_input((2, 3, 32, 32))
        torch.testing.assert_close(compiled(input), model(input), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=1e-4, atol=1e-4)


def test_pickle_and_deepcopy() -> None:
    for module in (own_block("basic-stride"), rnn.ConvBNAct2d(16, 8, 3), rnn.PreActBasicBlock(16, 16), rnn.AddReLU()):
        for twin in (reloaded(module), copy.deepcopy(module)):
            assert type(twin) is type(module)
            torch.testing.assert_close(twin.state_dict(), module.state_dict())
