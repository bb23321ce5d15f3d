"""`fuse_` on timm's families: what is fused in each, what is called as it is, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import BlurPool2d, DropBlock2d, DropPath, StdConv2d, create_attn, create_conv2d
from timm.layers.norm_act import BatchNormAct2d, GroupNormAct
from timm.models import resnet as v1
from timm.models import resnetv2 as v2
from timm.models.sknet import SelectiveKernelBasic
from torch import Tensor, nn

from tests import models
from tests.models import both, calls_by_kind

IMAGE = (2, 3, 48, 48)
NARROW = {"layers": [1, 1, 1, 1], "num_classes": 5, "channels": (8, 16, 16, 24)}


def resnet(block: str = "Bottleneck", **options: Any) -> nn.Module:
    return v1.ResNet(getattr(v1, block), **{**NARROW, **options}, zero_init_last=False)


def attentive(block: str, attention: str, **options: Any) -> nn.Module:
    return resnet(block, block_args={"attn_layer": attention}, **options)


def resnetv2(**options: Any) -> nn.Module:
    return v2.ResNetV2(
        layers=[1, 2, 1, 1], channels=(32, 32, 48, 64), num_classes=5, stem_chs=16,
        **{"conv_layer": create_conv2d, "norm_layer": BatchNormAct2d, **options},
    )  # fmt: skip


def drawn_alike(model: Any, input: Tensor) -> Tensor:
    """A call whose random numbers are the same each time."""
    torch.manual_seed(5)
    return model(input)


STEM, V2 = "ResNet", "ResNetV2"
BASIC, BOTTLENECK, PRE_BASIC, PRE = "BasicBlock", "Bottleneck", "PreActBasic", "PreActBottleneck"

# Model -> the calls of each kind, and the reasons why something is left.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], dict[str, int], set[str]]] = {
    "resnet, basic": (lambda: resnet("BasicBlock"), {STEM: 1, BASIC: 8, "Sequential": 4}, set()),
    "resnet-d": (
        lambda: resnet(stem_type="deep", stem_width=8, avg_down=True),
        {STEM: 1, BOTTLENECK: 12, "Sequential": 2 + 4},
        set(),
    ),
    "resnext": (
        lambda: resnet(cardinality=4, base_width=32), {STEM: 1, BOTTLENECK: 12, "Sequential": 4}, set(),
    ),
    "seresnet": (
        lambda: attentive("Bottleneck", "se"), {STEM: 1, BOTTLENECK: 4 * 4, "Sequential": 4}, set(),
    ),
    "ecaresnet-d": (
        lambda: attentive("Bottleneck", "eca", stem_type="deep", stem_width=8, avg_down=True),
        {STEM: 1, BOTTLENECK: 4 * 4, "Sequential": 2 + 4},
        set(),
    ),
    "anti-aliased": (
        lambda: resnet(aa_layer=BlurPool2d), {STEM: 1, BOTTLENECK: 4 * 3, "Sequential": 4}, set(),
    ),
    "drop-path": (
        lambda: resnet(drop_path_rate=0.5), {STEM: 1, BOTTLENECK: 3 + 3 * 4, "Sequential": 4}, set(),
    ),
    "drop-block": (
        lambda: resnet("BasicBlock", drop_block_rate=0.3),
        {STEM: 1, BASIC: 4 * 2, "Sequential": 4},
        set(),
    ),
    "SiLU": (
        lambda: attentive("Bottleneck", "se", act_layer=nn.SiLU),
        {STEM: 1, BOTTLENECK: 4 * 3, "Sequential": 4},  # the addition has no ReLU to be fused with
        {"activation is SiLU: applied after the fused conv + bn"},
    ),
    "resnetv2": (resnetv2, {V2: 1, PRE: 5 * 3}, set()),
    "resnetv2, basic": (lambda: resnetv2(basic=True), {V2: 1, PRE_BASIC: 5 * 2}, set()),
    "resnetv2-d": (
        lambda: resnetv2(stem_type="deep", avg_down=True), {V2: 1, PRE: 5 * 3, "Sequential": 2}, set(),
    ),
    "skresnet": (
        lambda: v1.ResNet(
            SelectiveKernelBasic, **NARROW, block_args={"sk_kwargs": {"rd_ratio": 0.25, "split_input": True}}
        ),
        {STEM: 1, "ConvNormAct": 4 * 3, "SelectiveKernelAttn": 4, "Sequential": 4},
        set(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_eager(family: str) -> None:
    build, calls, left = FAMILIES[family]
    report = models.assert_equal_before_and_after(build, IMAGE, drawn_alike)
    assert calls_by_kind(report) == calls
    assert {module.reason for module in report.left} == left


# Options -> the calls, and the reasons why something is left.
OTHER_LAYERS: dict[str, tuple[dict[str, Any], int, set[str]]] = {
    "GroupNorm": ({"norm_layer": lambda channels, **kw: GroupNormAct(channels, num_groups=4, **kw)}, 0, set()),
    "SiLU": (
        {"norm_layer": lambda channels, **options: BatchNormAct2d(channels, act_layer=nn.SiLU, **options)},
        5 * 2,
        {"activation is SiLU: applied after the fused conv + bn", "no convolution before it and no ReLU behind it"},
    ),
    "weight standardisation": ({"conv_layer": StdConv2d}, 16, {"StdConv2d is not exactly Conv2d"}),
}


@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_resnetv2_with_other_layers(name: str) -> None:
    options, calls, reasons = OTHER_LAYERS[name]
    fused, eager, report = both(lambda: resnetv2(**options))
    assert report.fused_ops == calls
    assert {module.reason for module in report.left} == reasons
    models.assert_same(fused.double(), eager.double(), models.random_input(IMAGE))


BLOCKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "se": (lambda: v1.Bottleneck(32, 8, attn_layer="se"), 32),
    "se-basic": (lambda: v1.BasicBlock(16, 16, attn_layer="se"), 16),
    "eca": (lambda: v1.Bottleneck(32, 8, attn_layer="eca"), 32),
    "aa": (lambda: v1.Bottleneck(16, 4, 2, models.projection(16, 16, 2), aa_layer=BlurPool2d), 16),
    "preact": (lambda: v2.PreActBottleneck(16, 16, conv_layer=create_conv2d, norm_layer=BatchNormAct2d), 16),
    "preact-basic": (lambda: v2.PreActBasic(16, 16, conv_layer=create_conv2d, norm_layer=BatchNormAct2d), 16),
    "preact-projection": (
        lambda: v2.PreActBottleneck(
            16, 32, stride=2, conv_layer=create_conv2d, norm_layer=BatchNormAct2d, proj_layer=v2.DownsampleConv
        ),
        16,
    ),
}


def inner_modules() -> list[tuple[str, str]]:
    return [
        (block, name)
        for block in ("se", "se-basic", "aa", "preact", "preact-projection")
        for name, _ in BLOCKS[block][0]().named_modules()
        if name
    ]


@pytest.mark.parametrize(("block", "name"), inner_modules())
def test_hook_inside_of_a_block_fires(block: str, name: str) -> None:
    build, channels = BLOCKS[block]
    fused, eager, _ = both(build)
    seen: list[list[Tensor]] = [[], []]
    for found, model in zip(seen, (fused.double(), eager.double()), strict=True):
        model.get_submodule(name).register_forward_hook(lambda _, args, out, found=found: found.append(out.clone()))
    models.assert_same(fused, eager, models.random_input((2, channels, 9, 9)))
    assert len(seen[0]) == len(seen[1])
    torch.testing.assert_close(seen[0], seen[1])


def test_block_given_drop_layers_and_attention_later_calls_them() -> None:
    for build in (lambda: v1.Bottleneck(16, 4), lambda: v1.BasicBlock(16, 16)):
        fused, eager, _ = both(build)
        for model in (fused.double(), eager.double()):
            torch.manual_seed(0)
            model.se = create_attn("se", 16).double()
            model.drop_path = DropPath(0.5)
            model.drop_block = DropBlock2d(0.3)
            model.aa = nn.AvgPool2d(3, 1, 1)
        for training in (True, False):
            models.assert_same(
                fused.train(training),
                eager.train(training),
                models.random_input((4, 16, 9, 9)),
                evaluate=drawn_alike,
            )


@pytest.mark.parametrize("name", ["se", "aa", "preact", "preact-projection"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_under_autocast(name: str, dtype: torch.dtype) -> None:
    build, channels = BLOCKS[name]
    fused, eager, _ = both(build)
    input = models.random_input((2, channels, 9, 9), dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = fused(input), eager(input)
    assert output.dtype == expected.dtype
    assert (output - expected).norm() < 0.05 * expected.norm()


def test_input_of_a_block_is_not_overwritten() -> None:
    for build, channels in BLOCKS.values():
        fused, _, _ = both(build)
        input = models.random_input((2, channels, 9, 9))
        kept = input.clone()
        with torch.inference_mode():
            fused.eval()(input)
        assert torch.equal(input, kept)


def test_preactivation_block_under_vmap() -> None:
    """If the shortcut alone has the extra dimension, nothing can be added to the convolution's output in place."""
    fused, eager, _ = both(BLOCKS["preact-projection"][0])
    input = models.random_input((2, 16, 9, 9))
    expected = eager.eval()(input)
    parameters = dict(fused.eval().named_parameters())

    def call(scale: Tensor) -> Tensor:
        scaled = {key: value * scale if "downsample" in key else value for key, value in parameters.items()}
        return torch.func.functional_call(fused, scaled, (input,))

    for output in torch.vmap(call)(torch.ones(2)):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
