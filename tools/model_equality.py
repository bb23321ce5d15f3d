"""Whole models, fused by `fuse_`, held against the numerical contract: output, gradients and running statistics.

The model as it is, with channels_last weights, and fused are each run in float32 and compared with float64.

Where a ReLU's argument is zero but for rounding, rounding decides whether an element of the gradient appears or
vanishes, so two correct computations can be far apart; among the millions of arguments in a network there always are
some.  So each run is compared with the float64 computation of the very function that it differentiated: the ReLUs of
the reference pass what they passed in that run (`imposed`), and the arguments at which float64 alone would have
decided otherwise have to be as small as rounding makes them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resfuse
from resfuse import contract, functional
from resfuse.contract import Deviation

Evaluate = Callable[[Any, Tensor], Tensor]
"""Runs a model: its differentiable outputs for images, all in one tensor (N, values)."""
Signs = list[Tensor]
"""The elements of each ReLU's output that were positive, in the order of the calls."""
Results = dict[str, dict[str, Tensor]]
"""Tensors by name, in groups: the output, gradients, statistics."""

IMAGES = (4, 3, 64, 64)
SIGN_FACTOR, SIGN_TOLERANCE = 4.0, 1e-3
"""A ReLU's argument may have another sign than in float64 if it is at most SIGN_FACTOR times as large as those of
eager, plus SIGN_TOLERANCE, relative to the largest: a hundred layers make rounding errors of 1e-3 in float32."""
ZERO = 1e-10
"""A gradient whose norm is this part of the largest one is zero, but for rounding."""


class Comparison(NamedTuple):
    """One model in one mode."""

    mode: str
    calls: int
    """Fused calls in a forward pass."""
    flips: int
    """ReLU arguments that had another sign in the fused run than in float64."""
    deviations: list[Deviation]

    @property
    def worst(self) -> Deviation:
        """The deviation that used most of its allowance."""
        return max(self.deviations, key=lambda deviation: deviation.used)


def compare(build: Callable[[], nn.Module], evaluate: Evaluate, images: Tensor | None = None) -> Iterator[Comparison]:
    """Compare a model in training and then in inference.

    Args:
        build: makes the model.
        evaluate: runs it.
        images: (N, 3, H, W) in float32; random ones if None.

    Raises:
        RuntimeError: a state_dict does not load into the model with or without `fuse_`, or a ReLU is missing.
    """
    if images is None:
        images = torch.randn(IMAGES, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    eager = calibrate(build(), evaluate, images)
    fused = without_dropout(build())
    report = resfuse.fuse_(fused)
    fused.load_state_dict(eager.state_dict())  # checkpoints load in both directions
    eager.load_state_dict(fused.state_dict())
    channels_last = copy.deepcopy(eager).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for training in (True, False):
        flips, deviations = _deviations((fused, eager, channels_last), evaluate, images, training)
        yield Comparison("training" if training else "inference", report.fused_ops, flips, deviations)


@torch.no_grad()
def calibrate(model: nn.Module, evaluate: Evaluate, images: Tensor) -> nn.Module:
    """Give every batch norm, frozen ones too, random affine parameters and the statistics of the images, in eval mode.

    The 0 and 1 of fresh batch norms would hide mistakes.
    """

    def set_statistics(norm: Any, args: tuple[Tensor]) -> None:
        norm.running_mean.copy_(args[0].mean((0, 2, 3)))
        norm.running_var.copy_(args[0].var((0, 2, 3)))

    handles = []
    for module in without_dropout(model).modules():
        if isinstance(getattr(module, "running_mean", None), Tensor):
            if isinstance(module.weight, Tensor):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)  # type: ignore[arg-type]
            handles.append(module.register_forward_pre_hook(set_statistics))
    evaluate(model.eval(), images)
    for handle in handles:
        handle.remove()
    return model


def without_dropout(model: nn.Module) -> nn.Module:
    """Switch dropout off: its mask depends on the memory format."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _results(model: nn.Module, evaluate: Evaluate, images: Tensor, training: bool) -> Results:
    """The results of a forward and a backward pass; the model itself does not change."""
    model = copy.deepcopy(model).train(training)
    images = images.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    output = evaluate(model, images)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert images.grad is not None
    found = {"output": {"": output.detach()}, "gradient of the input": {"": images.grad}}
    found["gradients of parameters"] = gradients
    if training:
        for kind in ("running_mean", "running_var", "num_batches_tracked"):
            buffers = {name: buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] == kind}
            found |= {kind: buffers} if buffers else {}
    return found


def _deviations(
    versions: tuple[nn.Module, nn.Module, nn.Module], evaluate: Evaluate, images: Tensor, training: bool
) -> tuple[int, list[Deviation]]:
    """(flipped signs of the fused run, deviations) of (fused, eager, eager in channels_last)."""
    exact_model = copy.deepcopy(versions[1]).double()
    truths: list[Results] = []  # float64, by the signs of each run
    errors: list[dict[str, Tensor]] = []
    flips: list[Flips] = []
    for version in versions:
        inputs = images if version is versions[1] else images.contiguous(memory_format=torch.channels_last)
        with recorded() as signs:
            found = _results(version, evaluate, inputs, training)
        with imposed(signs) as flipped:
            truth = _results(exact_model, evaluate, images.double(), training)
        if found.keys() != truth.keys() or any(found[group].keys() != truth[group].keys() for group in truth):
            raise RuntimeError("other gradients or statistics than those of eager in float64")
        errors.append({group: _joined(found[group], truth[group], truth[group]) for group in truth})
        truths.append(truth)
        flips.append(flipped)
    fused, *eager = (one.largest for one in flips)
    limit = SIGN_FACTOR * max(eager) + SIGN_TOLERANCE
    deviations = [Deviation("a ReLU's argument", fused, max(eager), limit, fused, max(eager), limit)]
    for group, tensors in truths[0].items():
        exact = _joined(tensors, {}, tensors)
        fused_result, *eager_results = (exact + error[group] for error in errors)
        deviations.append(contract.measure(group, fused_result, eager_results, exact, images.dtype))
    return flips[0].count, deviations


def _joined(tensors: dict[str, Tensor], minus: dict[str, Tensor], scales: dict[str, Tensor]) -> Tensor:
    """The tensors (less others) in one vector, each divided by the norm of a third one, so that all count alike.

    A norm that is zero but for rounding is no measure; the largest of them all is used instead.
    """
    norms = {name: torch.linalg.vector_norm(scale.double()).item() for name, scale in scales.items()}
    largest = max(norms.values()) or 1.0
    parts = []
    for name, tensor in tensors.items():
        part = tensor.double() - minus[name].double() if minus else tensor.double()
        parts.append(part.flatten() / (norms[name] if norms[name] > ZERO * largest else largest))
    return torch.cat(parts)


# The signs of ReLUs


@contextmanager
def recorded() -> Iterator[Signs]:
    """Record the signs of all ReLUs that are called, alone or as part of a fused call."""
    signs: Signs = []
    depth = 0

    def recording(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **options: Any) -> Tensor:
            nonlocal depth
            depth += 1
            try:
                output = function(*args, **options)
            finally:
                depth -= 1
            linear = options.get("activation") == "identity" or (len(args) > 6 and args[6] is False)
            if not linear and depth == 0:  # not what a backend calls inside
                signs.append(output.detach() > 0)
            return output

        return call

    # Not F.relu: a model in which that is replaced is not fused.
    operators = ((functional, ("packed_conv_bn_act", "bn_act", "add_relu")), (torch, ("relu", "relu_")))
    with ExitStack() as patches:
        # One call may compute several convolutions, whose signs nobody sees.
        patches.enter_context(mock.patch.object(functional, "inference", return_value=None))
        for owner, names in operators:
            for name in names:
                patches.enter_context(mock.patch.object(owner, name, recording(getattr(owner, name))))
        yield signs


class Flips:
    """The imposed signs that differ from the computation's own."""

    count = 0
    largest = 0.0
    """The largest argument with a flipped sign, relative to the largest argument of the same call."""

    def add(self, argument: Tensor, positive: Tensor) -> None:
        flipped = (argument > 0) != positive
        if flipped.any():
            self.count += int(flipped.sum())
            self.largest = max(self.largest, (argument[flipped].abs().max() / argument.abs().max()).item())


@contextmanager
def imposed(signs: Signs) -> Iterator[Flips]:
    """Make PyTorch's ReLUs pass what they passed when the signs were recorded.

    Raises:
        RuntimeError: at the end, if there were more or fewer calls.
    """
    remaining, flips = iter(signs), Flips()

    def relu(input: Tensor, inplace: bool = False) -> Tensor:
        positive = next(remaining, None)
        if positive is None or positive.shape != input.shape:
            raise RuntimeError("more ReLUs, or in another order, than when signs were recorded")
        flips.add(input.detach(), positive)
        return input * positive

    with mock.patch.object(F, "relu", relu):
        yield flips
    if next(remaining, None) is not None:
        raise RuntimeError("fewer ReLUs than when signs were recorded")
