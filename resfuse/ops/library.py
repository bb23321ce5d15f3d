"""The dispatcher namespace `resfuse` and how an operator enters it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from resfuse.backends.dispatch import IN_FORCE, backend_for, through_dispatcher

_LIBRARY = torch.library.Library("resfuse", "DEF")


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register `resfuse::<schema>` with one implementation for all devices, which chooses a backend, and its fake."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"resfuse::{name}", fake, lib=_LIBRARY)


def run_kernel(kernel: str, *args: Any, request: str | None = IN_FORCE) -> Any:
    """A function of the kernel API for the first argument, or its registered operator of the same arguments."""
    if through_dispatcher():
        return getattr(torch.ops.resfuse, kernel)(*args)
    return getattr(backend_for(kernel, args[0], request=request), kernel)(*args)
