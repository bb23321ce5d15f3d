"""What is run at each level: operators, layers, blocks and models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

from torch import nn

from benchmarks.cases import networks
from benchmarks.cases.case import Case
from benchmarks.cases.modules import AddReLU, BNAddReLU, ConvSpec, PreActBlock, bn_relu
from benchmarks.providers.base import Level

__all__ = ["Case", "make_cases"]

_CONV = functools.partial(ConvSpec, stride=1, padding=0, groups=1)
_OPERATORS: tuple[tuple[str, Callable[[], nn.Module], tuple[tuple[int, ...], ...]], ...] = (
    ("bn_act stage 1", functools.partial(bn_relu, 64), ((64, 56, 56),)),
    ("bn_act stage 1 + residual", functools.partial(BNAddReLU, 256), ((256, 56, 56),) * 2),
    ("add_relu stage 1", AddReLU, ((256, 56, 56),) * 2),
    ("add_relu stage 4", AddReLU, ((2048, 7, 7),) * 2),
)
_CONVOLUTIONS = {
    "conv_bn_act 1x1 reduce": _CONV(256, 64, 1, extent=(56, 56)),
    "conv_bn_act 3x3": _CONV(64, 64, 3, padding=1, extent=(56, 56)),
    "conv_bn_act 1x1 expand + residual": _CONV(64, 256, 1, extent=(56, 56), residual=True),
    "conv_bn_act 3x3 stride 2": _CONV(128, 128, 3, stride=2, padding=1, extent=(56, 56)),
    "conv_bn_act 3x3 deep": _CONV(512, 512, 3, padding=1, extent=(7, 7)),
}
_PREACTIVATION = {
    # inplanes, outplanes, stride, mid: the first and the second stage's beginnings of ResNet-18 and ResNet-50
    "preactivation basic 64": ((64, 64, 1, None), (64, 56, 56)),
    "preactivation basic 64-128 / 2": ((64, 128, 2, None), (64, 56, 56)),
    "preactivation bottleneck 256": ((256, 256, 1, 64), (256, 56, 56)),
    "preactivation bottleneck 256-512 / 2": ((256, 512, 2, 128), (256, 56, 56)),
}


def make_cases(level: Level, models: Sequence[str], batch: int, size: int | None = None) -> list[Case]:
    """All cases of a level.

    Args:
        level: "op": the operators on shapes of ResNet-50; "layer": every distinct layer of the networks; "block": every
            distinct residual block, and pre-activation blocks; "model": the networks.
        models: the networks; operators do not ask for them.
        batch: images of an input.
        size: height and width of the images; those that a network is made for if None.  Operators and pre-activation
            blocks have sizes of their own, an eighth of them where `size` is less than 224.

    Raises:
        ValueError: there is no such network, or `batch` or `size` is not positive.
    """
    for name, value in (("batch", batch), ("size", size)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if level == "op":
        return list(_operators(batch, size))
    found = {"layer": _layers, "block": _blocks, "model": _models}[level]
    cases = [case for name in models for case in found(name, batch, size or networks.native_size(name))]
    return [*cases, *_preactivation(batch, size)] if level == "block" else cases


def _operators(batch: int, size: int | None) -> Iterator[Case]:
    for name, spec in _CONVOLUTIONS.items():
        spec = ConvSpec(**{**vars(spec), "extent": _smaller(spec.extent, size)})
        yield Case("op", name, spec.shapes(batch), spec.build)
    for name, build, shapes in _OPERATORS:
        yield Case("op", name, tuple((batch, shape[0], *_smaller(shape[1:], size)) for shape in shapes), build)


def _layers(name: str, batch: int, size: int) -> Iterator[Case]:
    for spec, paths in networks.layer_specs(name, size).items():
        yield Case("layer", _title(name, paths[0], len(paths)), spec.shapes(batch), spec.build, spec.in_channels == 3)


def _blocks(name: str, batch: int, size: int) -> Iterator[Case]:
    for path, (shape, count) in networks.block_paths(name, size).items():
        build = functools.partial(networks.build_block, name, path)
        yield Case("block", _title(name, path, count), ((batch, *shape),), build)


def _preactivation(batch: int, size: int | None) -> Iterator[Case]:
    for name, (arguments, shape) in _PREACTIVATION.items():
        extent = _smaller(shape[1:], size)
        yield Case("block", name, ((batch, shape[0], *extent),), functools.partial(PreActBlock, *arguments))


def _models(name: str, batch: int, size: int) -> Iterator[Case]:
    networks.build_unweighted(name)  # a name that does not exist is an error now, not in the middle of a run
    yield Case("model", name, ((batch, 3, size, size),), functools.partial(networks.build, name), image=True)


def _title(network: str, path: str, count: int) -> str:
    return f"{network} {path} x{count}"


def _smaller(extent: tuple[int, ...], size: int | None) -> tuple[int, int]:
    height, width = extent
    if size is None or size >= networks.SIZE:
        return height, width
    return max(1, height // 8), max(1, width // 8)
