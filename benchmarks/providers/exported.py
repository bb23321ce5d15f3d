"""Providers that export the model from PyTorch and run it in a runtime of their own: inference on the CPU."""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.providers.base import Provider, Setting, Step


class Exported(Provider):
    """A runtime for exported models."""

    modules: tuple[str, ...]
    """What has to be importable."""
    dtypes: tuple[torch.dtype, ...]

    def unavailable_reason(self, setting: Setting) -> str | None:
        missing = [name for name in self.modules if importlib.util.find_spec(name) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"
        if setting.mode != "inference":
            return "inference only"
        if setting.device.type != "cpu":
            return "compared on the CPU only"
        if setting.dtype not in self.dtypes:
            return f"no {str(setting.dtype).removeprefix('torch.')} on the CPU"
        return None

    def convert(self, input: Tensor) -> Any:
        """As NumPy's array, float32: what is to run in bfloat16 is converted inside of the runtime."""
        return input.float().contiguous().numpy()


class OnnxRuntime(Exported):
    """ONNX Runtime's CPU provider with all graph optimisations."""

    modules = ("onnxruntime", "onnx", "onnxscript")
    packages = ("onnxruntime",)
    dtypes = (torch.float32,)

    def prepare(self, model: nn.Module, example: Tensor, setting: Setting) -> Step:
        import onnxruntime

        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(model.eval(), (example,), dynamo=True, verbose=False)
        assert program is not None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = setting.threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        # Its threads may spin while it works, but not after that: then another provider is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(
            program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        name = session.get_inputs()[0].name
        return lambda images: session.run(None, {name: images})[0]


class OpenVino(Exported):
    """OpenVINO's CPU plugin with the latency hint; bfloat16 by its inference precision."""

    modules = ("openvino",)
    packages = ("openvino",)
    dtypes = (torch.float32, torch.bfloat16)
    precisions = {torch.float32: "f32", torch.bfloat16: "bf16"}  # noqa: RUF012

    def prepare(self, model: nn.Module, example: Tensor, setting: Setting) -> Step:
        import openvino

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Exported in float32, also where the values were rounded to bfloat16.
            graph = openvino.convert_model(
                model.eval().float(), example_input=example.float(), input=[list(example.shape)]
            )
        compiled = openvino.compile_model(
            graph,
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": 1,
                "INFERENCE_NUM_THREADS": setting.threads,
                "INFERENCE_PRECISION_HINT": self.precisions[setting.dtype],
            },
        )
        request = compiled.create_infer_request()
        return lambda images: request.infer([images], share_inputs=True, share_outputs=True)[0]
