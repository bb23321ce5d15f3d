"""Tables of other libraries' models: what `fuse_` fuses in each, and how exact the fused models are.

python -m tools.model_tables fused                 # docs/models.md: what is fused, in a minute; needs '.[test-models]'
python -m tools.model_tables equality [PATTERN]    # the numerical contract of each model; all take half an hour
"""

from __future__ import annotations

import argparse
import csv
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.misc import Conv2dNormActivation

import resfuse
from resfuse.fuse import FuseReport
from resfuse.nn.batch_norm import is_norm
from tools import model_equality
from tools.model_equality import Evaluate

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
PACKAGES = ("torchvision", "timm", "transformers", "pytorchcv", "segmentation_models_pytorch")

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
WIDE = ("wide_resnet50_2", "wide_resnet101_2")
TORCHVISION = (
    *RESNETS,
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    *WIDE,
    *("regnet_x_400mf", "regnet_x_1_6gf", "regnet_x_3_2gf", "regnet_y_400mf", "regnet_y_1_6gf", "regnet_y_3_2gf"),
)
SEGMENTATION = ("fcn_resnet50", "fcn_resnet101", "deeplabv3_resnet50", "deeplabv3_resnet101")
RCNN = ("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn")
RETINANET = ("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2")
TIMM = (
    *RESNETS,
    *("resnet18d", "resnet34d", "resnet50d", "resnet101d", "resnet26t", "resnet50t", "resnetrs50"),
    *("resnext50_32x4d", "resnext50d_32x4d", "resnext101_32x8d"),
    *WIDE,
    *("seresnet18", "seresnet50", "seresnet152d", "seresnext50_32x4d"),
    *("ecaresnet26t", "ecaresnet50d", "ecaresnetlight"),
    *("resnetaa50", "resnetblur50", "resnet50_gn", "skresnet18"),
    *("resnetv2_18", "resnetv2_34", "resnetv2_50", "resnetv2_101", "resnetv2_18d", "resnetv2_50d", "resnetv2_50t"),
    *("resnetv2_50x1_bit",),
)  # fmt: skip


class Entry(NamedTuple):
    """A model with random weights, and how it is run for a comparison: nothing discrete (such as NMS) in between."""

    family: str
    name: str
    build: Callable[[], nn.Module]
    evaluate: Evaluate

    def __str__(self) -> str:
        return f"{self.family}/{self.name}"


def entries() -> Iterator[Entry]:
    """Every model of the tables; nothing is downloaded."""

    def get(name: str, **options: Any) -> Callable[[], nn.Module]:
        return lambda: torchvision.models.get_model(name, weights=None, **options)

    def backbone(name: str) -> Callable[[], nn.Module]:
        return lambda: resnet_fpn_backbone(backbone_name=name, weights=None, trainable_layers=3)

    for name in TORCHVISION:
        yield Entry("torchvision", name, get(name), flat)
    yield Entry("torchvision", "Conv2dNormActivation stack", stack, flat)
    for name in SEGMENTATION:
        yield Entry("torchvision", name, get(name, weights_backbone=None, aux_loss=True), flat)
    for name in ("resnet18", "resnet50"):
        yield Entry("torchvision", f"{name}_fpn_backbone, frozen BN", backbone(name), flat)
    for name in RCNN:
        yield Entry("torchvision", name, get(name, weights_backbone=None), detect_in_regions)
    for name in RETINANET:
        yield Entry("torchvision", name, get(name, weights_backbone=None), detect_densely)
    for name in TIMM:
        yield Entry("timm", name, lambda name=name: timm.create_model(name, pretrained=False), flat)  # type: ignore[misc]


def stack() -> nn.Module:
    """`Conv2dNormActivation` with each of its options."""
    return nn.Sequential(
        Conv2dNormActivation(3, 24, stride=2, bias=True),
        Conv2dNormActivation(24, 48, groups=4, inplace=False),
        Conv2dNormActivation(48, 64, kernel_size=1, activation_layer=None),
        Conv2dNormActivation(64, 40, dilation=2),
        Conv2dNormActivation(40, 40, activation_layer=nn.SiLU),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(40, 100),
    )


def flat(model: Any, images: Tensor) -> Tensor:
    """The output, or all outputs of a dictionary (of classifiers, or of the levels of a feature pyramid)."""
    return _flattened(model(images))


def detect_densely(model: Any, images: Tensor) -> Tensor:
    """Scores and boxes of a RetinaNet for all anchors."""
    return _flattened(model.head(list(model.backbone(images).values())))


def detect_in_regions(model: Any, images: Tensor) -> Tensor:
    """All outputs of an R-CNN's networks, for fixed regions instead of the proposals that survive a threshold."""
    levels = model.backbone(images)
    scores, deltas = model.rpn.head(list(levels.values()))
    height, width = images.shape[-2:]
    region = images.new_tensor([[0, 0, 0.7 * width, 0.5 * height], [0.2 * width, 0.4 * height, width - 1, height - 1]])
    regions, sizes = [region] * len(images), [(height, width)] * len(images)
    heads = model.roi_heads
    found = [*heads.box_predictor(heads.box_head(heads.box_roi_pool(levels, regions, sizes)))]
    if heads.has_mask():
        found.append(heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(levels, regions, sizes))))
    per_image = [tensor.reshape(len(images), -1) for tensor in found]
    return torch.cat([*(tensor.flatten(1) for tensor in (*scores, *deltas)), *per_image], 1)


def _flattened(outputs: Tensor | Mapping[str, Tensor]) -> Tensor:
    tensors = [outputs] if isinstance(outputs, Tensor) else list(outputs.values())
    return torch.cat([tensor.flatten(1) for tensor in tensors], 1)


# What is fused

INTRODUCTION = """\
# Models

What `resfuse.fuse_(model)` fuses in the models of other libraries. Written by `python -m tools.model_tables fused` with
{versions}; a test checks that it is up to date.

- **norms**: batch norms that are part of a fused call, of all 2-D batch norms.
- **conv + bn**: fused calls that begin with the convolution before the batch norm. The other calls are batch norm +
  ReLU, as in pre-activation networks, and residual + ReLU.
- **adds**: residuals that are added in a fused call, of all that are added to a batch norm or before a ReLU.
- **calls**: fused calls in a forward pass.
- **left**: what is called as it is, how often, and why.

Of timm there is one model of each file that has batch norms. Forward, every gradient and all running statistics of the
residual networks of torchvision and timm, in training and in inference, are held to the
[numerical contract](numerics.md#the-contract) by `python -m tools.model_tables equality`
([results](models-equality.csv)).
"""

MORE_TORCHVISION = (
    *("googlenet", "inception_v3", "densenet121", "vgg16_bn", "shufflenet_v2_x1_0", "mnasnet1_0", "mobilenet_v2"),
    *("mobilenet_v3_large", "efficientnet_b0", "efficientnet_v2_s", "lraspp_mobilenet_v3_large"),
)
PYTORCHCV = (
    *("resnet18", "resnet50", "preresnet18", "resnext50_32x4d", "seresnet50", "densenet121", "dla34", "mobilenetv2_w1"),
    *("resnet20_cifar10", "preresnet20_cifar10", "diaresnet20_cifar10", "wrn16_10_cifar10", "resneta50b", "xception"),
)
SMP = ("Unet", "UnetPlusPlus", "FPN", "DeepLabV3Plus", "PSPNet", "Linknet", "MAnet", "PAN")


def fused_entries() -> Iterator[tuple[str, str, Callable[[], nn.Module]]]:
    """(library, name, constructor) of the models in docs/models.md."""
    for entry in entries():
        yield entry.family, entry.name, entry.build
    for name in MORE_TORCHVISION:
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        options |= {"weights_backbone": None} if name.startswith("lraspp") else {}
        yield "torchvision", name, functools.partial(torchvision.models.get_model, name, weights=None, **options)
    for module in sorted(timm.list_modules()):
        names = [name for name in timm.list_models(module=module) if name not in TIMM]
        if names:
            yield "timm", min(names, key=len), functools.partial(timm.create_model, min(names, key=len))
    import pytorchcv.model_provider
    import segmentation_models_pytorch as smp
    import transformers

    for kind in ("basic", "bottleneck"):
        config = transformers.ResNetConfig(layer_type=kind)
        yield "transformers", f"ResNet, {kind}", functools.partial(transformers.ResNetForImageClassification, config)
    for kind in ("x", "y"):
        config = transformers.RegNetConfig(layer_type=kind)
        yield "transformers", f"RegNet, {kind}", functools.partial(transformers.RegNetForImageClassification, config)
    for name in PYTORCHCV:
        yield "pytorchcv", name, functools.partial(pytorchcv.model_provider.get_model, name)
    for name in SMP:
        build = functools.partial(getattr(smp, name), "resnet34", encoder_weights=None)
        yield "segmentation_models_pytorch", f"{name}, resnet34", build


def page() -> str:
    """docs/models.md."""
    lines = [INTRODUCTION.format(versions=", ".join(f"{name} {version(name)}" for name in PACKAGES))]
    found: dict[str, list[str]] = {}
    for library, name, build in fused_entries():
        try:
            with torch.device("meta"):  # no memory for weights
                model = build()
        except (NotImplementedError, RuntimeError):  # it computes with tensors while it is built
            model = build()
        if any(map(is_norm, model.modules())):
            found.setdefault(library, []).append(row(name, model, resfuse.fuse_(model)))
    for library, rows in found.items():
        head = ["| model | norms | conv + bn | adds | calls | left |", "|---|--:|--:|--:|--:|---|"]
        lines += [f"## {library}\n", *head, *sorted(rows), ""]
    return "\n".join(lines)


def row(name: str, model: nn.Module, report: FuseReport) -> str:
    """One line of the table."""
    left = report.reasons()
    cells = (
        name,
        f"{report.norms - report.left_norms} of {report.norms}",
        str(report.convolutions),
        f"{report.additions} of {report.all_additions}" if report.all_additions else "none",
        str(report.fused_ops),
        "<br>".join(f"{count} x {reason}" if count > 1 else reason for reason, count in left.items()) or "nothing",
    )
    return f"| {' | '.join(cells)} |"


# The numerical contract

NUMBERS = ("fused", "eager", "limit", "fused_max", "eager_max", "limit_max", "used")
"""Fields of a Deviation."""


def equality(patterns: Sequence[str], output: Path | None) -> int:
    """Compare the models whose names contain a pattern, or all; print a line for each, and write the CSV.

    Returns:
        0, or 1 if the contract is broken, a model fails, or no model matches.
    """
    chosen = [entry for entry in entries() if not patterns or any(part in str(entry) for part in patterns)]
    if not chosen:
        print(f"no model has {' or '.join(patterns)} in its name")
        return 1
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    started = time.perf_counter()
    for entry in chosen:
        try:
            for comparison in model_equality.compare(entry.build, entry.evaluate):
                title = f"{entry} ({comparison.calls} fused calls), {comparison.mode}"
                print(f"{title:<72} {comparison.worst.used:4.0%} used, {comparison.worst.quantity}", flush=True)
                problems += [f"{title}: {one}" for one in comparison.deviations if one.violated]
                case = {"family": entry.family, "model": entry.name, "mode": comparison.mode}
                case |= {"fused_calls": comparison.calls, "flipped_signs": comparison.flips}
                for one in comparison.deviations:
                    numbers = {name: f"{getattr(one, name):.3g}" for name in NUMBERS}
                    rows.append({**case, "quantity": one.quantity, **numbers})
        except Exception as error:  # the other models are still compared
            problems.append(f"{entry} failed: {type(error).__name__}: {error}".partition("\n")[0])
    if output is not None and rows:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        print(f"Wrote {output}")
    for problem in problems:
        print(problem)
    outcome = "All keep the contract." if not problems else f"{len(problems)} violations and failures."
    print(f"{len(chosen)} models compared in {time.perf_counter() - started:.0f} s. {outcome}")
    return 1 if problems else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.model_tables", description=(__doc__ or "").split("\n")[0])
    tables = parser.add_subparsers(dest="table", required=True)
    fused = tables.add_parser("fused", help="write docs/models.md")
    fused.add_argument("--output", type=Path, default=PAGE)
    contract = tables.add_parser("equality", help="hold the models against the numerical contract")
    contract.add_argument("pattern", nargs="*", help="only models with this in their name, such as timm/resnetv2")
    contract.add_argument("--output", type=Path, metavar="FILE", help="also write a CSV: docs/models-equality.csv")
    options = parser.parse_args(argv)
    if options.table == "equality":
        return equality(options.pattern, options.output)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(page())
    print(f"Wrote {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
