"""Where automatic choice passes over a backend that could run a problem, because a later one is faster there.

`registry.PREFERENCE` is the rule, `TABLE` has its exceptions.  They move nobody who asks for a backend by name, and
count only where the preferred backend can run the problem, so none is ever left without a backend.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from resfuse.backends.problem import Problem, capability

PREDICTED = "predicted, not measured"


class Entry(NamedTuple):
    """`preferred` runs these verbs before `passed_over`, though it comes later in `registry.PREFERENCE`."""

    verbs: tuple[str, ...]
    passed_over: str
    preferred: str
    majors: tuple[int, ...]
    """Of CUDA devices with such a compute capability: 9 is Hopper."""
    dtypes: tuple[torch.dtype, ...]
    why: str
    source: str = PREDICTED
    """`PREDICTED`, or "measured on" and the device's name: the benchmark's CSV of that device has the figures."""

    def __str__(self) -> str:
        verb = "should be" if self.source == PREDICTED else "is"
        return f"{self.preferred} {verb} faster: {self.why} ({self.source})"


TABLE = (
    Entry(
        ("conv_bn_act_forward", "conv_forward"),
        passed_over="cuda",
        preferred="triton",
        majors=(9, 10, 11),  # not 12, which has mma.sync alone
        # Of float32 it is true in TF32; without that neither uses tensor cores, and nothing is predicted.  The switch
        # is not part of a problem: it can change between two calls.
        dtypes=(torch.bfloat16, torch.float16, torch.float32),
        why="it multiplies by wgmma or tcgen05, which are faster than the mma.sync of cuda",
    ),
)


def exceptions(name: str, problem: Problem) -> list[Entry]:
    """The entries by which another backend is preferred to the one of this name."""
    return [
        entry
        for entry in TABLE
        if entry.passed_over == name
        and problem.verb in entry.verbs
        and problem.dtype in entry.dtypes
        and problem.device.type == "cuda"
        and capability(problem.device)[0] in entry.majors
    ]
