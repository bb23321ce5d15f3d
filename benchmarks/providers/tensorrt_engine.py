"""TensorRT, from ONNX, where the package `tensorrt` is installed."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.providers.base import Setting, Step
from benchmarks.providers.exported import Exported, onnx_model
from benchmarks.providers.side_stream import SideStream

TIMING_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "resfuse" / "tensorrt-timing.cache"
"""What the builder measured, kept from run to run: with it an engine is built in seconds."""
OPTIMIZATION_LEVEL = 4
"""Of 5; 3 is the default, 5 takes hours for models like these and seldom finds more."""


class TensorRT(Exported):
    """TensorRT's engine for the exported module, NVIDIA's own compiler for inference on its GPUs.

    The model is exported in the dtype that is measured, and the network strongly typed: TensorRT computes in the types
    that the model has, which newer releases do always.  TF32 follows eager's switch.  Kernels by trial at optimisation
    level 4.  Calls go by `execute_async_v3` to a stream in order with torch's, as on the default stream TensorRT would
    synchronise, from and to torch's tensors, the output being the same memory at every call, so that they can be
    captured in CUDA graphs.  By the documentation of TensorRT 10:
    no test has run it, as it needs a GPU; the exported models are tested, and the calls with a stand-in.
    """

    modules = ("tensorrt", "onnx", "onnxscript")
    packages = ("tensorrt",)
    dtypes = {"cuda": (torch.float32, torch.float16, torch.bfloat16)}  # noqa: RUF012

    def prepare(self, module: nn.Module, examples: tuple[Tensor, ...], setting: Setting) -> Step:
        import tensorrt

        with torch.no_grad():
            output = torch.empty_like(module.eval()(*examples), memory_format=torch.contiguous_format)
        plan = build(tensorrt, onnx_model(module, examples), TIMING_CACHE)
        runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
        engine = runtime.deserialize_cuda_engine(plan)
        return make_engine_step(tensorrt, engine, output, SideStream(setting.device).ordered, keep=runtime)


def build(trt: Any, model: bytes, timing_cache: Path) -> Any:
    """The serialised engine of an ONNX model of fixed shapes; the timing cache is read first and written again.

    Raises:
        RuntimeError: TensorRT can not read the model, or finds no engine.
    """
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        errors = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise RuntimeError(f"TensorRT can not read the model: {errors}")
    config = builder.create_builder_config()
    config.builder_optimization_level = OPTIMIZATION_LEVEL
    if torch.backends.cudnn.allow_tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)
    cache = config.create_timing_cache(timing_cache.read_bytes() if timing_cache.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("TensorRT found no engine for the model")
    timing_cache.parent.mkdir(parents=True, exist_ok=True)
    timing_cache.write_bytes(bytes(config.get_timing_cache().serialize()))
    return plan


def make_engine_step(
    trt: Any, engine: Any, output: Tensor, ordered: Callable[[], AbstractContextManager[int]], keep: Any = None
) -> Step:
    """Runs an engine on torch's tensors.

    Args:
        trt: the module `tensorrt`.
        engine: deserialised; its inputs are those of the module, in order, and it has one output.
        output: where that goes.
        ordered: gives the context in which a call is queued, and that the address of its stream.
        keep: what has to live as long as the step.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    (written,) = (name for name in names if name not in inputs)
    context = engine.create_execution_context()
    context.set_tensor_address(written, output.data_ptr())

    def run(*tensors: Tensor) -> Tensor:
        for name, tensor in zip(inputs, tensors, strict=True):
            context.set_tensor_address(name, tensor.data_ptr())
        with ordered() as stream:
            if not context.execute_async_v3(stream):
                raise RuntimeError("TensorRT could not enqueue the engine")
        return output

    run.keep = (engine, keep)  # type: ignore[attr-defined]
    return run
