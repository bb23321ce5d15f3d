"""FLOPs, bytes and launches of operator calls, and the least time that a device needs for them.

An operator reads each of its inputs and writes each of its outputs once, in one launch; views and empty tensors are
free.  What differs from that, with x the input, z the convolution's output, y the output and dy, dz, dx gradients:

| operator                              | launches on a GPU, and what they move                                     |
|---------------------------------------|---------------------------------------------------------------------------|
| convolution with a bias               | x, w -> z; z, bias -> z (on a CPU the bias is part of the convolution)     |
| gradients of a convolution            | one for each: dz, w -> dx; dz, x -> dw; dz -> db                          |
| ATen's batch norm, training           | semaphores; x -> statistics; running statistics; x -> y (cuDNN: all in one) |
| ATen's batch norm, inference          | invstd; x -> y (cuDNN: in one)                                            |
| its backward, batch statistics        | semaphores; dy, x -> sums; dy, x -> dx (cuDNN: in one)                    |
| its backward, running statistics      | one: dy, x -> sums, dy -> dx                                              |
| backward of pooling                   | dy, indices -> dx, which max_pool2d clears first                          |
| resfuse::conv_bn_act_train            | one: x, w -> z; [z], residual -> y                                        |
| resfuse::bn_act_train                 | one: x -> statistics; [x], residual -> y                                  |
| resfuse::bn_act_backward, training    | one: dy, x, y -> sums, g; [g or dy and y, x] -> dx; y beside a residual   |

What stands in brackets is read a second time by the same launch, and counts as far as it exceeds the last-level cache.
FLOPs are those of matrix products and convolutions, a multiply-add being two: torch's registry of formulas, with those
of resfuse's operators added to it.  Element-wise arithmetic hides behind the bytes.

ATen takes its own batch norm for bfloat16 and cuDNN's for float32 and float16 (`_select_batch_norm_backend` in
aten/src/ATen/native/Normalization.cpp of PyTorch 2.11); its kernel for CPUs reads the input three times in training.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import math
import platform
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_LAUNCH_SECONDS = 2e-6  # an estimate: what one more small kernel adds to a stream that is never empty
_ASSUMED_CACHE = 32 << 20
_MOVES_NOTHING = ("empty", "new_empty", "_unsafe_view", "scalar_tensor")
_OVERWRITES = ("copy_", "fill_", "zero_")
_ATEN_NAMES, _FUSED_NAMES = ("weight", "output_mask"), ("conv_weight", "needs_grad")


@dataclasses.dataclass(frozen=True)
class Device:
    """The ceilings of a machine, measured or from its datasheet (`source` says which)."""

    name: str
    """The name that its driver reports: "NVIDIA H200"."""
    type: str
    """ "cuda" or "cpu"."""
    bandwidth: float
    """B/s of a large copy, bytes read plus bytes written."""
    rates: Mapping[torch.dtype, float]
    """FLOP/s of a large matrix product by the dtype of its operands; float32's stands for dtypes without an entry."""
    source: str
    """ "measured on ..., <date>" or "datasheet ...", and what was derived."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability."""
    cache: int = 0
    """B of the last-level cache."""
    launch: float = 0.0
    """s that one more kernel launch costs in a stream that is never empty; 0 on a CPU."""

    def rate(self, dtype: torch.dtype) -> float:
        """FLOP/s in `dtype`."""
        return self.rates.get(dtype, self.rates[torch.float32])


def _gpu(name: str, capability: tuple[int, int], *, bandwidth: float, half: float, cache: int, source: str) -> Device:
    """float32 multiplies as TF32, PyTorch's default for convolutions: half the rate of bfloat16."""
    rates = {torch.bfloat16: half, torch.float16: half, torch.float32: half / 2}
    return Device(name, "cuda", bandwidth, rates, source, capability, cache << 20, _LAUNCH_SECONDS)


DEVICES: dict[str, Device] = {
    "h200": _gpu(
        "NVIDIA H200", (9, 0), bandwidth=4.3e12, half=790e12, cache=50,
        source="bandwidth and bfloat16 rate measured on an NVIDIA H200, 2026-11 (datasheet: 4.8 TB/s, 989 TFLOP/s); "
        "TF32 taken as half of it, launch time estimated",
    ),
    "h100": _gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), bandwidth=3.35e12, half=989e12, cache=50,
        source="datasheet of the H100 SXM, dense; launch time estimated",
    ),
    "a100": _gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), bandwidth=2.039e12, half=312e12, cache=40,
        source="datasheet of the A100 SXM 80 GB, dense; launch time estimated",
    ),
    "b200": _gpu(
        "NVIDIA B200", (10, 0), bandwidth=8e12, half=2250e12, cache=126,
        source="datasheet of the B200 SXM, dense; launch time estimated",
    ),
}  # fmt: skip
"""By short name.  The machines need not be there."""


class Kernel(NamedTuple):
    """One launch on a GPU, one call of a primitive on a CPU."""

    flops: int
    bytes: int
    """Bytes of device memory read plus bytes written."""
    dtype: torch.dtype = torch.float32
    """The dtype of the matrix product's operands."""

    def is_compute_bound(self, device: Device) -> bool:
        """Its arithmetic takes longer than its traffic."""
        return self.flops / device.rate(self.dtype) > self.bytes / device.bandwidth

    def seconds(self, device: Device) -> float:
        """Roofline time: the longer of its arithmetic and its traffic, without its launch.

        Source: Williams, Waterman & Patterson 2009, Roofline (doi:10.1145/1498765.1498785).
        """
        return max(self.flops / device.rate(self.dtype), self.bytes / device.bandwidth)


def kernels(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, device: Device) -> list[Kernel]:
    """The kernels that one operator call launches.

    Args:
        func: an overload of ATen's or of resfuse's.
        args, kwargs: its arguments; tensors need no data.
        output: what it returned.
        device: the machine.
    """
    name = func._overloadpacket.__name__
    outputs = [tensor for tensor in tree_leaves(output) if isinstance(tensor, Tensor)]
    if not outputs or is_view(func) or name.startswith(_MOVES_NOTHING):
        return []
    given = named_arguments(func, args, kwargs)
    if name in ("convolution_backward", "conv_backward"):
        return _conv_gradients(given)
    if "batch_norm" in name:
        return [Kernel(0, moved) for moved in _batch_norm("backward" in name, given, device)]
    if name in _OVERWRITES or ("pool" in name and name.endswith("_backward")):  # which takes the input for its shape
        del given["self"]
    read = {id(tensor): tensor for tensor in tree_leaves(given) if isinstance(tensor, Tensor)}
    moved = sum(map(nbytes, (*read.values(), *outputs))) + _read_again(name, given, outputs, device)
    formula = _flop_formulas().get(func._overloadpacket)
    flops = 0 if formula is None else formula(*args, **kwargs, out_val=output)
    found = [Kernel(flops, moved, outputs[0].dtype)]
    if device.type == "cuda" and name == "convolution" and given["bias"] is not None:
        found.append(Kernel(0, 2 * nbytes(outputs[0])))
    if device.type == "cuda" and name == "max_pool2d_with_indices_backward":
        found.insert(0, Kernel(0, nbytes(outputs[0])))
    return found


def nbytes(tensor: Tensor) -> int:
    """Bytes of memory behind a tensor; dimensions that are only expanded have none."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0)
    return math.prod(sizes) * tensor.element_size()


def is_view(func: Any) -> bool:
    """The operator's result shares the memory of an argument, and nothing is written."""
    aliases = (found.alias_info for found in func._schema.returns)
    return torch.Tag.inplace_view in func.tags or any(alias is not None and not alias.is_write for alias in aliases)


def named_arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments by their names in the schema, defaults filled in."""
    schema = func._schema.arguments
    found = {argument.name: kwargs.get(argument.name, argument.default_value) for argument in schema}
    return found | dict(zip(found, args, strict=False))


@functools.cache
def _flop_formulas() -> Mapping[Any, Callable[..., int]]:
    """torch's registry with resfuse's convolutions in it.  Not made at import, because it imports Triton."""
    from torch.utils.flop_counter import conv_flop_count, flop_registry, register_flop_formula

    ops: Any = torch.ops.resfuse

    @register_flop_formula([ops.conv_bn_act_train, ops.conv_bn_act_eval, ops.conv_forward])
    def forward(input: Any, conv_weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        output: Any = out_shape[0] if isinstance(out_shape[0], torch.Size) else out_shape
        return conv_flop_count(input, conv_weight, output)

    return flop_registry


def _read_again(name: str, given: Mapping[str, Any], outputs: list[Tensor], device: Device) -> int:
    """Bytes that the second phase of a cooperative launch reads again, because they exceed the cache."""
    again = 0
    if name == "conv_bn_act_train":
        again = nbytes(outputs[1])
    elif name == "bn_act_train":
        again = nbytes(given["input"])
    elif name == "bn_act_backward" and given["training"] and given["needs_input_grad"]:
        masks = given["output"] is not None and not given["needs_residual_grad"]  # dy and y, else g
        again = (3 if masks else 2) * nbytes(given["input"])
    return max(0, again - device.cache)


def _conv_gradients(given: Mapping[str, Any]) -> list[Kernel]:
    """Each gradient has as many products as the forward."""
    dz, x = given["grad_output"], given["input"]
    weight, needs = (given[name] for name in (_FUSED_NAMES if "conv_weight" in given else _ATEN_NAMES))
    spatial = x if given.get("transposed") else dz
    flops = 2 * spatial.shape[0] * math.prod(spatial.shape[2:]) * weight.numel()
    both = Kernel(flops, nbytes(dz) + nbytes(x) + nbytes(weight), x.dtype)  # reads dz and one of them, writes the other
    bias = Kernel(0, nbytes(dz) + dz.shape[1] * dz.element_size())
    return [kernel for kernel, needed in zip((both, both, bias), needs, strict=True) if needed]


def _batch_norm(backward: bool, given: Mapping[str, Any], device: Device) -> tuple[int, ...]:
    """Bytes of each launch; what is per channel does not count."""
    size, training = nbytes(given["input"]), given.get("training", given.get("train", backward))
    on_gpu, own = device.type == "cuda", given["input"].dtype == torch.bfloat16
    if not backward:
        if on_gpu and own:
            return (0, size, 0, 2 * size) if training else (0, 2 * size)
        return ((3 if on_gpu else 4) * size if training else 2 * size,)
    needs_input, *needs_vectors = given.get("output_mask", (True, True, True))
    if not training and not any(needs_vectors):  # dx = dy * scale
        return (2 * size,)
    sums, apply = 2 * size, (3 if training else 2) * size if needs_input else 0
    return (0, sums, apply) if on_gpu and own and training and needs_input else (sums + apply,)


# This machine


def processor_name() -> str:
    """The processor's model, as the operating system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return found or platform.processor() or platform.machine()


def measure_device(device: torch.device, *, seconds: float = 0.5) -> Device:
    """The ceilings of this machine, measured now, on random data and with all of torch's threads.

    The copy is of several times the last-level cache.  The rates are the better of a matrix product and a 3x3
    convolution in channels_last: libraries differ, and a convolution follows PyTorch's TF32 switch for convolutions.

    Args:
        device: a CPU or a CUDA device of this machine.
        seconds: to spend on each figure, all of which are medians.

    Raises:
        ValueError: a device of another type.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected a CPU or a CUDA device, got {device}")
    gpu: Any = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    cache = gpu.L2_cache_size if gpu else _last_level_cache()
    source = torch.randn(max(64 << 20, cache) if gpu else max(4 << 20, cache), device=device)  # four bytes each
    target = source.clone()
    bandwidth = 2 * source.nbytes / _seconds("target.copy_(source)", seconds, source=source, target=target)
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if gpu else (torch.float32, torch.bfloat16)
    rates = {dtype: _rate(device, dtype, seconds) for dtype in dtypes}
    today = datetime.date.today().isoformat()
    if gpu:
        measured = f"measured on {gpu.name}, {today}; launch time estimated"
        return Device(gpu.name, "cuda", bandwidth, rates, measured, (gpu.major, gpu.minor), cache, _LAUNCH_SECONDS)
    name = processor_name()
    measured = f"measured on {name}, {torch.get_num_threads()} threads, {today}"
    return Device(name, "cpu", bandwidth, rates, measured, cache=cache)


def _rate(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    side, images, extent = (8192, 256, 28) if device.type == "cuda" else (1024, 4, 21)

    random = functools.partial(torch.randn, device=device, dtype=dtype)
    with torch.inference_mode():
        product = _seconds("torch.mm(a, b)", seconds, a=random(side, side), b=random(side, side))
        shapes = ((images, 256, extent, extent), (256, 256, 3, 3))
        x, weight = (random(shape).to(memory_format=torch.channels_last) for shape in shapes)
        convolution = _seconds("torch.conv2d(x, weight, padding=1)", seconds, x=x, weight=weight)
    return max(2 * side**3 / product, 2 * images * extent**2 * weight.numel() / convolution)


def _seconds(statement: str, at_least: float, **names: Any) -> float:
    from torch.utils.benchmark import Timer

    timer = Timer(statement, globals={"torch": torch, **names}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=at_least).median)


def _last_level_cache() -> int:
    """Bytes of the largest cache of the first core, as Linux reports it; 32 MiB where it does not."""
    sizes = [
        int(match[1]) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[match[2]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (match := re.fullmatch(r"(\d+)([KMG])", path.read_text().strip()))
    ]
    return max(sizes, default=_ASSUMED_CACHE)
