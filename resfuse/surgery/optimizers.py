"""Keeps the state of optimizers consistent with parameters whose strides have changed.

PyTorch's `fused=True` optimizers index a parameter, its gradient and its state alike.  Where their strides differ, the
CPU versions silently compute garbage (torch 2.11; also after `model.to(memory_format=...)`).  Once `fuse_` has changed
strides, a hook brings the state to the parameters' strides before each step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

_registered = False


def follow_strides() -> None:
    """Have every optimizer with `fused=True` match its state to its parameters before a step (once per process)."""
    global _registered
    if not _registered:
        _registered = True
        register_optimizer_step_pre_hook(_match_state)


def _match_state(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        if not group.get("fused"):
            continue
        for parameter in group["params"]:
            state, strides = optimizer.state.get(parameter, {}), parameter.stride()
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != strides:
                    state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
