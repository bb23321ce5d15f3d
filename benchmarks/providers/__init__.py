"""The systems that are compared, by name."""

from __future__ import annotations

from benchmarks.providers.base import Provider
from benchmarks.providers.cudnn import AtenCall, Cudnn, GraphCall
from benchmarks.providers.exported import OnnxRuntime, OpenVino, TensorRT
from benchmarks.providers.fused import Resfuse
from benchmarks.providers.native import Eager, Inductor

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Eager("eager_nchw", "nchw"),
        Eager("eager_channels_last", "channels_last"),
        Inductor("inductor"),
        Inductor("inductor_freezing", freezing=True),
        Inductor("inductor_reduce_overhead", mode="reduce-overhead"),
        Inductor("inductor_max_autotune", mode="max-autotune"),
        Cudnn("cudnn_aten", AtenCall),
        Cudnn("cudnn_graph", GraphCall),
        OnnxRuntime("onnxruntime"),
        OpenVino("openvino"),
        TensorRT("tensorrt"),
        Resfuse("resfuse"),
        Resfuse("resfuse_nchw", "nchw"),
        Resfuse("resfuse_compiled", compiled=True),
        Resfuse("resfuse_recompute", recompute=True),
        Resfuse("resfuse_cpu", backend="cpu"),
        Resfuse("resfuse_cuda", backend="cuda"),
        Resfuse("resfuse_triton", backend="triton"),
    )
}
ONLY_BY_NAME = ("resfuse_nchw", "resfuse_compiled", "resfuse_recompute", "resfuse_cpu")
DEFAULT = tuple(name for name in PROVIDERS if name not in ONLY_BY_NAME)
"""The providers of a run without `--provider`; those that cannot run here are left out with their reasons."""
QUICK = ("eager_nchw", "eager_channels_last", "resfuse")

__all__ = ["DEFAULT", "PROVIDERS", "QUICK", "Provider"]
