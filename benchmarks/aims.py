"""What resfuse is to reach with ResNet-50 at 224x224, held against what was measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from benchmarks.labels import label
from benchmarks.records import Record
from benchmarks.speeds import GRAPH_TIME, OURS, TIME, Comparison, on_gpu, runs

MODEL, IMAGE = "resnet50", "3x224x224"
EAGER, MAX_AUTOTUNE, OPENVINO = "eager_channels_last", "inductor_max_autotune", "openvino"
COMPILED = "inductor"
"""torch.compile in any mode."""
Quantity = Literal["speed", "milliseconds", "memory"]


@dataclasses.dataclass(frozen=True)
class Aim:
    """One figure to reach."""

    quantity: Quantity
    """speed: times as fast as `against`, at least; milliseconds: per step, at most; memory: peak bytes as a part of
    those of `against`, at most."""
    bound: float
    device: str
    """How the name of the GPU begins; "CPU" for any machine's processor."""
    mode: str
    dtype: str
    batch: int
    against: str = ""
    later: bool = False
    """A goal beyond the first ones: missing it is no surprise."""

    @property
    def text(self) -> str:
        """In words."""
        what = {
            "speed": f"at least {self.bound:g}x {label(self.against)}",
            "milliseconds": f"at most {self.bound:.2f} ms, by CUDA graphs",
            "memory": f"peak memory at most {self.bound:g} of {label(self.against)}'s",
        }[self.quantity]
        later = " (later)" if self.later else ""
        return f"{self.device}: {self.mode}, {self.dtype}, batch {self.batch}: {what}{later}"


AIMS = (
    Aim("speed", 2.5, "NVIDIA H200", "inference", "bfloat16", 128, EAGER),
    Aim("speed", 1.5, "NVIDIA H200", "inference", "bfloat16", 128, MAX_AUTOTUNE),
    Aim("milliseconds", 0.20, "NVIDIA H200", "inference", "bfloat16", 1),
    Aim("speed", 1.5, "NVIDIA H200", "train", "bfloat16", 256, EAGER),
    Aim("speed", 1.25, "NVIDIA H200", "train", "bfloat16", 256, COMPILED),
    Aim("memory", 1.0, "NVIDIA H200", "train", "bfloat16", 256, COMPILED),
    Aim("memory", 0.55, "NVIDIA H200", "train", "bfloat16", 256, EAGER, later=True),
    Aim("speed", 1.0, "CPU", "inference", "float32", 16, OPENVINO),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """An aim, and what was measured for it."""

    aim: Aim
    measured: float | None
    """In the aim's quantity; None where it was not measured."""
    run: str = ""
    """When the run began that measured it."""

    @property
    def verdict(self) -> str:
        """met, missed or not measured."""
        if self.measured is None:
            return "not measured"
        reached = self.measured >= self.aim.bound if self.aim.quantity == "speed" else self.measured <= self.aim.bound
        return "met" if reached else "missed"

    @property
    def text(self) -> str:
        """The measured figure, in the aim's unit; a dash where there is none."""
        if self.measured is None:
            return "-"
        return {
            "speed": f"{self.measured:.2f}x",
            "milliseconds": f"{self.measured:.3f} ms",
            "memory": f"{self.measured:.2f}",
        }[self.aim.quantity]


def outcomes(rows: Sequence[Record]) -> list[Outcome]:
    """Every aim against the latest run that measured it."""
    found = sorted(runs(rows), key=lambda one: one.first.conditions.date)
    return [_outcome(aim, [one for one in found if _fits(aim, one)]) for aim in AIMS]


def _outcome(aim: Aim, fitting: Sequence[Comparison]) -> Outcome:
    for one in reversed(fitting):
        measured = _MEASURES[aim.quantity](aim, one)
        if measured is not None:
            return Outcome(aim, measured, one.first.conditions.date)
    return Outcome(aim, None)


_MEASURES: dict[Quantity, Callable[[Aim, Comparison], float | None]] = {
    "speed": lambda aim, one: _ratio(_least(one, aim.against, TIME), one.median(OURS)),
    "milliseconds": lambda aim, one: _ratio(one.median(OURS, GRAPH_TIME), 1e-3),
    "memory": lambda aim, one: _peaks(aim, one),
}


def _peaks(aim: Aim, one: Comparison) -> float | None:
    """Of runs of `benchmarks.memory`, which predict it too: only they have weights, gradients and momenta in it."""
    if one.median(OURS, "predicted_peak") is None:
        return None
    return _ratio(one.median(OURS, "peak_memory"), _least(one, aim.against, "peak_memory"))


def _fits(aim: Aim, one: Comparison) -> bool:
    first = one.first
    wanted = ("model", MODEL, IMAGE, aim.mode, aim.dtype, aim.batch)
    there = first.conditions.device
    machine = not on_gpu(first.conditions) if aim.device == "CPU" else there.startswith(aim.device)
    return machine and (first.level, first.name, one.image, first.mode, first.dtype, one.batch) == wanted


def _least(one: Comparison, against: str, metric: str) -> float | None:
    """Of one peer; where it ran in several ways, such as torch.compile with and without freezing, of the best."""
    names = [name for name in one.rows if name == against or name.startswith(f"{against}_")]
    return min((value for name in names if (value := one.median(name, metric)) is not None), default=None)


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None
