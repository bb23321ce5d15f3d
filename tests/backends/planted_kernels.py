"""A process of a first contact on the CPU, with kernels planted that are right, wrong, raise, end it, or never finish.

With the names of kernels; "blind" instead of one is a process that does not find its GPU.
"""

from __future__ import annotations

import os
import sys
import time
import types
from typing import Any

from torch import Tensor

from resfuse.backends import dispatch, first_contact, reference


def wrong(grad_output: Tensor, output: Tensor) -> Tensor:
    gradient = reference.add_relu_backward(grad_output, output)
    gradient[0, 0, 0, 0] += 1
    return gradient


def raising(*_: Any) -> Any:
    raise ValueError("not today\nnor tomorrow")


PLANTED = {
    "add_relu_forward": reference.add_relu_forward,
    "add_relu_backward": wrong,
    "bn_act_forward": raising,
    "bn_statistics": lambda input: os._exit(7),
    "bn_apply": lambda *_: time.sleep(3600),
    "bn_backward_reduce": reference.bn_backward_reduce,
}


def register() -> None:
    """As the backend "planted"."""
    module = types.SimpleNamespace(KERNELS=tuple(PLANTED), **PLANTED)
    dispatch._registered["planted"] = module  # type: ignore[assignment]


if __name__ == "__main__":
    register()
    if "blind" in sys.argv:
        sys.exit("no GPU here")
    first_contact.main(sys.argv[1:])
