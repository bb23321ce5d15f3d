"""The signs that a network's ReLUs see: recorded in one run, and imposed on another.

Where a ReLU's argument is zero but for rounding, rounding decides whether an element of the gradient appears or
vanishes: then two right computations can be far apart.  Among the millions of such arguments in a network there always
are some.  So a run is compared with the float64 computation of the very function that it differentiated, whose ReLUs
let pass what they let pass in that run; and the arguments where this is not what float64 itself would do have to be
as small as rounding makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from resfuse import functional

Signs = list[Tensor]
"""Where the output of each ReLU was positive, in the order of the calls."""


@contextmanager
def recorded() -> Iterator[Signs]:
    """The signs of all ReLUs that are called meanwhile, by themselves or as part of a fused call."""
    signs: Signs = []

    def recording(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **options: Any) -> Tensor:
            output = function(*args, **options)
            if options.get("activation", "relu") == "relu":
                signs.append(output.detach() > 0)
            return output

        return call

    with ExitStack() as patches:
        for owner, names in ((functional, ("conv_bn_act", "bn_act", "add_relu")), (F, ("relu",))):
            for name in names:
                patches.enter_context(mock.patch.object(owner, name, recording(getattr(owner, name))))
        yield signs


class Flips:
    """How often, and where, imposed signs differed from those that the computation itself would have had."""

    def __init__(self) -> None:
        self.count = 0
        self.largest = 0.0
        """The largest argument of a ReLU that had the other sign, as a part of the largest one of the same call."""

    def look_at(self, argument: Tensor, positive: Tensor) -> None:
        """Compare the signs of one call."""
        flipped = (argument > 0) != positive
        count = int(flipped.sum())
        if count:
            self.count += count
            self.largest = max(self.largest, (argument[flipped].abs().max() / argument.abs().max()).item())


@contextmanager
def imposed(signs: Signs) -> Iterator[Flips]:
    """ReLUs of PyTorch let pass what they let pass when the signs were recorded.

    Raises:
        RuntimeError: at the end, where there were more or fewer calls.
    """
    remaining = iter(signs)
    flips = Flips()

    def relu(input: Tensor, inplace: bool = False) -> Tensor:
        positive = next(remaining, None)
        if positive is None or positive.shape != input.shape:
            raise RuntimeError("the ReLUs are called in another order, or more often, than when signs were recorded")
        flips.look_at(input.detach(), positive)
        return input * positive

    with mock.patch.object(F, "relu", relu):
        yield flips
    if next(remaining, None) is not None:
        raise RuntimeError("ReLUs are called less often than when signs were recorded")


def same(one: Signs, other: Signs) -> bool:
    """Whether two runs had the same signs."""
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
