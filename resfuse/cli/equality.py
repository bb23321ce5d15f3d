"""Hold whole models, fused by `fuse_`, against the numerical contract: forward, every gradient, running statistics.

Three runs in float32, of the model as it is, with channels_last weights, and fused, are each compared with float64.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import resfuse
from resfuse import contract
from resfuse.cli import models, signs
from resfuse.cli.catalogue import Entry, Evaluate
from resfuse.cli.signs import Flips, Signs
from resfuse.contract import Deviation

IMAGES = (4, 3, 64, 64)
SIGN_FACTOR, SIGN_TOLERANCE = 4.0, 1e-3
"""An argument of a ReLU may have another sign than in float64 if it is small, as a part of the largest one: at most so
many times what eager's are, and this.  A hundred layers make 1e-3 of rounding errors in float32."""
ZERO = 1e-10
"""A gradient whose norm is this part of the largest one is zero, but for rounding."""

Results = dict[str, dict[str, Tensor]]
"""Tensors by name, in groups: the output, gradients, statistics."""


class Comparison(NamedTuple):
    """One model in one mode."""

    entry: Entry
    training: bool
    calls: int
    """Fused calls in a forward pass."""
    flips: int
    """Arguments of ReLUs that had another sign in the fused run than in float64."""
    deviations: list[Deviation]

    @property
    def worst(self) -> Deviation:
        """What has used up most of its allowance."""
        return max(self.deviations, key=lambda deviation: deviation.used)


def compare(entry: Entry, images: Tensor | None = None) -> Iterator[Comparison]:
    """A model in training and then in inference.

    Args:
        entry: the model, and how it is run.
        images: (N, 3, H, W) in float32; random ones if None.

    Raises:
        RuntimeError: a state_dict does not load into the model with or without `fuse_`, or a ReLU is missing.
    """
    if images is None:
        images = torch.randn(IMAGES, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    eager = calibrate(entry.build(), entry.evaluate, images)
    # The fused model gets its weights from a state_dict, and gives the eager one's back.
    fused = without_dropout(entry.build())
    report = resfuse.fuse_(fused)
    fused.load_state_dict(eager.state_dict())
    eager.load_state_dict(fused.state_dict())
    versions = {
        models.FUSED: fused,
        models.EAGER: eager,
        models.EAGER_CHANNELS_LAST: copy.deepcopy(eager).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
    }
    for training in (True, False):
        flips, deviations = _deviations(versions, entry.evaluate, images, training)
        yield Comparison(entry, training, report.fused_ops, flips, deviations)


@torch.no_grad()
def calibrate(model: nn.Module, evaluate: Evaluate, images: Tensor) -> nn.Module:
    """Give every batch norm, frozen ones too, the parameters and the statistics of a trained one.

    Fresh ones (mean 0, variance 1, weight 1 or, at the end of a block, 0, bias 0) would hide mistakes.
    """
    without_dropout(model)
    handles = []

    def measure(norm: nn.Module, args: tuple[Tensor]) -> None:
        norm.running_mean.copy_(args[0].mean((0, 2, 3)))  # type: ignore[operator]
        norm.running_var.copy_(args[0].var((0, 2, 3)))  # type: ignore[operator]

    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), Tensor):
            if isinstance(module.weight, Tensor):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)  # type: ignore[arg-type]
            handles.append(module.register_forward_pre_hook(measure))
    evaluate(model.eval(), images)
    for handle in handles:
        handle.remove()
    return model


def without_dropout(model: nn.Module) -> nn.Module:
    """Switch off what is random: other memory formats draw their numbers in another order."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def results(model: nn.Module, evaluate: Evaluate, images: Tensor, training: bool) -> Results:
    """What one forward and one backward pass give; the model itself is left as it is."""
    model = copy.deepcopy(model).train(training)
    images = images.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    output = evaluate(model, images)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype))
    found: Results = {
        "output": {"": output.detach()},
        "gradient of the input": {"": images.grad},  # type: ignore[dict-item]
        "gradients of parameters": {
            name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
        },
    }
    if training:
        for kind in ("running_mean", "running_var", "num_batches_tracked"):
            buffers = {name: buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] == kind}
            found |= {kind: buffers} if buffers else {}
    return found


def _deviations(
    versions: dict[str, nn.Module], evaluate: Evaluate, images: Tensor, training: bool
) -> tuple[int, list[Deviation]]:
    truths = _Truths(versions[models.EAGER], evaluate, images, training)
    errors: dict[str, dict[str, Tensor]] = {}
    flips: dict[str, Flips] = {}
    reference: Results = {}
    for name, model in versions.items():
        with signs.recorded() as recorded:
            found = results(model, evaluate, models.layout_for(name, images), training)
        truth, flips[name] = truths.of(recorded)
        reference = reference or truth
        if found.keys() != truth.keys() or any(found[group].keys() != truth[group].keys() for group in truth):
            raise RuntimeError(f"{name}: other results than eager's in float64")
        errors[name] = {group: _joined(found[group], truth[group], truth[group]) for group in truth}
    deviations = [_sign_deviation(*(flips[name].largest for name in versions))]
    for group, tensors in reference.items():
        exact = _joined(tensors, {}, tensors)
        fused, *eager = (exact + errors[name][group] for name in versions)
        deviations.append(contract.measure(group, fused, eager, exact, images.dtype))
    return flips[models.FUSED].count, deviations


class _Truths:
    """The computation in float64, for the signs of each run."""

    def __init__(self, model: nn.Module, evaluate: Evaluate, images: Tensor, training: bool) -> None:
        self._arguments = copy.deepcopy(model).double(), evaluate, images.double(), training
        self._known: list[tuple[Signs, Results, Flips]] = []

    def of(self, recorded: Signs) -> tuple[Results, Flips]:
        """The results in float64 of the function that a run with these signs differentiated, and where they differ."""
        for known, truth, flips in self._known:
            if signs.same(known, recorded):
                return truth, flips
        with signs.imposed(recorded) as flips:
            truth = results(*self._arguments)
        self._known.append((recorded, truth, flips))
        return truth, flips


def _sign_deviation(fused: float, *eager: float) -> Deviation:
    """The largest arguments of ReLUs that had another sign than in float64, as parts of what they may be."""
    limit = SIGN_FACTOR * max(eager) + SIGN_TOLERANCE
    return Deviation("a ReLU's argument", fused, max(eager), limit, fused, max(eager), limit)


def _joined(tensors: dict[str, Tensor], minus: dict[str, Tensor], scales: dict[str, Tensor]) -> Tensor:
    """The tensors (less others) in one vector, each divided by the norm of a third one, so that all count alike.

    A norm that is zero but for rounding is no measure: there it is the largest of them all.
    """
    norms = {name: torch.linalg.vector_norm(scale.double()).item() for name, scale in scales.items()}
    largest = max(norms.values()) or 1.0
    parts = []
    for name, tensor in tensors.items():
        part = tensor.double() - minus[name].double() if minus else tensor.double()
        parts.append(part.flatten() / (norms[name] if norms[name] > ZERO * largest else largest))
    return torch.cat(parts)
