"""What executes cuDNN graphs: described by the Python frontend, planned by cuDNN's heuristics, chosen by trial."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.providers.groups import Group

DATA_TYPES = {
    torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BFLOAT16", torch.float64: "DOUBLE",
}  # fmt: skip
TRIALS = 5
"""Timed calls of a plan that is tried."""

Execute = Callable[[Mapping[str, Tensor]], None]
"""Runs a graph on tensors by the names of `describe`: reads "x", "w", "b" and "z", writes "y"."""


def describe(cudnn: Any, group: Group, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The graph of a group, not yet built, and its tensors by name: x, w, b, y, and z where there is a residual.

    Activations and weights are NHWC; what flows between the operations is float32 and never reaches memory.

    Args:
        cudnn: the frontend's module.
        group: what is to be computed; its dtype is that of the weight.
        options: further ones of `cudnn.pygraph`: `handle`, or `device_property` to plan for a GPU that is not here.
    """
    types = cudnn.data_type
    io, wide = getattr(types, DATA_TYPES[group.weight.dtype]), types.FLOAT
    graph = cudnn.pygraph(io_data_type=io, intermediate_data_type=wide, compute_data_type=wide, **options)

    def tensor(name: str, shape: tuple[int, ...]) -> Any:
        return graph.tensor(name=name, dim=list(shape), stride=_nhwc_strides(shape), data_type=io)

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
    """Have cuDNN's heuristics list plans for a graph, in the order in which it expects them to be fast.

    Raises:
        cudnn.cudnnGraphNotSupportedError: there is none.
    """
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    if dtype == torch.float32 and not torch.backends.cudnn.allow_tf32:
        notes = cudnn.numerical_note
        graph.deselect_numeric_notes([notes.TENSOR_CORE, notes.DOWN_CONVERT_INPUTS])
    graph.check_support()


def fastest(
    count: int,
    build: Callable[[int], None],
    seconds: Callable[[int], float],
    refused: type[Exception] | tuple[type[Exception], ...],
) -> int:
    """The index of the plan that takes the least time, among those that can be built.

    Args:
        count: of plans to try.
        build: makes a plan ready.
        seconds: how long it takes.
        refused: what both raise for a plan that can not be used.
    """
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


class Planner:
    """Makes what executes the graphs of groups on a GPU."""

    def __init__(self, device: torch.device) -> None:
        import cudnn

        self._cudnn: Any = cudnn
        self._device = device
        with torch.cuda.device(device):
            self._handle = cudnn.create_handle()

    def __call__(self, group: Group) -> Execute:
        graph, tensors = describe(self._cudnn, group, handle=self._handle)
        plan(self._cudnn, graph, group.weight.dtype)
        buffers = self._buffers(group)
        limit = torch.backends.cudnn.benchmark_limit or graph.get_execution_plan_count()
        count = min(limit, graph.get_execution_plan_count()) if torch.backends.cudnn.benchmark else 1
        chosen = fastest(
            count,
            graph.build_plan_at_index,
            lambda index: _seconds(lambda: self._executor(graph, tensors, index)(buffers)),
            # A plan that can be listed can still fail, in building or when it is called for the first time.
            (self._cudnn.cudnnGraphNotSupportedError, RuntimeError),
        )
        return self._executor(graph, tensors, chosen)

    def _executor(self, graph: Any, tensors: Mapping[str, Any], index: int) -> Execute:
        size = max(graph.get_workspace_size_plan_at_index(index), 1)

        def execute(given: Mapping[str, Tensor]) -> None:
            stream = torch.cuda.current_stream(self._device).cuda_stream
            self._cudnn.set_stream(handle=self._handle, stream=stream)
            workspace = torch.empty(size, dtype=torch.uint8, device=self._device)
            pack = {tensors[name]: tensor for name, tensor in given.items()}
            graph.execute_plan_at_index(pack, workspace, index, handle=self._handle)

        return execute

    def _buffers(self, group: Group) -> dict[str, Tensor]:
        """Tensors to try plans on."""
        shapes = {"x": group.input_shape, "y": group.output_shape}
        shapes |= {"z": group.output_shape} if group.residual else {}
        made = {
            name: torch.randn(shape, device=self._device)
            .to(group.weight.dtype)
            .contiguous(memory_format=torch.channels_last)
            for name, shape in shapes.items()
        }
        return {**made, "w": group.weight.contiguous(memory_format=torch.channels_last), "b": group.bias}


def _seconds(call: Callable[[], None]) -> float:
    """Per call, on the GPU, after one that does not count."""
    call()
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    for _ in range(TRIALS):
        call()
    ended.record()
    ended.synchronize()
    return started.elapsed_time(ended) / 1e3 / TRIALS


def _nhwc_strides(shape: tuple[int, ...]) -> list[int]:
    _, channels, height, width = shape
    return [height * width * channels, 1, width * channels, channels]
