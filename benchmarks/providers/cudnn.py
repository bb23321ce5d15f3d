"""cuDNN's fused convolutions: the two operators that ATen has, and cuDNN's graph API."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.case import Setting
from benchmarks.providers.base import Provider, device_type
from benchmarks.providers.cudnn_groups import Group, rewrite
from benchmarks.steps import Step, make_step

DATA_TYPES = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BFLOAT16"}


class Cudnn(Provider):
    """Every convolution that resfuse fuses as one call of cuDNN, batch norm folded; inference on a GPU, channels_last.

    float32 follows the same TF32 switch as eager.  No test has run these calls, which need a GPU; what surrounds them
    is tested with other calls in their place.
    """

    def __init__(self, name: str, make_call: Callable[[Group], nn.Module]) -> None:
        """`make_call` gives the module that computes a group."""
        super().__init__(name, "channels_last")
        self._make_call = make_call
        if make_call is GraphCall:
            self.packages = ("nvidia-cudnn-frontend",)

    def unavailable_reason(self, setting: Setting) -> str | None:
        if setting.mode != "inference":
            return "inference only: the batch norm is folded into the weights"
        if self.packages and importlib.util.find_spec("cudnn") is None:
            return "not installed: nvidia-cudnn-frontend"
        if device_type(setting) != "cuda":
            return "cuDNN needs a GPU"
        return None if torch.backends.cudnn.is_available() else "torch was built without cuDNN"

    def prepare(self, module: nn.Module, examples: tuple[Tensor, ...], setting: Setting) -> Step:
        inputs = tuple(self.convert(example) for example in examples)
        return make_step(rewrite(self.in_layout(module.eval()), inputs, self._make_call), setting)


class AtenCall(nn.Module):
    """A group by `torch.cudnn_convolution_relu` or `torch.cudnn_convolution_add_relu`, with which TorchScript fused.

    They compute relu(conv2d(input, weight) + alpha * z + bias), the first without z.  There is no form without ReLU, so
    that a projection is an ordinary convolution.
    """

    def __init__(self, group: Group) -> None:
        super().__init__()
        self._group = group
        self._geometry = (list(group.stride), list(group.padding), list(group.dilation), group.groups)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        weight, bias = self._group.weight, self._group.bias
        if not self._group.relu:
            output = F.conv2d(input, weight, bias, *self._geometry)
            return output if residual is None else output.add_(residual)
        if residual is None:
            return torch.cudnn_convolution_relu(input, weight, bias, *self._geometry)
        return torch.cudnn_convolution_add_relu(input, weight, residual, 1.0, bias, *self._geometry)


class GraphCall(nn.Module):
    """A group as one cuDNN graph by the Python frontend, with the fastest of the plans that cuDNN proposes."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        import cudnn

        self._cudnn, self._device = cudnn, group.weight.device
        with torch.cuda.device(self._device):
            self._handle = cudnn.create_handle()
        self._graph, self._tensors = describe(cudnn, group, handle=self._handle)
        plan(cudnn, self._graph, group.weight.dtype)
        self._weight = group.weight.contiguous(memory_format=torch.channels_last)
        self._bias, self._shape = group.bias, group.output_shape
        shapes = (group.input_shape, group.output_shape)[: 1 + group.residual]
        trial = [self._images(shape) for shape in shapes]
        self._index = fastest(
            min(torch.backends.cudnn.benchmark_limit or 10, self._graph.get_execution_plan_count()),
            self._graph.build_plan_at_index,
            lambda index: self._seconds(index, trial),
            (cudnn.cudnnGraphNotSupportedError, RuntimeError),  # a plan that is listed can still fail
        )

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._run(self._index, input, residual)

    def _run(self, index: int, input: Tensor, residual: Tensor | None = None) -> Tensor:
        output = torch.empty(self._shape, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)
        tensors = {"x": input.contiguous(memory_format=torch.channels_last), "w": self._weight, "b": self._bias}
        if residual is not None:
            tensors["z"] = residual.contiguous(memory_format=torch.channels_last)
        tensors["y"] = output
        self._cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream(self._device).cuda_stream)
        size = max(self._graph.get_workspace_size_plan_at_index(index), 1)
        workspace = torch.empty(size, dtype=torch.uint8, device=self._device)
        pack = {self._tensors[name]: tensor for name, tensor in tensors.items()}
        self._graph.execute_plan_at_index(pack, workspace, index, handle=self._handle)
        return output

    def _images(self, shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, device=self._device).to(self._weight.dtype)
        return values.contiguous(memory_format=torch.channels_last)

    def _seconds(self, index: int, inputs: list[Tensor]) -> float:
        from triton.testing import do_bench

        return float(do_bench(lambda: self._run(index, *inputs), warmup=1, rep=5, return_mode="median"))


def describe(cudnn: Any, group: Group, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The graph of a group, not yet built, and its tensors by name: x, w, b, y, and z where there is a residual.

    Activations and weights are NHWC; what flows between the operations is float32 and never reaches memory.  `options`
    are those of `cudnn.pygraph`: `handle`, or `device_property` to plan for a GPU that is not here.
    """
    types = cudnn.data_type
    io = getattr(types, DATA_TYPES[group.weight.dtype])
    graph = cudnn.pygraph(io_data_type=io, intermediate_data_type=types.FLOAT, compute_data_type=types.FLOAT, **options)

    def tensor(name: str, shape: tuple[int, ...]) -> Any:
        _, c, h, w = shape
        return graph.tensor(name=name, dim=list(shape), stride=[h * w * c, 1, w * c, c], data_type=io)

    tensors = {"x": tensor("x", group.input_shape), "w": tensor("w", tuple(group.weight.shape))}
    tensors["b"] = tensor("b", (1, group.weight.shape[0], 1, 1))
    output = graph.conv_fprop(
        image=tensors["x"], weight=tensors["w"],
        padding=list(group.padding), stride=list(group.stride), dilation=list(group.dilation), name="conv",
    )  # fmt: skip
    output = graph.bias(input=output, bias=tensors["b"], name="bias")
    if group.residual:
        tensors["z"] = tensor("z", group.output_shape)
        output = graph.add(a=output, b=tensors["z"], name="add")
    if group.relu:
        output = graph.relu(input=output, name="relu")
    tensors["y"] = output.set_output(True).set_data_type(io)
    return graph, tensors


def plan(cudnn: Any, graph: Any, dtype: torch.dtype) -> None:
    """Have cuDNN's heuristics list plans for a graph, in the order in which it expects them to be fast."""
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    if dtype == torch.float32 and not torch.backends.cudnn.allow_tf32:
        notes = cudnn.numerical_note
        graph.deselect_numeric_notes([notes.TENSOR_CORE, notes.DOWN_CONVERT_INPUTS])
    graph.check_support()


def fastest(
    count: int, build: Callable[[int], None], seconds: Callable[[int], float], refused: tuple[type[Exception], ...]
) -> int:
    """The index of the plan that takes the least time, of those that `build` does not refuse."""
    found: dict[int, float] = {}
    for index in range(count):
        try:
            build(index)
            found[index] = seconds(index)
        except refused:
            continue
    if not found:
        raise RuntimeError(f"cuDNN proposed {count} plans, and none of them could be built")
    return min(found, key=lambda index: found[index])
