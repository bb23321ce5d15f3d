"""The configuration of every convolution kernel: measured where a table has it, by heuristics otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resfuse.backends.triton.heuristics import every_config, heuristic_config, ranked
from resfuse.backends.triton.problems import ConvConfig, ConvProblem, Kind, Precision

if TYPE_CHECKING:
    from resfuse.backends.triton.launch import DeviceProperties

__all__ = ["ConvConfig", "ConvProblem", "Kind", "Precision", "conv_config", "every_config", "ranked"]


def conv_config(problem: ConvProblem, device: DeviceProperties) -> ConvConfig:
    """The configuration that a problem runs with on a device."""
    return heuristic_config(problem, device)
