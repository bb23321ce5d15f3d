"""The systems that are compared, by name."""

from __future__ import annotations

from benchmarks.providers.base import Mode, Provider, Setting, Step
from benchmarks.providers.exported import OnnxRuntime, OpenVino
from benchmarks.providers.native import Eager, Inductor, Resfuse

BASELINE = "eager_nchw"
"""What most models run as today, and what every ratio refers to first."""
BASELINE_CHANNELS_LAST = "eager_channels_last"

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Eager(BASELINE, "nchw"),
        Eager(BASELINE_CHANNELS_LAST, "channels_last"),
        Inductor("inductor", "channels_last"),
        Inductor("inductor_nchw", "nchw"),
        OnnxRuntime("onnxruntime"),
        OpenVino("openvino"),
        Resfuse("resfuse", "channels_last"),
        Resfuse("resfuse_nchw", "nchw"),
    )
}

DEFAULT = (BASELINE, BASELINE_CHANNELS_LAST, "inductor", "onnxruntime", "openvino", "resfuse")
"""What runs unless told otherwise."""

__all__ = ["BASELINE", "BASELINE_CHANNELS_LAST", "DEFAULT", "PROVIDERS", "Mode", "Provider", "Setting", "Step"]
