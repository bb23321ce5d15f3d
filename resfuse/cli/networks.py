"""Networks by name: those of torchvision, timm and `resfuse.models`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

_CIFAR_NAME = re.compile(r"(cifar_(?:preact_)?resnet|cifar_plain)_?(\d+)")
_IMAGENET, _CIFAR = (3, 224, 224), (3, 32, 32)


class Network(NamedTuple):
    """A model and the shape (C, H, W) of the images it is made for."""

    model: nn.Module
    input_shape: tuple[int, int, int]


def build(name: str, *, meta: bool = True) -> Network:
    """Build a network with random weights; nothing is downloaded.

    Args:
        name: "resnet50" (torchvision), "timm/resnet50d", "resfuse/resnet50"; a depth makes a CIFAR network:
            "cifar_resnet20" is `resfuse.models.cifar_resnet(20)`.
        meta: on the meta device, without memory for weights, where the constructor allows it.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: unknown model; the message lists close names.
    """
    library, _, architecture = name.rpartition("/")
    if library == "resfuse" or (not library and _CIFAR_NAME.fullmatch(architecture)):
        constructor, shape = _resfuse(architecture)
    elif library in ("", "torchvision"):
        constructor, shape = _torchvision(architecture), _IMAGENET
    elif library == "timm":
        constructor, shape = _timm(architecture), _IMAGENET
    else:
        raise ValueError(f"model: expected NAME (of torchvision), timm/NAME or resfuse/NAME, got {name!r}")
    model = _on_meta(constructor) if meta else constructor()
    if library == "timm":
        shape = getattr(model, "default_cfg", {}).get("input_size", _IMAGENET)
    return Network(model, shape)


def _resfuse(name: str) -> tuple[Callable[[], nn.Module], tuple[int, int, int]]:
    from resfuse import models

    cifar = _CIFAR_NAME.fullmatch(name)
    if cifar is not None:
        return lambda: getattr(models, cifar[1])(int(cifar[2])), _CIFAR
    functions = [other for other in models.__all__ if other[0].islower()]
    if name not in functions or name.startswith("cifar"):
        known = ", ".join(f"{other}N" if other.startswith("cifar") else other for other in functions)
        raise ValueError(f"model: resfuse.models has no {name!r}; it has {known}")
    return getattr(models, name), _IMAGENET


def _torchvision(name: str) -> Callable[[], nn.Module]:
    models = _imported("torchvision.models")
    _check("torchvision", name, models.list_models())
    options: dict[str, Any] = {}
    if name in {*models.list_models(models.detection), *models.list_models(models.segmentation)}:
        options["weights_backbone"] = None  # or those would be downloaded
    return lambda: models.get_model(name, weights=None, **options)


def _timm(name: str) -> Callable[[], nn.Module]:
    timm = _imported("timm")
    _check("timm", name.partition(".")[0], timm.list_models())  # without the tag of a checkpoint
    return lambda: timm.create_model(name, pretrained=False)


def _imported(module: str) -> Any:
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"{package} is not installed: pip install {package}")
    return importlib.import_module(module)


def _check(library: str, name: str, known: Iterable[str]) -> None:
    known = list(known)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=5)
        raise ValueError(f"model: {library} has no {name!r}" + (f"; similar: {', '.join(close)}" if close else ""))


def _on_meta(constructor: Callable[[], nn.Module]) -> nn.Module:
    try:
        with torch.device("meta"):
            return constructor()
    except (NotImplementedError, RuntimeError):  # it reads values while it is built
        return constructor()
