"""What both sides run: steps of models, single operators on large tensors, and calls on tiny ones.

A task is plain values, and its tensors are in a file: both sides get the same bits.  Only `run` and `step` touch
`resfuse`, and no more of it than its first release had: `fuse_` and the operators.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODEL, OP, HOST = "model", "op", "host"
CHECKED = 2
"""Images whose outputs are compared."""
# Small steps on few images: the weights must stay where they are, or the work would change while it is timed.
LEARNING_RATE, MOMENTUM = 1e-4, 0.9
EPS = 1e-5

Step = Callable[..., Any]
Tensors = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Task:
    """One thing to run."""

    kind: str
    """model: the time of a step; op: the time of a call on large tensors; host: host time of a call on tiny ones."""
    name: str
    mode: str
    """inference, or train: a model's step with SGD, an operator's call with all gradients."""
    dtype: torch.dtype
    device: str
    shape: tuple[int, ...]
    """Of the input, NCHW."""
    channels_out: int = 0
    kernel: int = 1
    residual: bool = False

    @property
    def trains(self) -> bool:
        return self.mode == "train"

    @property
    def parameter_dtype(self) -> torch.dtype:
        """A model that trains in 16 bits has float32 parameters, under autocast; operators have 16-bit operands."""
        return torch.float32 if self.trains and self.kind == MODEL else self.dtype

    def autocast(self) -> torch.autocast:
        narrow = self.dtype != self.parameter_dtype
        return torch.autocast(self.device, self.dtype if narrow else torch.bfloat16, enabled=narrow)


def build_model(name: str) -> nn.Module:
    """A torchvision model with random weights."""
    from torchvision import models

    return models.get_model(name, weights=None)


def model_step(task: Task, state: Tensors, fused: bool) -> tuple[Step, Callable[[Any], Tensors]]:
    """(a model's step, what of its result is compared)."""
    with torch.device("meta"):
        model = build_model(task.name)
    model.load_state_dict({key: value.to(task.device, copy=True) for key, value in state.items()}, assign=True)
    model.to(memory_format=torch.channels_last).train(task.trains)  # type: ignore[call-overload]
    if fused:
        import resfuse

        resfuse.fuse_(model)
    if not task.trains:
        return torch.inference_mode()(model), lambda output: {"output": output[:CHECKED]}
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)

    def train(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with task.autocast():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def quantities(loss: Tensor) -> Tensors:
        gradient = next(model.parameters()).grad  # which has come through all of the model
        assert gradient is not None
        return {"loss": loss, "gradient": gradient}

    return train, quantities


def op_step(task: Task, tensors: Tensors, fused: bool) -> tuple[Step, Callable[[Any], Tensors]]:
    """(an operator's call on an input and, in training, a grad_output; what of its result is compared)."""
    import resfuse

    held = {name: value.to(task.device, copy=True) for name, value in tensors.items()}
    function = getattr(resfuse, task.name.partition(" ")[0]) if fused else eager
    options: dict[str, Any] = {} if task.name.startswith("add_relu") else {"training": task.trains}
    if task.channels_out:
        options["padding"] = task.kernel // 2
    if not task.trains:
        call = torch.no_grad()(lambda input: function(input, **held, **options))
        return call, lambda output: {"output": output[:CHECKED]}
    names = [name for name in held if not name.startswith("running")]
    leaves = [held[name].requires_grad_() for name in names]

    def differentiate(input: Tensor, grad_output: Tensor) -> tuple[Tensor, ...]:
        output = function(input, **held, **options)
        return output, *torch.autograd.grad(output, [input, *leaves], grad_output)

    def quantities(results: tuple[Tensor, ...]) -> Tensors:
        found = dict(zip(["output", "grad input", *(f"grad {name}" for name in names)], results, strict=True))
        return {name: tensor[:CHECKED] if tensor.dim() == 4 else tensor for name, tensor in found.items()}

    return differentiate, quantities


def prepare(
    task: Task, tensors: Tensors, batches: list[tuple[Tensor, ...]], fused: bool = True
) -> tuple[Step, list[tuple[Tensor, ...]], Callable[[Any], Tensors]]:
    """(what is timed, its arguments in turns, what of a result is compared).

    Args:
        task: what.
        tensors: the state of a model, or the operands of an operator besides its input.
        batches: inputs, and labels or gradients of the output.
        fused: by resfuse; else as eager PyTorch does.
    """
    step, quantities = (model_step if task.kind == MODEL else op_step)(task, tensors, fused)
    moved = [tuple(_in_place(tensor, task) for tensor in batch) for batch in batches]
    if task.trains and task.kind != MODEL:
        for input, *_ in moved:
            input.requires_grad_()
    return step, moved, quantities


def in_double(
    task: Task, tensors: Tensors, batches: list[tuple[Tensor, ...]]
) -> tuple[Task, Tensors, list[tuple[Tensor, ...]]]:
    """The same in float64."""
    widened = [tuple(_widened(tensor) for tensor in batch) for batch in batches]
    without_autocast = dataclasses.replace(task, dtype=torch.float32)
    return without_autocast, {name: _widened(tensor) for name, tensor in tensors.items()}, widened


def eager(
    input: Tensor, conv_weight: Tensor | None = None, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None, *,
    residual: Tensor | None = None, training: bool | None = None, padding: int = 0,
) -> Tensor:  # fmt: skip
    """What the operators stand for; without `training` it is add_relu."""
    output = input if conv_weight is None else F.conv2d(input, conv_weight, padding=padding)
    if training is not None:
        output = F.batch_norm(output, running_mean, running_var, weight, bias, training, 0.0, EPS)
    return torch.relu(output if residual is None else output + residual)


def snapshot(quantities: Tensors) -> Tensors:
    """To be kept and sent."""
    return {name: copy.deepcopy(tensor.detach()).cpu() for name, tensor in quantities.items()}


def _in_place(tensor: Tensor, task: Task) -> Tensor:
    tensor = tensor.to(task.device)
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
