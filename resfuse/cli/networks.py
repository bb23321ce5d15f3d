"""Networks by name, without memory for their weights: torchvision's, timm's and those of `resfuse.models`."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

_OF_ANY_DEPTH = re.compile(r"(cifar_(?:preact_)?resnet|cifar_plain)_?(\d+)")
_IMAGENET, _CIFAR = (3, 224, 224), (3, 32, 32)


class Network(NamedTuple):
    """A model and what it is made for."""

    model: nn.Module
    input_shape: tuple[int, int, int]
    """Of one image."""


def build(name: str) -> Network:
    """A network, on the meta device where its constructor allows for that.

    Args:
        name: "resnet50" (torchvision), "timm/resnet50d", "resfuse/resnet50"; with or without "resfuse/"
            "cifar_resnet20" and the like: `resfuse.models.cifar_resnet(20)`.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: it has no such model; the message names similar ones.
    """
    library, _, architecture = name.rpartition("/")
    if library == "resfuse" or (not library and _OF_ANY_DEPTH.fullmatch(architecture)):
        return _own(architecture)
    if library == "timm":
        return _timm(architecture)
    if library in ("", "torchvision"):
        return _torchvision(architecture)
    raise ValueError(f"model: expected NAME (of torchvision), timm/NAME or resfuse/NAME, got {name!r}")


def _own(name: str) -> Network:
    from resfuse import models

    sized = _OF_ANY_DEPTH.fullmatch(name)
    if sized is not None:
        function = getattr(models, sized[1])
        return Network(_without_memory(lambda: function(int(sized[2]))), _CIFAR)
    known = [other for other in models.__all__ if other[0].islower() and other != "complexity"]
    if name not in known or name.startswith("cifar"):
        known = [f"{other}N" if other.startswith("cifar") else other for other in known]
        raise ValueError(_unknown("resfuse.models", name, known, listed=True))
    return Network(_without_memory(getattr(models, name)), _IMAGENET)


def _torchvision(name: str) -> Network:
    _need("torchvision")
    from torchvision import models

    if name not in models.list_models():
        raise ValueError(_unknown("torchvision", name, models.list_models()))
    options = {"weights_backbone": None} if "." not in name and name in _with_backbone(models) else {}
    return Network(_without_memory(lambda: models.get_model(name, weights=None, **options)), _IMAGENET)


def _with_backbone(models: Any) -> set[str]:
    """Those that would download the weights of their backbone."""
    return {*models.list_models(models.detection), *models.list_models(models.segmentation)}


def _timm(name: str) -> Network:
    _need("timm")
    import timm

    if not timm.is_model(name):
        raise ValueError(_unknown("timm", name, timm.list_models()))
    model = _without_memory(lambda: timm.create_model(name, pretrained=False))
    shape: Any = getattr(model, "default_cfg", {}).get("input_size", _IMAGENET)
    return Network(model, tuple(shape))


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"{package} is not installed: pip install {package}")


def _unknown(library: str, name: str, known: Iterable[str], listed: bool = False) -> str:
    known = list(known)
    similar = known if listed else difflib.get_close_matches(name, known, n=5)
    hint = f"; it has {', '.join(similar)}" if listed else f"; similar: {', '.join(similar)}" if similar else ""
    return f"model: {library} has no {name!r}{hint}"


def _without_memory(build: Callable[[], nn.Module]) -> nn.Module:
    try:
        with torch.device("meta"):
            return build()
    except (NotImplementedError, RuntimeError):  # a constructor that reads a value back
        return build()
