"""The steps of all providers whose module PyTorch calls: inference, and training of a model or of a part of one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.providers.base import Setting, Step

# Small steps on few images: the weights must stay where they are, or the work would change while it is timed.
LEARNING_RATE, MOMENTUM = 1e-4, 0.9


def make_step(module: nn.Module, setting: Setting) -> Step:
    """What is timed of a module: inference; forward and all gradients; or the training step of a model.

    Args:
        module: put into train or eval mode, otherwise as it is (in the provider's layout, fused, compiled).
        setting: by its level, a training step updates the weights (model) or returns the gradients (others).
    """
    module.train(setting.mode == "train")
    if setting.mode == "inference":
        return _inference(module)
    return _training_step(module, setting) if setting.level == "model" else _gradients(module, setting)


def differentiated(inputs: tuple[Tensor, ...], module: nn.Module) -> tuple[Tensor, ...]:
    """What a step of an op, a layer or a block gives the gradients of, in their order."""
    return (*(tensor for tensor in inputs if tensor.requires_grad), *module.parameters())


def _inference(module: nn.Module) -> Step:
    @torch.inference_mode()
    def infer(*inputs: Tensor) -> Tensor:
        return module(*inputs)

    return infer


def _gradients(module: nn.Module, setting: Setting) -> Step:
    parameters = tuple(module.parameters())

    def differentiate(*arguments: Tensor) -> tuple[Tensor, ...]:
        *inputs, grad_output = arguments
        with setting.autocast():
            output = module(*inputs)
        leaves = (*(tensor for tensor in inputs if tensor.requires_grad), *parameters)
        return output.detach(), *torch.autograd.grad(output, leaves, grad_output)

    return differentiate


def _training_step(model: nn.Module, setting: Setting) -> Step:
    # A captured optimiser has to keep its step count and its momentum on the device: SGD's are there, with foreach.
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)

    def train(images: Tensor, labels: Tensor) -> Tensor:
        # Under a graph the gradients need fixed addresses; those of the captured pool are, once they were allocated.
        optimizer.zero_grad(set_to_none=True)
        with setting.autocast():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return train
