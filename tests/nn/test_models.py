"""`resfuse.models`: equal to eager twins and to torchvision, of the papers' size, with clear errors for bad input."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from resfuse import models as zoo
from resfuse.nn import PlainBlock, ZeroPadShortcut
from tests import models
from tests.nn import twins

pytestmark = pytest.mark.usefixtures("one_thread")

TORCHVISION = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
# Narrow and on small images: what is compared is the structure.
NARROW: dict[str, Any] = {"width": 4, "num_classes": 7}

NETWORKS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    **{name: (name, (), {}) for name in (*TORCHVISION, "plain18", "plain34")},
    **{f"{name}-v1": (name, (), {"version": "v1"}) for name in ("resnet50", "resnet101", "resnet152")},
    **{f"{name}-{option}": (name, (), {"shortcut": option}) for name in ("resnet18", "resnet50") for option in "AC"},
    "resnet50-v1-A": ("resnet50", (), {"version": "v1", "shortcut": "A"}),
    "resnet34-A": ("resnet34", (), {"shortcut": "A"}),
    "resnet18-one-channel": ("resnet18", (), {"in_channels": 1}),
    **{f"cifar-resnet{depth}": ("cifar_resnet", (depth,), {}) for depth in (20, 32, 44, 56, 110)},
    **{f"cifar-resnet20-{option}": ("cifar_resnet", (20,), {"shortcut": option}) for option in "BC"},
    **{f"cifar-plain{depth}": ("cifar_plain", (depth,), {}) for depth in (20, 56)},
    **{f"cifar-preact{depth}": ("cifar_preact_resnet", (depth,), {}) for depth in (110, 164)},
    **{f"cifar-preact20-{option}": ("cifar_preact_resnet", (20,), {"shortcut": option}) for option in "AC"},
    **{
        f"cifar-preact29-bottleneck-{option}": ("cifar_preact_resnet", (29, "bottleneck"), {"shortcut": option})
        for option in "ABC"
    },
}


def build(name: str, **more: Any) -> nn.Module:
    function, args, options = NETWORKS[name]
    return getattr(zoo, function)(*args, **options, **more)


def twin(name: str, **more: Any) -> nn.Module:
    function, args, options = NETWORKS[name]
    if function.startswith("cifar"):
        return twins.cifar(function, *args, **options, **more)
    return twins.imagenet(function, **options, **more)


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A narrow network of resfuse and its twin, in float64 and with one random state."""
    eager = models.seeded(lambda: twin(name, **NARROW))
    fused = build(name, **NARROW)
    fused.load_state_dict(eager.state_dict())
    return fused.double(), eager.double()


def image(name: str) -> Tensor:
    """Odd sizes, so that every stride rounds."""
    size = (15, 13) if name.startswith("cifar") else (41, 37)
    return models.random_input((2, NETWORKS[name][2].get("in_channels", 3), *size))


def convolutions(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in model.modules())


def fused_calls(model: nn.Module) -> tuple[int, int]:
    """Numbers of calls of conv_bn_act and bn_act: every batch norm is in one of them."""
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    if not isinstance(model, zoo.CifarPreActResNet):
        return norms, 0
    alone = sum(getattr(module, "bn1", None) is not None for module in model.modules())
    return norms - alone, alone


QUICK = {
    "resnet18", "resnet50", "plain18", "resnet50-v1", "resnet18-A", "resnet50-C", "cifar-resnet20", "cifar-plain20",
    "cifar-preact20-A", "cifar-preact29-bottleneck-B",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in NETWORKS]
)
def test_equals_its_eager_twin(name: str) -> None:
    """Forward, every gradient and the running statistics, in float64, in both modes, and nothing has fallen back."""
    fused, eager = pair(name)
    assert fused.state_dict().keys() == eager.state_dict().keys()
    for training in (True, False):
        with models.counted_calls() as calls:
            models.assert_same(fused.train(training), eager.train(training), image(name))
        assert (calls.conv_bn_act, calls.bn_act) == fused_calls(fused)


@pytest.mark.parametrize("name", ["resnet18-A", "resnet50", "plain18", "cifar-resnet20", "cifar-preact29-bottleneck-B"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_without_gradients(name: str, dtype: torch.dtype) -> None:
    """Blocks then write over their input, on this machine's own backend: as near to the truth as eager is."""
    fused, eager = (model.to(dtype).eval() for model in pair(name))
    truth = copy.deepcopy(eager).double()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            input = image(name).to(dtype)
            expected = truth(input.double())
            for memory_format in (torch.contiguous_format, torch.channels_last):
                given = input.to(memory_format=memory_format)
                kept = given.clone()
                errors = [(model(given) - expected).norm() / expected.norm() for model in (fused, eager)]
                assert errors[0] <= 3 * errors[1] + torch.finfo(dtype).eps
                assert torch.equal(given, kept)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in TORCHVISION]
)
def test_torchvisions_checkpoint(name: str) -> None:
    """The same keys in the same order; state loads in both directions, and the network computes the same."""
    theirs, ours = (empty(getattr(library, name)) for library in (torchvision.models, zoo))
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    with torch.no_grad():
        for i, tensor in enumerate(state.values()):
            fill(tensor, i)
    ours.load_state_dict(state)
    again = empty(getattr(torchvision.models, name))
    again.load_state_dict(ours.state_dict())
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    assert dict(ours.named_children()).keys() == dict(theirs.named_children()).keys()
    with torch.no_grad():
        input = models.random_input((1, 3, 49, 33))
        found, expected = ours.eval()(input), theirs.eval()(input)
        assert expected.isfinite().all() and expected.std() > 0
        assert (found - expected).norm() <= 1e-4 * expected.norm()


def empty(build: Callable[[], nn.Module]) -> nn.Module:
    """A network without the time it takes to initialise."""
    with torch.device("meta"):
        model = build()
    return model.to_empty(device="cpu")


def fill(tensor: Tensor, seed: int) -> None:
    """Values that keep the size of activations, each tensor other ones."""
    if not tensor.is_floating_point():
        tensor.fill_(seed)
    elif tensor.dim() == 4:
        tensor.normal_(0, tensor[0].numel() ** -0.5, generator=torch.Generator().manual_seed(seed))
    else:
        tensor.copy_(torch.linspace(0.1, 0.9, tensor.numel()).view(tensor.shape).roll(seed))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_starts_as_torchvisions(name: str) -> None:
    torch.manual_seed(5)
    theirs = getattr(torchvision.models, name)(num_classes=5, zero_init_residual=True)
    torch.manual_seed(5)
    ours = getattr(zoo, name)(num_classes=5, zero_init_residual=True)
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], tensor), key


def test_resnext_and_wide_resnet() -> None:
    options = {"resnext50_32x4d": {"groups": 32, "width_per_group": 4}, "wide_resnet50_2": {"width_per_group": 128}}
    for name, option in options.items():
        with torch.device("meta"):
            theirs, ours = getattr(torchvision.models, name)(), zoo.resnet50(**option)
        shapes = [[(key, tensor.shape) for key, tensor in model.state_dict().items()] for model in (theirs, ours)]
        assert shapes[0] == shapes[1]


def multiply_adds(function: str, **options: Any) -> int:
    """Of the convolutions and the linear layer, for one image."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        getattr(zoo, function)(**options).eval()(torch.empty(1, 3, 224, 224))
    return counter.get_total_flops() // 2


# He et al. 2016 (arXiv:1512.03385), table 1: FLOPs (multiply-adds) in units of 1e9, with one decimal that is rounded
# for some of the networks and cut off for others.  34 layers are those of figure 3, with shortcuts of option A.
@pytest.mark.parametrize(
    ("name", "options", "paper", "exact"),
    [
        ("resnet18", {}, 1.8, 1_814_073_344),
        ("resnet34", {"shortcut": "A"}, 3.6, 3_644_493_824),
        ("resnet50", {"version": "v1"}, 3.8, 3_857_973_248),
        ("resnet101", {"version": "v1"}, 7.6, 7_570_194_432),
        ("resnet152", {"version": "v1"}, 11.3, 11_282_415_616),
        ("resnet50", {}, None, 4_089_184_256),
        ("plain18", {}, 1.8, 1_794_805_760),
        ("plain34", {}, 3.6, 3_644_493_824),
    ],
)
def test_multiply_adds_of_table_1(name: str, options: dict[str, Any], paper: float | None, exact: int) -> None:
    found = multiply_adds(name, **options)
    assert found == exact
    billions = found / 1e9
    assert paper in (None, round(billions, 1), math.floor(10 * billions) / 10)


# He et al., section 4.2 and table 6 ("A" has no parameters, so the plain twin has as many); for preactivation
# (arXiv:1603.05027) Zagoruyko & Komodakis 2016 (arXiv:1605.07146), table 4.  The counts are in units of 1e6.
PARAMETERS = [
    (zoo.cifar_resnet, 20, 0.27, 269_722),
    (zoo.cifar_resnet, 32, 0.46, 464_154),
    (zoo.cifar_resnet, 44, 0.66, 658_586),
    (zoo.cifar_resnet, 56, 0.85, 853_018),
    (zoo.cifar_resnet, 110, 1.7, 1_727_962),
    (zoo.cifar_resnet, 1202, 19.4, 19_421_274),
    (zoo.cifar_preact_resnet, 110, 1.7, 1_730_522),
    (zoo.cifar_preact_resnet, 164, 1.7, 1_703_258),
    (zoo.cifar_preact_resnet, 1001, 10.2, 10_327_706),
]


@pytest.mark.parametrize(("network", "depth", "millions", "exact"), PARAMETERS)
def test_parameters_of_the_papers(network: Callable[..., nn.Module], depth: int, millions: float, exact: int) -> None:
    with torch.device("meta"):
        model = network(depth)
    assert sum(parameter.numel() for parameter in model.parameters()) == exact
    assert exact / 1e6 == pytest.approx(millions, rel=0.02)
    projections = 0 if network is zoo.cifar_resnet else 2 + (depth > 110)  # they do not count
    assert convolutions(model) + 1 - projections == depth


def test_shortcut_options() -> None:
    """A has no parameters; B projects where the shape changes; C everywhere; plain networks have none."""
    expected = {"A": (0, 3), "B": (3, 0), "C": (8, 0)}
    with torch.device("meta"):
        for option, numbers in expected.items():
            model = zoo.resnet18(shortcut=option)
            shortcuts = [m.downsample for m in model.modules() if getattr(m, "downsample", None) is not None]
            padded = sum(type(module) is ZeroPadShortcut for module in shortcuts)
            assert (len(shortcuts) - padded, padded) == numbers
        plain = zoo.plain18(shortcut="C")
    assert sum(isinstance(module, PlainBlock) for module in plain.modules()) == 8
    assert not any(getattr(module, "downsample", None) for module in plain.modules())


def test_zero_init_residual() -> None:
    """Every block starts as its shortcut."""
    torch.manual_seed(0)
    x = models.random_input((2, 16, 8, 8)).relu()
    block = zoo.cifar_resnet(20, zero_init_residual=True).layer1[0]
    assert torch.equal(block(x), x)
    block = zoo.cifar_preact_resnet(29, "bottleneck", zero_init_residual=True).layer1[1]
    x = models.random_input((2, 64, 8, 8))
    assert torch.equal(block(x), x)
    for model in (zoo.cifar_resnet(20), zoo.cifar_plain(20, zero_init_residual=True)):
        assert all(module.weight.all() for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def test_he_initialisation() -> None:
    torch.manual_seed(0)
    model = zoo.cifar_preact_resnet(110, width=32)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 30_000:
            expected = math.sqrt(2 / (module.out_channels * module.kernel_size[0] ** 2))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: zoo.cifar_resnet(21), r"depth: expected 6n \+ 2 .*got 21"),
        (lambda: zoo.cifar_resnet(2), "depth: .*got 2"),
        (lambda: zoo.cifar_plain(-4), "depth: .*got -4"),
        (lambda: zoo.cifar_preact_resnet(165), r"depth: expected 9n \+ 2 .*got 165"),
        (lambda: zoo.cifar_preact_resnet(111), r"depth: expected 6n \+ 2 .*got 111"),
        (lambda: zoo.cifar_preact_resnet(110, "wide"), "block: .*got 'wide'"),
        (lambda: zoo.resnet50(version="v2"), "version: .*got 'v2'"),
        (lambda: zoo.resnet18(shortcut="D"), "shortcut: .*got 'D'"),
        (lambda: zoo.cifar_resnet(20, shortcut=None), "shortcut: .*got None"),
        (lambda: zoo.cifar_preact_resnet(20, shortcut="b"), "shortcut: .*got 'b'"),
        (lambda: zoo.resnet18(num_classes=0), "num_classes: .*got 0"),
        (lambda: zoo.cifar_resnet(20, in_channels=-3), "in_channels: .*got -3"),
        (lambda: zoo.resnet18(checkpoint=-1), "checkpoint: .*got -1"),
        (lambda: zoo.ResNet(PlainBlock, (1, 2, 3)), r"layers: .*got \(1, 2, 3\)"),
        (lambda: PlainBlock(4, 4, downsample=nn.Identity()), "downsample: expected None.*Identity"),
        (lambda: zoo.cifar_resnet(20)(torch.zeros(1, 1, 8, 8)), "input: expected 3 channels.*got 1"),
    ],
)
def test_bad_input(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_options_reach_the_layers() -> None:
    model = zoo.cifar_resnet(8, in_channels=1, num_classes=3, width=6, norm_layer=lambda n: nn.BatchNorm2d(n, eps=0.5))
    assert all(module.eps == 0.5 for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    assert model(torch.zeros(2, 1, 9, 9)).shape == (2, 3)
    group = zoo.resnet18(width=8, norm_layer=lambda n: nn.GroupNorm(2, n))
    assert group(torch.zeros(2, 3, 33, 33)).shape == (2, 1000)  # no batch norm: the modules are called


def test_torchvisions_helpers_take_it() -> None:
    """A feature pyramid on top, with frozen batch norms, as torchvision builds it of its own networks."""
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.ops.misc import FrozenBatchNorm2d

    backbone = zoo.resnet18(width=8, norm_layer=FrozenBatchNorm2d)
    pyramid = _resnet_fpn_extractor(backbone, 3)
    assert pyramid(torch.zeros(1, 3, 65, 65))["0"].shape == (1, 256, 17, 17)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["resnet18-A", "cifar-resnet20", "cifar-preact29-bottleneck-A", "cifar-preact20-C"])
def test_tracers_see_ordinary_operators(name: str) -> None:
    """torch.fx and torch.jit record the modules; the traced network computes the same."""
    network = models.seeded(lambda: build(name, **NARROW)).eval()
    input = image(name)
    expected = network(input)
    symbolic, traced = torch.fx.symbolic_trace(network), torch.jit.trace(network, input)
    for recorded, operators in ((symbolic, symbolic.code), (traced, str(traced.inlined_graph))):
        torch.testing.assert_close(recorded(input), expected, rtol=1e-4, atol=1e-4)
        assert "resfuse." not in operators.replace("__torch__.resfuse.", "") and "resfuse::" not in operators


def test_parts_of_a_network() -> None:
    """Slices of its Sequentials are Sequentials, and so is what people build of its children."""
    network = zoo.cifar_resnet(20, shortcut="B", width=4, checkpoint=1)
    assert list(network.layer2[1:]) == list(network.layer2)[1:]
    assert type(network.layer2[:2]) is nn.Sequential
    assert list(network.layer2[0].downsample[:1]) == [network.layer2[0].downsample[0]]
    body = nn.Sequential(*list(network.children())[:-2])
    assert body(torch.zeros(2, 3, 8, 8)).shape == (2, 16, 2, 2)
