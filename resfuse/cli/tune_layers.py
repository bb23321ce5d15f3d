"""The convolutions of a network, as the problems that the Triton kernels are tuned for."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from resfuse.backends.triton.problems import KINDS, ConvProblem, Kind, Precision

CIFAR = "cifar_resnet"
"""The residual networks for 32x32 images of He et al. 2015: 16, 32 and 64 channels, of any depth."""


def layer_problems(
    model: str,
    batches: Iterable[int],
    dtype: torch.dtype,
    *,
    kinds: Iterable[Kind] = KINDS,
    size: int = 224,
    precision: Precision = "ieee",
) -> list[ConvProblem]:
    """Every distinct convolution of a network, in each of the kinds, at each batch size.

    Args:
        model: a name of torchvision's, or `cifar_resnet`.
        batches: images per batch.
        dtype: of input and weight.
        kinds: forward, train, dgrad, wgrad; the gradient of the images themselves is not among them.
        size: height and width of the images, except for `cifar_resnet`.
        precision: of float32.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
        ValueError: torchvision has no such model.
    """
    layers = _cifar_layers() if model == CIFAR else _torchvision_layers(model, size)
    problems = [
        ConvProblem(kind, dtype, batch, *layer, precision=precision)  # type: ignore[arg-type]
        for batch in batches
        for kind in kinds
        for index, layer in enumerate(layers)
        if not (kind == "dgrad" and index == 0)
    ]
    return list(dict.fromkeys(problems))


def tile_problem(problem: ConvProblem) -> ConvProblem:
    """The problem that a configuration is chosen for: where kernels pack groups or taps, that of the packed ones."""
    from resfuse.backends.triton import conv_plan, grad_plan

    plan = conv_plan if problem.kind in ("forward", "train") else grad_plan
    return plan.tile_problem(problem)


# (h, w, c, k, r, s, stride, padding, dilation, groups), as `ConvProblem` has them
_Layer = tuple[int, int, int, int, int, int, tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


def _cifar_layers() -> list[_Layer]:
    def layer(size: int, c: int, k: int, kernel: int, stride: int) -> _Layer:
        return (size, size, c, k, kernel, kernel, (stride, stride), (kernel // 2, kernel // 2), (1, 1), 1)

    layers = [layer(32, 3, 16, 3, 1), layer(32, 16, 16, 3, 1)]
    for size, c in ((32, 16), (16, 32)):  # the first block of a stage halves the image; option B's projection is 1x1
        layers += [layer(size, c, 2 * c, 3, 2), layer(size, c, 2 * c, 1, 2), layer(size // 2, 2 * c, 2 * c, 3, 1)]
    return layers


@functools.cache
def _torchvision_layers(name: str, size: int) -> list[_Layer]:
    from torchvision.models import get_model

    layers: dict[_Layer, None] = {}

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d)
        if isinstance(module.padding, tuple):
            _, c, h, w = inputs[0].shape
            k, _, r, s = module.weight.shape
            layers[h, w, c, k, r, s, module.stride, module.padding, module.dilation, module.groups] = None

    with torch.device("meta"), torch.no_grad():
        model = get_model(name, weights=None).eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(record)
        model(torch.empty(2, 3, size, size))
    return list(layers)
