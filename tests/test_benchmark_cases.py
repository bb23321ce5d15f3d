"""What the benchmarks run: the layers and blocks are those of the networks, and resfuse fuses all of them."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")

from resfuse.calibration import calibrate_

import resfuse
from benchmarks.cases import Case, make_cases, networks
from benchmarks.cases.modules import ConvSpec, PreActBlock
from resfuse import contract, models
from resfuse.surgery.fused import is_fused

NETWORKS = ("resnet18", "resnet50")


def occurrences(case: Case) -> int:
    """How often a case is in its network, which its name says."""
    found = re.fullmatch(r"\S+ \S+ x(\d+)", case.name)
    assert found, case.name
    return int(found[1])


@pytest.mark.parametrize(("name", "distinct"), [("resnet18", 15), ("resnet50", 24), ("cifar_resnet20", 9)])
def test_the_layers_are_all_of_the_network(name: str, distinct: int) -> None:
    cases = make_cases("layer", [name], 2)
    assert len(cases) == distinct
    network = networks.build_unweighted(name)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert sum(occurrences(case) for case in cases) == len(convolutions)
    weights = sum(occurrences(case) * sum(p.numel() for p in case.build().parameters()) for case in cases)
    others = sum(p.numel() for p in network.fc.parameters())  # type: ignore[union-attr]
    assert weights + others == sum(p.numel() for p in network.parameters())


def test_layers_with_a_residual_are_the_ends_of_the_blocks() -> None:
    residual = [case for case in make_cases("layer", ["resnet50"], 1) if len(case.inputs) == 2]
    assert sum(occurrences(case) for case in residual) == 3 + 4 + 6 + 3
    assert residual[0].inputs == ((1, 64, 56, 56), (1, 256, 56, 56))
    assert all("conv3" in case.name for case in residual)
    (stem,) = (case for case in make_cases("layer", ["resnet50"], 1) if case.image)
    assert stem.inputs == ((1, 3, 224, 224),)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_blocks_are_all_of_the_network(name: str) -> None:
    cases = [case for case in make_cases("block", [name], 2) if not case.name.startswith("preactivation")]
    network = networks.build_unweighted(name)
    blocks = [module for module in network.modules() if networks.is_block(module)]
    assert sum(occurrences(case) for case in cases) == len(blocks)
    assert len(cases) == (7 if name == "resnet18" else 8)
    for case in cases:
        with torch.device("meta"):
            assert case.build()(torch.empty(case.inputs[0])).shape[0] == 2


def everything() -> list[Case]:
    """Every operator, layer and block, on small images."""
    return [
        case for level in ("op", "layer", "block") for case in make_cases(level, [*NETWORKS, "cifar_resnet20"], 2, 32)
    ]


def test_every_case_is_fused_as_a_whole() -> None:
    for case in everything():
        with torch.device("meta"):
            module = case.build()
        report = resfuse.fuse_(module)
        assert report.fused, case.name
        assert not report.left, f"{case.name}: {report}"
        assert any(map(is_fused, module.modules()))


def test_fused_operators_compute_what_the_plain_modules_compute() -> None:
    for case in make_cases("op", [], 2, 32):
        torch.manual_seed(0)
        inputs = [torch.randn(shape) for shape in case.inputs]
        before = [tensor.clone() for tensor in inputs]
        module = calibrate_(case.build(), *inputs)
        with torch.no_grad():
            plain = module(*inputs)
            resfuse.fuse_(module)
            fused = module(*inputs)
        assert contract.relative_error(fused, plain.double()) < 1e-5, case.name
        assert all(map(torch.equal, inputs, before)), f"{case.name} writes into its inputs"


def test_a_layer_has_the_shapes_it_says() -> None:
    spec = ConvSpec(6, 8, 3, stride=2, padding=1, groups=2, extent=(7, 5), residual=True)
    input, residual = (torch.randn(shape) for shape in spec.shapes(3))
    assert spec.build().eval()(input, residual).shape == residual.shape == (3, 8, 4, 3)


def test_the_cifar_network_is_that_of_resfuse() -> None:
    torch.manual_seed(0)
    plain, own = networks.build("cifar_resnet20"), models.cifar_resnet(20)
    own.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(own.eval()(images), plain.eval()(images), rtol=1e-4, atol=1e-5)
    report = resfuse.fuse_(plain)
    assert not report.left
    assert sum(module.kind == "torchvision BasicBlock" for module in report.fused) == 9
    with torch.no_grad():
        torch.testing.assert_close(own(images), plain(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "own"),
    [
        ((8, 8), resfuse.nn.PreActBasicBlock(8, 8)),
        ((8, 16, 2), resfuse.nn.PreActBasicBlock(8, 16, 2, nn.Conv2d(8, 16, 1, 2, bias=False))),
        ((16, 16, 1, 4), resfuse.nn.PreActBottleneck(16, 4)),
        ((16, 32, 2, 8), resfuse.nn.PreActBottleneck(16, 8, 2, nn.Conv2d(16, 32, 1, 2, bias=False))),
    ],
    ids=["basic", "basic / 2", "bottleneck", "bottleneck / 2"],
)
def test_preactivation_blocks_are_those_of_resfuse(arguments: tuple[int, ...], own: nn.Module) -> None:
    plain = PreActBlock(*arguments)
    body = list(plain.body)
    convolutions = [module for module in body if isinstance(module, nn.Conv2d)]
    norms = [plain.preact[0], *(module for module in body if isinstance(module, nn.BatchNorm2d))]  # type: ignore[index]
    state = {}
    for index, (conv, norm) in enumerate(zip(convolutions, norms, strict=True), start=1):
        state |= {f"conv{index}.{key}": value for key, value in conv.state_dict().items()}
        state |= {f"bn{index}.{key}": value for key, value in norm.state_dict().items()}
    if plain.shortcut is not None:
        state["downsample.weight"] = plain.shortcut.weight
    own.load_state_dict(state)
    input = torch.randn(2, arguments[0], 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(own.train()(input), plain.train()(input), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cifar_resnet21", "cifar_resnet2", "cifar_resnet", "cifar20"])
def test_names_of_cifar_networks_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"expected cifar_resnet followed by 6n \\+ 2.*{name}"):
        make_cases("model", [name], 1)


def test_bad_cases_are_refused() -> None:
    with pytest.raises(ValueError, match="resnet19"):
        make_cases("model", ["resnet19"], 1)
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        make_cases("op", [], 0)
    with pytest.raises(ValueError, match="size: expected at least 1, got -1"):
        make_cases("layer", ["resnet18"], 1, -1)


def test_models_have_the_images_they_are_made_for() -> None:
    resnet, cifar = (make_cases("model", [name], 4)[0] for name in ("resnet18", "cifar_resnet110"))
    assert resnet.inputs == ((4, 3, 224, 224),)
    assert cifar.inputs == ((4, 3, 32, 32),)
