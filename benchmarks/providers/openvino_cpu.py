"""OpenVINO on the CPU."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.providers.base import Setting, Step
from benchmarks.providers.exported import Exported


class OpenVino(Exported):
    """OpenVINO's CPU plugin, which folds batch norm, fuses what follows a convolution and chooses layouts; inference.

    One stream with the latency hint and as many threads as the others: a call uses the whole machine, as in PyTorch.
    `bfloat16` is its inference precision for a model and inputs in float32 that hold the same rounded values; NumPy in
    and out, shared with it rather than copied.
    """

    modules = ("openvino",)
    packages = ("openvino",)
    dtypes = {"cpu": (torch.float32, torch.bfloat16)}  # noqa: RUF012
    precisions = {torch.float32: "f32", torch.bfloat16: "bf16"}  # noqa: RUF012

    def prepare(self, module: nn.Module, examples: tuple[Tensor, ...], setting: Setting) -> Step:
        import openvino

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = openvino.convert_model(
                module.eval().float(),
                example_input=tuple(example.float() for example in examples),
                input=[list(example.shape) for example in examples],
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
        return lambda *inputs: request.infer(list(inputs), share_inputs=True, share_outputs=True)[0]

    def convert(self, tensor: Tensor) -> Any:
        return tensor.float().contiguous().numpy()
