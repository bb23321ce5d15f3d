"""Networks by name: those of torchvision, timm and `resfuse.models`."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from resfuse import models

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
    cifar = _CIFAR_NAME.fullmatch(architecture)
    shape = _IMAGENET
    if cifar is not None and library in ("", "resfuse"):
        constructor, shape = functools.partial(getattr(models, cifar[1]), int(cifar[2])), _CIFAR
    elif library == "resfuse":
        known = [other for other in models.__all__ if other[0].islower()]
        if architecture not in known or architecture.startswith("cifar"):
            listed = ", ".join(f"{other}N" if other.startswith("cifar") else other for other in known)
            raise ValueError(f"model: resfuse.models has no {architecture!r}; it has {listed}")
        constructor = getattr(models, architecture)
    elif library in ("", "torchvision"):
        zoo = _imported("torchvision.models")
        _check("torchvision", architecture, zoo.list_models())
        constructor = functools.partial(zoo.get_model, architecture, weights=None)
        if architecture in {*zoo.list_models(zoo.detection), *zoo.list_models(zoo.segmentation)}:
            constructor.keywords["weights_backbone"] = None  # or those would be downloaded
    elif library == "timm":
        timm = _imported("timm")
        _check("timm", architecture.partition(".")[0], timm.list_models())  # without the tag of a checkpoint
        constructor = functools.partial(timm.create_model, architecture, pretrained=False)
    else:
        raise ValueError(f"model: expected NAME (of torchvision), timm/NAME or resfuse/NAME, got {name!r}")
    model = _on_meta(constructor) if meta else constructor()
    return Network(model, getattr(model, "default_cfg", {}).get("input_size", shape) if library == "timm" else shape)


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
