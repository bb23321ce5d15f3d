"""ONNX Runtime, on the CPU and, where onnxruntime-gpu is installed, on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.providers.base import Setting, Step
from benchmarks.providers.exported import Exported, onnx_model
from benchmarks.providers.side_stream import SideStream


class OnnxRuntime(Exported):
    """ONNX Runtime with all graph optimisations, which fold batch norm and fuse conv + add + ReLU; inference.

    On the CPU (float32; it has no convolution in bfloat16) with as many threads as the others, NumPy in and out.  On a
    GPU by its CUDA provider: float32, following eager's TF32 switch, and float16; cuDNN's algorithms by exhaustive
    trial with as much workspace as they want, NHWC inside, on a stream in order with torch's, with inputs bound where
    torch has them and an output bound once; not under `Setting.graph`, as it can not be captured.  Options and bindings
    are tested; running it on a GPU is not.
    """

    modules = ("onnxruntime", "onnx", "onnxscript")
    packages = ("onnxruntime", "onnxruntime-gpu")
    dtypes = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.float16)}  # noqa: RUF012

    def unavailable_reason(self, setting: Setting) -> str | None:
        reason = super().unavailable_reason(setting)
        if reason is None and setting.device.type == "cuda":
            import onnxruntime

            if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
                return "the installed ONNX Runtime has no CUDA provider (onnxruntime-gpu has)"
            if setting.graph:
                return "it can not be captured in a CUDA graph of torch's"
        return reason

    def prepare(self, module: nn.Module, examples: tuple[Tensor, ...], setting: Setting) -> Step:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = setting.threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        # Its threads may spin while it works, but not after that: then another provider is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        model = onnx_model(module, examples)
        if setting.device.type == "cuda":
            with torch.no_grad():
                output = torch.empty_like(module.eval()(*examples), memory_format=torch.contiguous_format)
            stream = SideStream(setting.device)
            gpu = ("CUDAExecutionProvider", cuda_options(stream.address, setting.device.index or 0))
            session = onnxruntime.InferenceSession(model, options, providers=[gpu, *_CPU])
            if session.get_providers()[0] != gpu[0]:
                raise RuntimeError("ONNX Runtime could not load its CUDA provider, and would run on the CPU")
            return bound_step(session, output, stream.ordered)
        session = onnxruntime.InferenceSession(model, options, providers=_CPU)
        names = [input.name for input in session.get_inputs()]
        return lambda *inputs: session.run(None, dict(zip(names, inputs, strict=True)))[0]

    def convert(self, tensor: Tensor) -> Any:
        return tensor.contiguous() if tensor.is_cuda else tensor.contiguous().numpy()


_CPU = ["CPUExecutionProvider"]


def cuda_options(stream: int, device: int) -> dict[str, str]:
    """Of the CUDA execution provider."""
    return {
        "device_id": str(device),
        "user_compute_stream": str(stream),
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "cudnn_conv_use_max_workspace": "1",
        "prefer_nhwc": "1",
        "use_tf32": str(int(torch.backends.cudnn.allow_tf32)),
    }


def bound_step(session: Any, output: Tensor, ordered: Callable[[], AbstractContextManager[object]]) -> Step:
    """Runs on tensors where they are; the output is the same memory at every call.

    Args:
        session: its inputs are those of the module, in order.
        output: where the output goes, contiguous.
        ordered: gives the context that keeps the session's stream in order with torch's.
    """
    import onnxruntime

    # Without this it waits for the GPU after every call, which none of the others does.
    run_options = onnxruntime.RunOptions()
    run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    names = [input.name for input in session.get_inputs()]
    binding = session.io_binding()
    binding.bind_output(session.get_outputs()[0].name, **place(output))

    def run(*inputs: Tensor) -> Tensor:
        for name, tensor in zip(names, inputs, strict=True):
            binding.bind_input(name, **place(tensor))
        with ordered():
            session.run_with_iobinding(binding, run_options)
        return output

    return run


def place(tensor: Tensor) -> dict[str, Any]:
    """Where a contiguous tensor is, as ONNX Runtime's bindings want it."""
    return {
        "device_type": tensor.device.type,
        "device_id": tensor.device.index or 0,
        "element_type": torch.empty(0, dtype=tensor.dtype).numpy().dtype.type,
        "shape": tuple(tensor.shape),
        "buffer_ptr": tensor.data_ptr(),
    }
