"""The systems that are compared, by name."""

from __future__ import annotations

from benchmarks.providers.base import Level, Mode, Provider, Setting, Step, UnsuitableError
from benchmarks.providers.compiled import Inductor
from benchmarks.providers.cudnn_aten import AtenCudnn
from benchmarks.providers.cudnn_graph import CudnnGraph
from benchmarks.providers.fused import BACKENDS, Resfuse
from benchmarks.providers.native import Eager
from benchmarks.providers.onnx_runtime import OnnxRuntime
from benchmarks.providers.openvino_cpu import OpenVino
from benchmarks.providers.tensorrt_engine import TensorRT

BASELINE = "eager_nchw"
"""What most models run as today, and what every ratio refers to first."""
BASELINE_CHANNELS_LAST = "eager_channels_last"

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Eager(BASELINE, "nchw"),
        Eager(BASELINE_CHANNELS_LAST, "channels_last"),
        Inductor("inductor"),
        Inductor("inductor_nchw", "nchw"),
        Inductor("inductor_reduce_overhead", mode="reduce-overhead"),
        Inductor("inductor_max_autotune", mode="max-autotune"),
        Inductor("inductor_freezing", freezing=True),
        Inductor("inductor_max_autotune_freezing", mode="max-autotune", freezing=True),
        AtenCudnn("cudnn_aten"),
        CudnnGraph("cudnn_graph"),
        OnnxRuntime("onnxruntime"),
        OpenVino("openvino"),
        TensorRT("tensorrt"),
        Resfuse("resfuse"),
        Resfuse("resfuse_nchw", "nchw"),
        Resfuse("resfuse_compiled", compiled=True),
        *(Resfuse(f"resfuse_{name}", backend=name) for name in BACKENDS),
    )
}

DEFAULT = (
    *(BASELINE, BASELINE_CHANNELS_LAST),
    *("inductor", "inductor_freezing", "inductor_reduce_overhead", "inductor_max_autotune"),
    *("cudnn_aten", "cudnn_graph", "onnxruntime", "openvino", "tensorrt"),
    *("resfuse", "resfuse_cuda", "resfuse_triton"),
)
"""What runs unless told otherwise, as far as it can: the others are said, with their reasons, to be left out."""

__all__ = [
    "BASELINE",
    "BASELINE_CHANNELS_LAST",
    "DEFAULT",
    "PROVIDERS",
    "Level",
    "Mode",
    "Provider",
    "Setting",
    "Step",
    "UnsuitableError",
]
