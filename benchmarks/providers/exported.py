"""Runtimes of exported models, for inference: ONNX Runtime, OpenVINO, TensorRT."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import Setting, dtype_name
from benchmarks.providers.base import Provider, device_type
from benchmarks.steps import Step

OPSET = 22
"""The first in which Conv, Add, Relu, MaxPool and GlobalAveragePool take bfloat16."""
TIMING_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "resfuse" / "tensorrt-timing.cache"
"""TensorRT's measurements, kept from run to run: with them an engine is built in seconds."""


class Exported(Provider):
    """A runtime for exported models; by type of device, the dtypes that it can run."""

    modules: tuple[str, ...]
    dtypes: Mapping[str, tuple[torch.dtype, ...]]

    def unavailable_reason(self, setting: Setting) -> str | None:
        if missing := [name for name in self.modules if importlib.util.find_spec(name) is None]:
            return f"not installed: {', '.join(missing)}"
        if setting.mode != "inference":
            return "inference only"
        kind = device_type(setting)
        if kind not in self.dtypes:
            return f"compared on {' and '.join(self.dtypes)} only, not on {kind}"
        return None if setting.dtype in self.dtypes[kind] else f"no {dtype_name(setting.dtype)} on {kind}"


class OnnxRuntime(Exported):
    """ONNX Runtime on the CPU with all graph optimisations, which fold batch norm and fuse conv + add + ReLU.

    float32 only, as it has no bfloat16 convolution; NumPy in and out.
    """

    modules = ("onnxruntime", "onnx", "onnxscript")
    packages = ("onnxruntime",)
    dtypes = {"cpu": (torch.float32,)}  # noqa: RUF012

    def prepare(self, module: nn.Module, examples: tuple[Tensor, ...], setting: Setting) -> Step:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = setting.threads, 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        # Its threads may spin while it works, but not after that: then another provider is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        model = onnx_model(module, examples)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names = [input.name for input in session.get_inputs()]
        return lambda *inputs: session.run(None, dict(zip(names, inputs, strict=True)))[0]

    def convert(self, tensor: Tensor) -> Any:
        return tensor.contiguous().numpy()


class OpenVino(Exported):
    """OpenVINO's CPU plugin, one stream with the latency hint: a call uses the whole machine, as in PyTorch.

    bfloat16 is its inference precision, for a model and inputs in float32 that hold the same rounded values; NumPy in
    and out, shared rather than copied.
    """

    modules = packages = ("openvino",)
    dtypes = {"cpu": (torch.float32, torch.bfloat16)}  # noqa: RUF012

    def prepare(self, module: nn.Module, examples: tuple[Tensor, ...], setting: Setting) -> Step:
        import openvino

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = openvino.convert_model(
                module.eval().float(),
                example_input=tuple(example.float() for example in examples),
                input=[list(example.shape) for example in examples],
            )
        compiled = openvino.compile_model(graph, "CPU", {
            "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": setting.threads,
            "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[setting.dtype],
        })  # fmt: skip
        request = compiled.create_infer_request()
        return lambda *inputs: request.infer(list(inputs), share_inputs=True, share_outputs=True)[0]

    def convert(self, tensor: Tensor) -> Any:
        return tensor.float().contiguous().numpy()


class TensorRT(Exported):
    """TensorRT's engine for the exported module.

    The network is strongly typed: it computes in the dtype of the model.  Kernels by trial at optimisation level 4 of
    5, as level 5 takes hours.  Calls go to a stream in order with torch's, as on the default stream TensorRT would
    synchronise.  Written by the documentation of TensorRT 10; no test has run it, as it needs a GPU.
    """

    modules = ("tensorrt", "onnx", "onnxscript")
    packages = ("tensorrt",)
    dtypes = {"cuda": (torch.float32, torch.float16, torch.bfloat16)}  # noqa: RUF012

    def prepare(self, module: nn.Module, examples: tuple[Tensor, ...], setting: Setting) -> Step:
        import tensorrt

        with torch.no_grad():
            output = torch.empty_like(module.eval()(*examples), memory_format=torch.contiguous_format)
        plan = build_engine(tensorrt, onnx_model(module, examples), TIMING_CACHE)
        runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
        engine = runtime.deserialize_cuda_engine(plan)
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT]
        (written,) = (name for name in names if name not in inputs)
        context = engine.create_execution_context()
        context.set_tensor_address(written, output.data_ptr())
        stream = SideStream(setting.device)

        def run(*tensors: Tensor) -> Tensor:
            for name, tensor in zip(inputs, tensors, strict=True):
                context.set_tensor_address(name, tensor.data_ptr())
            with stream.ordered():
                if not context.execute_async_v3(stream.address):
                    raise RuntimeError("TensorRT could not enqueue the engine")
            return output

        run.keep = (engine, runtime)  # type: ignore[attr-defined]
        return run


def onnx_model(module: nn.Module, examples: tuple[Tensor, ...]) -> bytes:
    """The module in eval mode as an ONNX model of fixed shapes, in the dtype of the module."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    # The exporter's optimiser folds batch norms, but gives bfloat16 convolutions float32 weights by that.
    optimize = examples[0].dtype != torch.bfloat16
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(), examples, dynamo=True, verbose=False, opset_version=OPSET, optimize=optimize
        )
    assert program is not None
    return program.model_proto.SerializeToString()


def build_engine(trt: Any, model: bytes, timing_cache: Path) -> Any:
    """The serialised engine of an ONNX model; the timing cache is read first and written again.

    Raises:
        RuntimeError: TensorRT cannot read the model, or finds no engine.
    """
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # newer releases always are
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        errors = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise RuntimeError(f"TensorRT cannot read the model: {errors}")
    config = builder.create_builder_config()
    config.builder_optimization_level = 4
    (config.set_flag if torch.backends.cudnn.allow_tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    cache = config.create_timing_cache(timing_cache.read_bytes() if timing_cache.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("TensorRT found no engine for the model")
    timing_cache.parent.mkdir(parents=True, exist_ok=True)
    timing_cache.write_bytes(bytes(config.get_timing_cache().serialize()))
    return plan


class SideStream:
    """A CUDA stream for libraries that do not work, or not well, on the default one.

    It begins its work after what was queued on torch's current stream, which waits for it: events on the current stream
    take its time, and both can be captured in one CUDA graph.
    """

    def __init__(self, device: str) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self.address: int = self._stream.cuda_stream

    @contextmanager
    def ordered(self) -> Iterator[None]:
        """The context in which a library queues its work."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        yield
        current.wait_stream(self._stream)
