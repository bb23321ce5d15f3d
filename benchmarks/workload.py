"""What is run: a case in one setting, its inputs, and what a correct provider computes for the first of them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.providers.base import Setting
from benchmarks.providers.steps import differentiated, make_step
from resfuse import contract
from resfuse.calibration import calibrate_

CHECKED = 2
"""Images whose outputs and input gradients are compared with float64; batch statistics are of all of them."""
CALIBRATION = 4
SLACK = 10.0
"""How many times eager's error is still rounding: other systems round elsewhere, but beyond this they are wrong."""

Results = dict[str, Tensor]
Batch = tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A case with `state`, and the results for its first batch in float64."""

    case: Case
    setting: Setting
    state: dict[str, Tensor]
    output_shape: tuple[int, ...]
    exact: Results
    eager_errors: dict[str, float]

    def module(self) -> nn.Module:
        """A new module, in train or eval mode as the setting says."""
        with torch.device("meta"):
            module = self.case.build()
        state = {key: tensor.clone() for key, tensor in self.state.items()}
        module.load_state_dict(state, assign=True)
        return module.train(self.setting.mode == "train")

    def batches(self, count: int) -> list[Batch]:
        """The first `count` batches (NCHW), what a step takes apart from `Provider.convert`: the same in each process.

        Inputs first, then what only training has: labels of a model, or the grad_output of a part of one.
        """
        return [self.batch(index) for index in range(count)]

    def batch(self, index: int) -> Batch:
        """One of them."""
        setting = self.setting
        inputs = _inputs(self.case, setting, seed=index)
        if setting.mode == "inference":
            return inputs
        generator = torch.Generator(setting.device).manual_seed(1000 + index)
        if setting.level == "model":
            size, classes = self.output_shape
            return *inputs, torch.randint(classes, (size,), generator=generator, device=setting.device)
        grad_output = torch.randn(self.output_shape, generator=generator, device=setting.device)
        return *inputs, grad_output.to(setting.dtype)

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


def make_workload(case: Case, setting: Setting) -> Workload:
    """A case with random weights and the batch norms of a trained network, on random numbers.

    Parameters and inputs are rounded to what the setting runs in before anything is computed from them.

    Raises:
        MemoryError: the device has no room for the computation in float64.
    """
    torch.manual_seed(0)
    module = case.build().to(setting.device)
    size = min(CALIBRATION, case.inputs[0][0])
    inputs = _inputs(case, dataclasses.replace(setting, mode="train", dtype=torch.float32), seed=-1)
    calibrate_(module, *(tensor.detach()[:size] for tensor in inputs))
    module.to(setting.parameter_dtype)
    with torch.no_grad():
        output = module.eval()(*(tensor.detach().to(setting.parameter_dtype)[:1] for tensor in inputs))
    state = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    shape = (case.inputs[0][0], *output.shape[1:])
    workload = Workload(case, setting, state, shape, exact={}, eager_errors={})
    try:
        workload = dataclasses.replace(workload, exact=_compute(workload, double=True))
        return dataclasses.replace(workload, eager_errors=workload.errors(_compute(workload)))
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"no room for the computation in float64 that results are compared with ({error})") from error


def first_results(step: Callable[..., Any], module: nn.Module, batch: tuple[Any, ...], workload: Workload) -> Results:
    """The quantities that are compared, from one step.

    Args:
        step: see `benchmarks.providers.base.Step`.
        module: what was handed to the provider, whose parameters have the gradients.
        batch: the step's arguments; in training at least the module's inputs are tensors.
        workload: the case and its setting.
    """
    return collect(step(*batch), module, batch, workload.setting)


def collect(output: Any, module: nn.Module, batch: tuple[Any, ...], setting: Setting) -> Results:
    """The quantities that are compared, by name, from what a step returned."""
    if setting.mode == "inference":
        return {"output": torch.as_tensor(output)[:CHECKED]}
    if setting.level == "model":
        # The gradient of the first parameter has come through all of the model.
        gradient = next(module.parameters()).grad
        assert gradient is not None
        return {"loss": torch.as_tensor(output), "gradient": gradient.clone()}
    inputs = batch[:-1]
    leaves = differentiated(inputs, module)
    names = [name for name, tensor in zip(("input", "residual"), inputs, strict=False) if tensor.requires_grad]
    names += [name for name, _ in module.named_parameters()]
    result, *gradients = output
    assert len(gradients) == len(leaves) == len(names)
    pictures = len(leaves) - len(list(module.parameters()))
    parts = [gradient[:CHECKED] if index < pictures else gradient for index, gradient in enumerate(gradients)]
    return {"output": result[:CHECKED], **{f"grad {name}": part for name, part in zip(names, parts, strict=True)}}


def summarise_errors(errors: Mapping[str, float]) -> dict[str, float]:
    """The largest of each kind: "output", "loss" and "gradient"."""
    kinds: dict[str, float] = {}
    for quantity, error in errors.items():
        kind = "gradient" if quantity.startswith("grad ") else quantity
        kinds[kind] = max(error, kinds.get(kind, 0.0))
    return kinds


def describe_errors(errors: Mapping[str, float]) -> str:
    """For messages."""
    return ", ".join(f"{quantity} {error:.1e}" for quantity, error in errors.items())


def _inputs(case: Case, setting: Setting, seed: int) -> Batch:
    """Images in the dtype of the parameters, or what a layer before has put out; leaves, in the training of a part."""
    generator = torch.Generator(setting.device).manual_seed(100 + seed)
    dtype = setting.parameter_dtype if case.image else setting.dtype
    found = []
    for shape in case.inputs:
        tensor = torch.randn(shape, generator=generator, device=setting.device).to(dtype)
        found.append(tensor.requires_grad_(needs_gradient(case, setting)))
    return tuple(found)


def needs_gradient(case: Case, setting: Setting) -> bool:
    """Whether a step computes the gradient of its inputs."""
    return setting.mode == "train" and setting.level != "model" and not case.image


def _compute(workload: Workload, double: bool = False) -> Results:
    """What eager PyTorch computes, in float64 if `double`; moved to the CPU."""
    module, batch, setting = workload.module(), workload.batch(0), workload.setting
    if setting.mode == "inference":
        batch = tuple(tensor[:CHECKED] for tensor in batch)
    if double:
        module = copy.deepcopy(module).double()
        batch = tuple(_widened(tensor) if tensor.is_floating_point() else tensor for tensor in batch)
        setting = dataclasses.replace(setting, dtype=torch.float32)  # no autocast
    step = make_step(module, setting)
    return {name: tensor.detach().cpu() for name, tensor in collect(step(*batch), module, batch, setting).items()}


def _widened(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_(tensor.requires_grad)
