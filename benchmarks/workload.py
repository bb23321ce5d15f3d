"""What is run: a model, its batches, and what a correct provider computes for the first of them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.providers.base import Setting
from resfuse import contract
from resfuse.cli.models import calibrated

INPUTS = 4
"""Batches that take turns."""
CHECKED = 2
"""Images whose outputs are compared with float64; in training, where the others matter to each, all are."""
CALIBRATION = 4
SLACK = 10.0
"""How many times eager's error is still rounding: other systems round elsewhere, but beyond this they are wrong."""

Results = dict[str, Tensor]
Batch = tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model with `state`, its batches (NCHW), and the results for the first batch in float64."""

    name: str
    setting: Setting
    state: dict[str, Tensor]
    batches: list[Batch]
    exact: Results
    eager_errors: dict[str, float]

    @property
    def shape(self) -> torch.Size:
        """Of a batch of images."""
        return self.batches[0][0].shape

    def model(self) -> nn.Module:
        """A new model."""
        return _build(self.name, self.state, self.setting.device)

    def limit(self, quantity: str) -> float:
        """The largest error of a result that is correct."""
        floor = contract.floor_of(self.setting.dtype, self.setting.device, convolution=True)
        return SLACK * (self.eager_errors[quantity] + floor)

    def errors(self, results: Results) -> dict[str, float]:
        """Relative distance of each quantity from float64, by the norm."""
        return {name: contract.relative_error(results[name].cpu(), exact) for name, exact in self.exact.items()}

    def save(self, path: Path) -> None:
        torch.save({field.name: getattr(self, field.name) for field in dataclasses.fields(self)}, path)

    @classmethod
    def load(cls, path: Path) -> Workload:
        """Of a file that this program wrote."""
        return cls(**torch.load(path, weights_only=False))


def make_workload(name: str, batch: int, size: int, setting: Setting) -> Workload:
    """A torchvision model with random weights and the batch norms of a trained one, on images of random numbers.

    The parameters and images are rounded to what the setting runs in before anything is computed from them.
    """
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(batch, 3, size, size, generator=generator) for _ in range(INPUTS)]
    model = calibrated(name, torch.randn(CALIBRATION, 3, size, size, generator=generator))
    model.to(setting.device, setting.parameter_dtype)
    batches: list[Batch] = [(image.to(setting.device, setting.parameter_dtype),) for image in images]
    if setting.mode == "train":
        with torch.no_grad():
            classes = model(batches[0][0][:1]).shape[1]
        labels = [torch.randint(classes, (batch,), generator=generator).to(setting.device) for _ in images]
        batches = [(*images, target) for images, target in zip(batches, labels, strict=True)]
    state = copy.deepcopy(model.state_dict())
    wide = tuple(part.double() if part.is_floating_point() else part for part in batches[0])
    exact = _compute(copy.deepcopy(model).double(), wide, setting.mode)
    with setting.autocast() if setting.mode == "train" else nullcontext():
        eager = _compute(model, batches[0], setting.mode)
    workload = Workload(name, setting, state, batches, exact, eager_errors={})
    return dataclasses.replace(workload, eager_errors=workload.errors(eager))


def first_results(
    step: Callable[..., Any], parameter: nn.Parameter, batch: tuple[Any, ...], setting: Setting
) -> Results:
    """The quantities that are compared, from one step.

    Args:
        step: see `benchmarks.providers.base.Step`.
        parameter: the model's first, whose gradient has come through all of it.
        batch: the step's arguments.
        setting: what the step was prepared for.
    """
    output = torch.as_tensor(step(*batch))
    if setting.mode == "inference":
        return {"output": output[:CHECKED]}
    assert parameter.grad is not None
    return {"loss": output, "gradient": parameter.grad.clone()}


def describe_errors(errors: Mapping[str, float]) -> str:
    """For messages."""
    return ", ".join(f"{quantity} {error:.1e}" for quantity, error in errors.items())


def _compute(model: nn.Module, batch: Batch, mode: str) -> Results:
    """What eager PyTorch computes; moved to the CPU."""
    if mode == "inference":
        with torch.no_grad():
            return {"output": model.eval()(batch[0][:CHECKED]).cpu()}
    loss = F.cross_entropy(model.train()(batch[0]), batch[1])
    loss.backward()
    gradient = next(model.parameters()).grad
    assert gradient is not None
    return {"loss": loss.detach().cpu(), "gradient": gradient.cpu()}


def _build(name: str, state: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    from torchvision import models

    with torch.device("meta"):
        model = models.get_model(name, weights=None)
    model.load_state_dict({key: tensor.to(device) for key, tensor in state.items()}, assign=True)
    return model
