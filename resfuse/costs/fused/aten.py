"""What ATen is asked for while a function runs on tensors without data: each operator with its cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from resfuse.costs import batch_norm, convolution
from resfuse.costs.cost import Cost, Kernels, kernel
from resfuse.costs.device import Device
from resfuse.costs.operation import TensorInfo

# Memory alone; a number on the CPU; and zeros, which the GPU backends keep from call to call (barriers, counters).
_WITHOUT_WORK = ("aten::empty", "aten::new_empty", "aten::detach", "aten::scalar_tensor", "aten::zeros")
_ONLY_WRITES = ("aten::zero_", "aten::fill_", "aten::copy_")


def operators(function: Callable[[], object], device: Device) -> Kernels:
    """The kernels behind every operator that the function calls on tensors of the meta device; what is a view is free.

    Convolutions and batch norms cost what their formulas say, everything else its operands and results once.
    """
    with _Recorder(device) as recorder:
        function()
    return tuple(recorder.kernels)


class _Recorder(TorchDispatchMode):
    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device
        self.kernels: list[Cost] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        if name == "aten::convolution":  # without data it forgets the memory format, and would have to be copied
            result = result.contiguous(memory_format=torch.channels_last)
        if not name.startswith(_WITHOUT_WORK) and not _is_view(func):
            self.kernels.extend(self._kernels(name, args, kwargs or {}, result))
        return result

    def _kernels(self, name: str, args: Any, kwargs: Any, result: Any) -> Kernels:
        if name == "aten::convolution":
            found = [convolution.forward(_info(args[0]), _info(args[1]), _info(result))]
            if args[2] is not None and self.device.type == "cuda":
                found.append(kernel(2 * _info(result).bytes))
            return tuple(found)
        if name == "aten::convolution_backward":
            dz, x, weight = (_info(tensor) for tensor in args[:3])
            needs_input, needs_weight, needs_bias = args[-1]
            return convolution.backward(
                x, weight, dz, needs_input=needs_input, needs_weight=needs_weight, needs_bias=needs_bias
            )
        if name == "aten::native_batch_norm":
            x, vectors = _info(args[0]), sum(_bytes(tensor) for tensor in args[1:5])
            return batch_norm.forward(x, x, vectors, training=args[5], device=self.device)
        results = pytree.tree_leaves(result)
        if name.startswith(_ONLY_WRITES):
            touched = [*results, *args[1:]]
        elif name.endswith("_"):
            touched = [*results, *args, *kwargs.values()]
        else:
            touched = [*pytree.tree_leaves((args, kwargs)), *results]
        return (kernel(*(_bytes(tensor) for tensor in touched)),)


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return any(found.alias_info is not None and not found.alias_info.is_write for found in returns)


def _info(tensor: Tensor) -> TensorInfo:
    return TensorInfo(tuple(tensor.shape), tensor.dtype)


def _bytes(value: Any) -> int:
    return _info(value).bytes if isinstance(value, Tensor) else 0
