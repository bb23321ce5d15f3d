"""The dispatcher namespace `resfuse` and how an operator enters it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import torch

from resfuse.backends import registry

_LIBRARY = torch.library.Library("resfuse", "DEF")


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register `resfuse::<schema>` with one implementation for all devices (the registry dispatches) and its fake."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"resfuse::{name}", fake, lib=_LIBRARY)


IN_FORCE = "in force"


def backend_for(
    verb: str,
    input: torch.Tensor,
    conv: tuple[torch.Size, tuple[int, int], tuple[int, int], tuple[int, int], int] | None = None,
    request: str | None = IN_FORCE,
) -> ModuleType:
    """The backend that runs `verb` on a tensor like `input`.

    `request` is a backend's name or None for automatic choice: what was in force at the forward that a backward belongs
    to, or, by default, what is in force now.
    """
    problem = (verb, input.device, input.dtype, input.shape, conv)
    return registry.choose(problem, registry.requested_backend() if request is IN_FORCE else request)[0]


class FunctionContext(Protocol):
    """What PyTorch's context offers and what our `forward` leaves in it for `backward`."""

    saved_tensors: tuple[Any, ...]
    needs_input_grad: tuple[bool, ...]
    backend_request: str | None
    training: bool
    relu: bool
    eps: float
    group: Any
    conv: tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]
    residual_channels: int | None

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None: ...
