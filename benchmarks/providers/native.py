"""Providers that run the model in PyTorch: eager, torch.compile and resfuse."""

from __future__ import annotations

import shutil
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resfuse
from benchmarks.providers.base import Provider, Setting, Step, in_layout

# Small steps on few images: the weights must stay where they are, or the work would change while it is timed.
LEARNING_RATE, MOMENTUM = 1e-4, 0.9


def make_step(model: nn.Module, setting: Setting) -> Step:
    """One inference or one training step: forward, cross entropy, backward and SGD with momentum."""
    if setting.mode == "inference":
        model.eval()

        @torch.inference_mode()
        def infer(input: Tensor) -> Tensor:
            return model(input)

        return infer

    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)

    def train(input: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        with setting.autocast():
            loss = F.cross_entropy(model(input), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return train


class Eager(Provider):
    """PyTorch as it is."""

    def prepare(self, model: nn.Module, example: Tensor, setting: Setting) -> Step:
        return make_step(in_layout(model, self.layout), setting)


class Inductor(Provider):
    """torch.compile by its default backend; inference with freezing (weights are constants, folded and packed)."""

    def unavailable_reason(self, setting: Setting) -> str | None:
        if setting.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
            return "Inductor needs a C++ compiler on PATH"
        return None

    def prepare(self, model: nn.Module, example: Tensor, setting: Setting) -> Step:
        compiled = cast(nn.Module, torch.compile(in_layout(model, self.layout)))
        step = make_step(compiled, setting)
        if setting.mode == "inference":
            with torch._inductor.config.patch(freezing=True):  # read while compiling: at the first call
                step(self.convert(example))
        return step


class Resfuse(Provider):
    """The model after `resfuse.fuse_`, with the backend that resfuse chooses itself."""

    packages = ("resfuse",)

    def prepare(self, model: nn.Module, example: Tensor, setting: Setting) -> Step:
        if setting.mode == "inference":
            model.eval()
        resfuse.fuse_(in_layout(model, self.layout))
        return make_step(model, setting)
