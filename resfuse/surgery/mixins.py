"""The fused method of `torch.nn.Sequential`; mixins_torchvision and mixins_timm have those of other libraries' modules.

Pickled models refer to the classes in these three files by name.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from resfuse.nn.blocks import SEQUENTIAL_FORWARDS, class_forward
from resfuse.nn.sequential import sequential_forward
from resfuse.surgery.fused import Fused


class FusedSequential(Fused):
    """`torch.nn.Sequential`."""

    def forward(self: Any, input: Any) -> Any:
        return sequential_forward(self._modules.values(), input)


SEQUENTIAL_FORWARDS.add(FusedSequential.forward)


def is_plain_sequential(module: nn.Module) -> bool:
    """True if calling the module calls its children in order and does nothing else."""
    return class_forward(module) in SEQUENTIAL_FORWARDS
