"""The timed steps of all providers whose module PyTorch runs, and the float64 results that providers are held to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.case import Case, Setting

Step = Callable[..., Any]
"""Takes a batch (inputs; then labels for "train", grad_output for "backward" and "full") and returns its results.

inference, forward: the output.  backward: the gradients.  full: (output, *gradients).  train: the loss.
Gradients are those of the inputs that require one, then of all parameters.
"""
Batch = tuple[Tensor, ...]

# Small steps: the weights must stay where they are, or the work would change while it is timed.
LEARNING_RATE, MOMENTUM = 1e-4, 0.9
CHECKED = 2
"""Images whose outputs and input gradients are compared with float64; batch statistics are of all images."""
SLACK = 10.0
"""Times eager's error: other systems round elsewhere, but beyond this factor they are wrong."""


def make_step(module: nn.Module, setting: Setting) -> Step:
    """The step of a module that is in the provider's layout, fused or compiled; sets train or eval mode."""
    module.train(setting.trains)
    if setting.mode == "inference":
        return torch.inference_mode()(lambda *inputs: module(*inputs))
    if setting.mode == "train":
        return _training_step(module, setting)
    parameters = tuple(module.parameters())

    def forward(*inputs: Tensor) -> Tensor:
        with setting.autocast():
            output: Tensor = module(*inputs)
        return output

    def full(*batch: Tensor) -> tuple[Tensor, ...]:
        *inputs, grad_output = batch
        output = forward(*inputs)
        leaves = (*(tensor for tensor in inputs if tensor.requires_grad), *parameters)
        return output.detach(), *torch.autograd.grad(output, leaves, grad_output)

    graphs: dict[int, Tensor] = {}

    def backward(*batch: Tensor) -> tuple[Tensor, ...]:
        *inputs, grad_output = batch
        if id(inputs[0]) not in graphs:
            graphs[id(inputs[0])] = forward(*inputs)
        leaves = (*(tensor for tensor in inputs if tensor.requires_grad), *parameters)
        return torch.autograd.grad(graphs[id(inputs[0])], leaves, grad_output, retain_graph=True)

    return {"forward": forward, "full": full, "backward": backward}[setting.mode]


def _training_step(model: nn.Module, setting: Setting) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)

    def train(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with setting.autocast():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return train


def named_results(results: Any, module: nn.Module, batch: Batch, setting: Setting) -> dict[str, Tensor]:
    """The results of a step by name; those of a model's training step include the gradients on the parameters."""
    mode = setting.mode
    if mode in ("inference", "forward"):
        return {"output": torch.as_tensor(results)[:CHECKED].detach()}
    if mode == "train":
        gradients = {f"grad {name}": parameter.grad for name, parameter in module.named_parameters()}
        return {
            "loss": torch.as_tensor(results),
            **{name: grad for name, grad in gradients.items() if grad is not None},
        }
    tensors = list(results)
    found = {"output": tensors.pop(0)[:CHECKED]} if mode == "full" else {}
    for name, tensor in zip(("input", "residual"), batch[:-1], strict=False):
        if tensor.requires_grad:
            found[f"grad {name}"] = tensors.pop(0)[:CHECKED]
    names = [f"grad {name}" for name, _ in module.named_parameters()]
    return found | dict(zip(names, tensors, strict=True))


class Workload(NamedTuple):
    """A case in a setting with its weights, and what a correct provider computes for the first batch."""

    case: Case
    setting: Setting
    state: dict[str, Tensor]
    output_shape: tuple[int, ...]
    exact: dict[str, Tensor] = {}  # noqa: RUF012
    """Results in float64, on the CPU."""
    eager_errors: dict[str, float] = {}  # noqa: RUF012

    def module(self) -> nn.Module:
        """A new module with the weights of the workload."""
        with torch.device("meta"):
            module = self.case.build()
        module.load_state_dict({key: tensor.clone() for key, tensor in self.state.items()}, assign=True)
        return module.train(self.setting.trains)

    def batch(self, index: int) -> Batch:
        """The arguments of a step (NCHW); the same in each process."""
        setting = self.setting
        batch = _inputs(self.case, setting, seed=index)
        generator = torch.Generator(setting.device).manual_seed(1000 + index)
        if setting.mode == "train":
            size, classes = self.output_shape
            return *batch, torch.randint(classes, (size,), generator=generator, device=setting.device)
        if setting.mode in ("backward", "full"):
            grad_output = torch.randn(self.output_shape, generator=generator, device=setting.device)
            return *batch, grad_output.to(setting.dtype)
        return batch

    def errors(self, results: Mapping[str, Tensor]) -> dict[str, float]:
        """Relative distance of every result from float64, by the norm; infinite for one that is missing."""
        return {
            name: _relative_error(results[name].cpu(), exact) if name in results else float("inf")
            for name, exact in self.exact.items()
        }

    def complaint(self, errors: Mapping[str, float]) -> str | None:
        """The first error that is more than rounding, in words; None where there is none."""
        from resfuse import contract

        floor = contract.floor_of(self.setting.dtype, self.setting.device, convolution=True)
        for name, error in errors.items():
            limit = SLACK * (self.eager_errors[name] + floor)
            if not error <= limit:
                return f"wrong: {name} is off by {error:.1e}; eager by {self.eager_errors[name]:.1e}, limit {limit:.1e}"
        return None


def make_workload(case: Case, setting: Setting) -> Workload:
    """A case with random weights and the batch norms of a trained network, and its results in float64.

    Parameters and inputs are rounded to the dtype of the setting before anything is computed from them.
    """
    torch.manual_seed(0)
    module = case.build().to(setting.device)
    inputs = [tensor.detach()[:4] for tensor in _inputs(case, setting._replace(dtype=torch.float32), seed=-1)]
    calibrate_(module, *inputs)
    module.to(setting.parameter_dtype)
    with torch.no_grad():
        output = module(*(tensor[:1].to(setting.parameter_dtype) for tensor in inputs))
    state = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    workload = Workload(case, setting, state, (case.shapes[0][0], *output.shape[1:]))
    workload = workload._replace(exact=_eager(workload, double=True))
    return workload._replace(eager_errors=workload.errors(_eager(workload)))


@torch.no_grad()
def calibrate_(module: nn.Module, *inputs: Tensor) -> None:
    """Give batch norms random weights and biases and the statistics of these inputs; leaves the module in eval mode.

    Fresh batch norms (mean 0, variance 1, weight 1, bias 0) would hide a mistake in any of the four.
    """
    norms = [child for child in module.modules() if isinstance(child, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
        norm.momentum = None  # the plain mean over batches
    module.train()(*inputs)
    for norm in norms:
        norm.momentum = 0.1
    module.eval()


def _relative_error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def _inputs(case: Case, setting: Setting, seed: int) -> Batch:
    generator = torch.Generator(setting.device).manual_seed(100 + seed)
    dtype = setting.parameter_dtype if case.image else setting.dtype
    needs_grad = setting.trains and not case.image
    return tuple(
        torch.randn(shape, generator=generator, device=setting.device).to(dtype).requires_grad_(needs_grad)
        for shape in case.shapes
    )


def _eager(workload: Workload, double: bool = False) -> dict[str, Tensor]:
    """Results of eager PyTorch for the first batch, moved to the CPU."""
    module, batch, setting = workload.module(), workload.batch(0), workload.setting
    if setting.mode == "inference":
        batch = tuple(tensor[:CHECKED] for tensor in batch)
    if double:
        module = copy.deepcopy(module).double()
        batch = tuple(_widened(tensor) if tensor.is_floating_point() else tensor for tensor in batch)
        setting = setting._replace(dtype=torch.float64)
    results = make_step(module, setting)(*batch)
    return {name: tensor.detach().cpu() for name, tensor in named_results(results, module, batch, setting).items()}


def _widened(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_(tensor.requires_grad)
