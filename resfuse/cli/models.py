"""Whole models, fused and eager: what `verify --model` and the demo's second half compare."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

import resfuse
from resfuse import contract
from resfuse.calibration import calibrate_
from resfuse.surgery.report import FuseReport

EAGER, EAGER_CHANNELS_LAST, FUSED = "eager", "eager, channels_last", "fused"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def missing_packages() -> list[str]:
    """The packages that this module needs and that are not installed."""
    needed = {"torchvision": "torchvision", "sklearn": "scikit-learn"}
    return [package for module, package in needed.items() if importlib.util.find_spec(module) is None]


def photographs(count: int, size: int) -> Tensor:
    """`count` crops, (count, 3, size, size), normalised for ImageNet, of the two photographs in scikit-learn."""
    from sklearn.datasets import load_sample_images

    generator = torch.Generator().manual_seed(0)
    crops = []
    pictures = [torch.from_numpy(picture.copy()).float() / 255 for picture in load_sample_images().images]
    for index in range(count):
        picture = pictures[index % len(pictures)]
        top, left = (int(torch.randint(extent - size + 1, (), generator=generator)) for extent in picture.shape[:2])
        crops.append(picture[top : top + size, left : left + size].permute(2, 0, 1))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (torch.stack(crops) - mean) / std


def calibrated(name: str, images: Tensor) -> nn.Module:
    """A torchvision model with random weights, and the running statistics and affine parameters of a trained one.

    Raises:
        ValueError: torchvision has no such model.
    """
    from torchvision import models

    torch.manual_seed(0)
    return calibrate_(models.get_model(name, weights=None).to(images.device), images)


def versions(model: nn.Module) -> tuple[dict[str, nn.Module], FuseReport]:
    """The model as it is, with channels_last weights, and fused (the last two are copies); and what was fused."""
    fused = copy.deepcopy(model)
    report = resfuse.fuse_(fused)
    models = {
        EAGER: model,
        EAGER_CHANNELS_LAST: copy.deepcopy(model).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        FUSED: fused,
    }
    return models, report


def layout_for(version: str, images: Tensor) -> Tensor:
    """Images in the memory format that suits a version, which for all but plain eager is channels_last."""
    return images if version == EAGER else images.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def outputs(models: Mapping[str, nn.Module], images: Tensor) -> dict[str, Tensor]:
    """What each version computes for the same images."""
    return {name: model(layout_for(name, images)) for name, model in models.items()}


@torch.no_grad()
def exact_output(model: nn.Module, images: Tensor) -> Tensor:
    """The model computed in float64."""
    return copy.deepcopy(model).double()(images.double())


def deviations(name: str, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, contract.Deviation]]:
    """Hold a fused torchvision model against the contract, in eval and in train mode; yields (mode, deviation)."""
    images = photographs(8, 96).to(device)
    model = calibrated(name, images).to(dtype)
    images = images.to(dtype)
    for training in (False, True):
        mode = "training" if training else "inference"
        exact = _results(copy.deepcopy(model).double(), images.double(), training)
        found = {
            version: _results(candidate, layout_for(version, images), training)
            for version, candidate in versions(model)[0].items()
        }
        for quantity in exact:
            eager = [found[EAGER][quantity], found[EAGER_CHANNELS_LAST][quantity]]
            floor = contract.floor_of(dtype, device, convolution=True)
            yield mode, contract.measure(quantity, found[FUSED][quantity], eager, exact[quantity], dtype, floor=floor)


@torch.no_grad()
def _results(model: nn.Module, images: Tensor, training: bool) -> dict[str, Tensor]:
    """Output and, in training, all running statistics in one vector each."""
    model = copy.deepcopy(model).train(training)
    found = {"output": model(images)}
    if training:
        buffers = dict(model.named_buffers())
        for statistic in ("running_mean", "running_var"):
            found[statistic] = torch.cat([value for name, value in buffers.items() if name.endswith(statistic)])
    return found
