"""What one GPU's step consists of, by the cost model: forward, the backward of each layer, and the update."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

import resfuse
from benchmarks.cases import networks
from benchmarks.scaling.buckets import Gradients
from resfuse.costs import Device

UPDATE_PASSES = 5
"""Over the weights by SGD with momentum: read weight, gradient and momentum, write weight and momentum."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """A training step of one GPU, in seconds, and what it makes to communicate."""

    forward: float
    backward: tuple[Gradients, ...]
    """By layer, the last of the network first."""
    update: float
    norms: tuple[int, ...]
    """Channels of each batch norm."""

    @property
    def seconds(self) -> float:
        return self.forward + self.backward_seconds + self.update

    @property
    def backward_seconds(self) -> float:
        return sum(layer.seconds for layer in self.backward)

    @property
    def gradient_bytes(self) -> int:
        return sum(sum(layer.sizes) for layer in self.backward)

    def scaled(self, seconds: float) -> Profile:
        """The same proportions in a step of so many seconds.

        Raises:
            ValueError: `seconds` is not positive.
        """
        if not seconds > 0:
            raise ValueError(f"step time: expected more than 0 s, got {seconds}")
        factor = seconds / self.seconds
        backward = tuple(Gradients(layer.seconds * factor, layer.sizes) for layer in self.backward)
        return Profile(self.forward * factor, backward, self.update * factor, self.norms)


def roofline_profile(name: str, batch: int, dtype: torch.dtype, device: Device, size: int | None = None) -> Profile:
    """The least that a fused step of a network takes by `resfuse.explain`; the parameters are float32.

    Args:
        name: of `benchmarks.cases.networks`.
        batch: images on one GPU.
        dtype: of the activations.
        device: the GPU, which need not be there.
        size: height and width of the images; those that the network is made for if None.
    """
    model = networks.build_unweighted(name)
    extent = size or networks.native_size(name)
    shape = (batch, 3, extent, extent)
    gradients = _gradients(model)
    model.to(dtype).train()
    forward = resfuse.explain(model, shape, device=device, backward=False)
    both = resfuse.explain(model, shape, device=device, backward=True)
    layers = []
    for alone, whole in zip(forward.layers, both.layers, strict=True):
        sizes = gradients.pop(whole.path, ()) if whole.shape else ()  # a counter of batches has no shape
        layers.append(Gradients(whole.seconds - alone.seconds, sizes))
    assert not gradients, f"layers that are not in the explanation: {', '.join(gradients)}"
    weights = sum(parameter.numel() for parameter in model.parameters()) * torch.float32.itemsize
    norms = tuple(module.num_features for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    return Profile(
        forward.total.seconds, tuple(reversed(layers)), UPDATE_PASSES * weights / device.bandwidth, norms
    )  # fmt: skip


def _gradients(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Bytes of the gradients of each convolution and linear layer, with those of the batch norm after it."""
    found: dict[str, tuple[int, ...]] = {}
    path = ""
    for name, module in model.named_modules():
        own = [parameter.nbytes for parameter in module.parameters(recurse=False)]
        if own and not isinstance(module, nn.BatchNorm2d):
            path = name
        if own:
            found[path] = (*reversed(own), *found.get(path, ()))
    return found
