"""The configuration of every convolution kernel: measured where a table has it, by heuristics otherwise."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from resfuse.backends.triton import tuning
from resfuse.backends.triton.devices import DeviceProperties
from resfuse.backends.triton.heuristics import every_config, heuristic_config, ranked
from resfuse.backends.triton.problems import ConvConfig, ConvProblem, Kind, Precision

__all__ = [
    "ConvConfig",
    "ConvProblem",
    "Kind",
    "Precision",
    "conv_config",
    "every_config",
    "forced",
    "heuristic_config",
    "is_forced",
    "ranked",
]

_forced: dict[str, ConvConfig] = {}


def conv_config(problem: ConvProblem, device: DeviceProperties) -> ConvConfig:
    """The configuration that a problem runs with on a device.  Cheap: ask at every launch, so that `forced` holds."""
    return _forced.get(problem.kind) or _chosen(problem, device)


@functools.lru_cache(maxsize=4096)
def _chosen(problem: ConvProblem, device: DeviceProperties) -> ConvConfig:
    return tuning.lookup(problem, device) or heuristic_config(problem, device)


@contextmanager
def forced(kind: Kind, config: ConvConfig) -> Iterator[None]:
    """Inside, in every thread of the process, all problems of a kind run with this configuration (to measure it)."""
    before = _forced.get(kind)
    _forced[kind] = config
    try:
        yield
    finally:
        if before is None:
            del _forced[kind]
        else:
            _forced[kind] = before


def is_forced(kind: Kind) -> bool:
    """Whether `forced` holds for a kind of problem."""
    return kind in _forced


def forget() -> None:
    """Choose again: the tables have changed."""
    tuning.forget()
    _chosen.cache_clear()
