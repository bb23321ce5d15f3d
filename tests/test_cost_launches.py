"""Launches on paper against what is launched: in the interpreter, in the emulator, on the CPU."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import resfuse
from benchmarks.launches import count_launches
from resfuse import costs
from resfuse.backends import cuda, cuda_conv, triton
from resfuse.costs import Device, Operation, TensorInfo
from resfuse.costs.fused.cuda import RESIDENT_BLOCKS, RESIDENT_BLOCKS_WITHOUT_TENSOR_CORES
from tests import shapes
from tests.emulator import backend as emulator

CPU = Device("a processor", "cpu", 50e9, {torch.float32: 1e12}, 1 << 34, 0.0, "made up")
RESOURCES = Path(__file__).parents[1] / "benchmarks/results/cuda/resources.csv"
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any], bool]] = {
    "3x3": ((2, 16, 8, 8), (32, 16, 3, 3), {"padding": 1}, False),
    "3x3, stride 2": ((2, 16, 9, 9), (32, 16, 3, 3), {"padding": 1, "stride": 2}, False),
    "1x1 and residual": ((2, 16, 8, 8), (32, 16, 1, 1), {}, True),
    "deep": ((1, 128, 4, 4), (32, 128, 3, 3), {"padding": 1}, False),
    "grouped": ((2, 16, 8, 8), (32, 4, 3, 3), {"padding": 1, "groups": 4}, False),
}


class Run:
    """A fused operator on tensors of ones, and the operation that describes it."""

    def __init__(self, name: str, case: str, training: bool, device: str = "cpu") -> None:
        shape, weight_shape, conv, with_residual = CASES[case]
        self.name, self.training = name, training
        self.conv = conv if name == "conv_bn_act" else {}
        weight = ones(weight_shape, device)
        z = F.conv2d(ones(shape, device), weight, **conv)
        self.input = ones(tuple(z.shape) if name != "conv_bn_act" else shape, device).requires_grad_()
        self.weight = weight.requires_grad_()
        channels = z.shape[1]
        self.vectors = [torch.zeros(channels, device=device), torch.ones(channels, device=device)]
        self.vectors += [torch.ones(channels, device=device).requires_grad_() for _ in range(2)]
        self.residual = ones(tuple(z.shape), device).requires_grad_() if with_residual or name == "add_relu" else None
        activations = [self.input] if self.residual is None else [self.input, self.residual]
        vectors = [] if name == "add_relu" else self.vectors
        parameters = [self.weight, *vectors] if name == "conv_bn_act" else vectors
        self.operation = Operation(
            "", name, tuple(map(described, activations)), tuple(map(described, parameters)), described(z),
            {**self.conv, "relu": True, "training": training},
        )  # fmt: skip

    def forward(self) -> Tensor:
        if self.name == "add_relu":
            assert self.residual is not None
            return resfuse.add_relu(self.input, self.residual)
        options = {"residual": self.residual, "training": self.training, **self.conv}
        if self.name == "bn_act":
            return resfuse.bn_act(self.input, *self.vectors, **options)
        return resfuse.conv_bn_act(self.input, self.weight, *self.vectors, **options)

    def backward(self, output: Tensor, grad_output: Tensor) -> object:
        wanted = [self.input] if self.residual is None else [self.input, self.residual]
        if self.name != "add_relu":
            wanted += self.vectors[2:]
        if self.name == "conv_bn_act":
            wanted.append(self.weight)
        return torch.autograd.grad(output, wanted, grad_output, retain_graph=True)

    def modelled(self, backend: str, device: Device, least: int = 0) -> tuple[int, int]:
        """Launches of forward and backward, without the addition where the residual's path meets the other one.

        `least`: bytes of those that count.
        """
        options: Any = {"training": self.training, "backend": backend, "device": device}
        both = (kernels(self.operation, **options) for kernels in (costs.forward_kernels, costs.backward_kernels))
        forward, backward = (sum(kernel.bytes >= least for kernel in kernels) for kernels in both)
        return forward, backward - (self.residual is not None)


def ones(shape: tuple[int, ...], device: str) -> Tensor:
    return torch.ones(shape, device=device).contiguous(memory_format=torch.channels_last)


def described(tensor: Tensor) -> TensorInfo:
    return TensorInfo(tuple(tensor.shape), tensor.dtype)


runs = pytest.mark.parametrize(
    ("name", "case", "training"),
    [
        *itertools.product(["conv_bn_act"], CASES, [True, False]),
        *itertools.product(["bn_act"], ["3x3", "1x1 and residual"], [True, False]),
        ("add_relu", "3x3", False),
    ],
)


# --- triton ----------------------------------------------------------------------------------------------------------


@contextmanager
def unsplit_gradients() -> Iterator[None]:
    """One configuration in the model and in the interpreter, whose own heuristics are others than a GPU's."""
    from resfuse.backends.triton import configs
    from resfuse.backends.triton.problems import ConvConfig

    with ExitStack() as stack:
        for kind in ("dgrad", "wgrad"):
            stack.enter_context(configs.forced(kind, ConvConfig(128, 128, 16, 8, 2)))
        yield


@pytest.mark.skipif(triton.unavailable_reason() is not None, reason=f"triton: {triton.unavailable_reason()}")
@runs
def test_triton(name: str, case: str, training: bool) -> None:
    """Where kernels are interpreted, a cooperative launch comes as two of one name."""
    from resfuse.backends.triton import launch

    (device,) = shapes.devices_of("triton")
    run = Run(name, case, training, device)
    with unsplit_gradients(), resfuse.use_backend("triton"):
        with launch.recorded() as first:
            output = run.forward()
        with launch.recorded() as second:
            run.backward(output, torch.ones_like(output))
        found = tuple(len([name for name, _ in itertools.groupby(names)]) for names in (first, second))
        assert run.modelled("triton", CPU) == found


class Traffic:
    """Bytes that interpreted kernels load and store."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        self.bytes = 0
        for name, mask_at in (("create_masked_load", 1), ("create_masked_store", 2)):
            monkeypatch.setattr(InterpreterBuilder, name, self._counting(getattr(InterpreterBuilder, name), mask_at))

    def _counting(self, access: Callable[..., Any], mask_at: int) -> Callable[..., Any]:
        def counted(builder: Any, pointers: Any, *args: Any) -> Any:
            itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            self.bytes += int(args[mask_at - 1].data.sum()) * itemsize
            return access(builder, pointers, *args)

        return counted

    def of(self, run: Callable[[], Any]) -> int:
        self.bytes = 0
        run()
        return self.bytes


@pytest.mark.skipif(not triton.INTERPRETED or triton.unavailable_reason() is not None, reason="of the interpreter")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["bn_act", "add_relu", "conv_bn_act"])
def test_bytes_of_triton(name: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels load and store, where every operand fits a tile: no tile then reads one again."""
    run = Run(name, "1x1 and residual", training)
    traffic = Traffic(monkeypatch)
    options: Any = {"training": training, "backend": "triton", "device": CPU}
    with unsplit_gradients(), resfuse.use_backend("triton"):
        outputs: list[Tensor] = []
        forward = traffic.of(lambda: outputs.append(run.forward()))
        grad_output = torch.ones_like(outputs[0])
        backward = traffic.of(lambda: run.backward(outputs[0], grad_output))
        z = run.operation.output.bytes
        modelled = costs.forward_cost(run.operation, **options).bytes
        if name == "conv_bn_act" and training:
            modelled += z  # two launches here: it does not stay in registers
        assert forward == pytest.approx(modelled, rel=0.03)
        modelled = costs.backward_cost(run.operation, **options).bytes - 3 * z  # without what is autograd's to add
    assert backward == pytest.approx(modelled, rel=0.03)


# --- cuda ------------------------------------------------------------------------------------------------------------


emulated = pytest.mark.skipif(
    emulator.unavailable_reason() is not None, reason=f"emulator: {emulator.unavailable_reason()}"
)


@contextmanager
def emulated_gpu(processors: int, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """The description of a GPU, and the emulator with as many blocks resident as it has of this tile."""
    blocks = RESIDENT_BLOCKS_WITHOUT_TENSOR_CORES[tile] * processors
    monkeypatch.setattr(cuda_conv, "_processors", lambda device: processors)
    monkeypatch.setattr(cuda, "_workspace_sizes", {})
    with resfuse.use_backend("cuda_emulator"), emulator.device(resident_blocks=blocks):
        yield Device("small", "cuda", 1e12, {torch.float32: 1e12}, 1, 0, "made up", (8, 0), processors, 166912)


@emulated
@runs
def test_cuda(name: str, case: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(name, case, training)
    with emulated_gpu(4, (32, 64), monkeypatch) as gpu:
        with emulator.launches() as first:
            output = run.forward()
        with emulator.launches() as second:
            run.backward(output, torch.ones_like(output))
    cudnn = 2 if name == "conv_bn_act" else 0  # gradients that are torch's own, here the CPU's
    assert (first.launches, second.launches + cudnn) == run.modelled("cuda", gpu)


@emulated
@pytest.mark.parametrize(("filters", "expected"), [(256, 1), (320, 2)])
def test_cuda_launches_twice_where_not_all_blocks_are_resident(
    filters: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One multiprocessor holds four blocks of the tile 32 x 64: 256 channels."""
    x, weight, v = ones((1, 8, 4, 4), "cpu"), ones((filters, 8, 1, 1), "cpu"), torch.ones(filters)
    z = TensorInfo((1, filters, 4, 4), torch.float32)
    operation = Operation("", "conv_bn_act", (described(x),), (described(weight), *[described(v)] * 4), z)
    with emulated_gpu(1, (32, 64), monkeypatch) as gpu, emulator.launches() as found, torch.no_grad():
        resfuse.conv_bn_act(x, weight, v.clone(), v.clone(), v, v, training=True)
    assert found.launches == expected
    assert costs.forward_cost(operation, training=True, backend="cuda", device=gpu).launches == expected


def test_the_promised_blocks_are_resident() -> None:
    """As the compiler's registers have it, for every architecture that is built."""
    with RESOURCES.open() as file:
        rows = [row for row in csv.DictReader(file) if row["kernel"] == "conv_training_kernel"]
    assert len(rows) > 20
    for row in rows:
        math_name, _, tile = row["variant"].strip("<>").partition(",Tile<")
        block_m, block_n, _, _, promised = (int(number) for number in tile.partition(">")[0].split(","))
        table = RESIDENT_BLOCKS_WITHOUT_TENSOR_CORES if math_name == "Fp32" else RESIDENT_BLOCKS
        assert table[block_m, block_n] == promised <= int(row["blocks"])


# --- cpu and reference -----------------------------------------------------------------------------------------------

SMALLEST_ACTIVATION = 2048  # B: what is per channel has a hundred
_CHECKS = {"resfuse_cpu::rows_live", "resfuse_cpu::snapshot_matches"}
_FREE = ("aten::empty", "aten::detach", "aten::view", "aten::scalar_tensor", "aten::t", "aten::as_strided")


class Operators(TorchDispatchMode):
    """Counts those that move an activation; a backward convolution is one for each of the gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        largest = max((arg.nbytes for arg in args if isinstance(arg, Tensor)), default=0)
        looks = name in _CHECKS or (name == "resfuse_cpu::copy_finite" and args[1] is None)
        if largest >= SMALLEST_ACTIVATION and not looks and not name.startswith(_FREE):
            self.names += [name] * (sum(args[-1]) if name == "aten::convolution_backward" else 1)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif("cpu" not in resfuse.available_backends(), reason="the CPU library is not built")
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@runs
def test_cpu_and_reference(name: str, case: str, training: bool, backend: str) -> None:
    run = Run(name, case, training)
    with resfuse.use_backend(backend):
        with torch.no_grad():
            run.forward()  # packs weights
        with Operators() as first:
            output = run.forward()
        grad_output = torch.ones_like(output)
        with Operators() as second:
            run.backward(output, grad_output)
    found = len(first.names), len(second.names)
    assert found == run.modelled(backend, CPU, least=SMALLEST_ACTIVATION), (first.names, second.names)


# --- a GPU -----------------------------------------------------------------------------------------------------------


def kernels_of(call: Callable[[], object]) -> int:
    call()  # compiles, fills caches
    found = count_launches(call, torch.device("cuda"))
    if found is None:
        pytest.skip("the profiler records no kernels here")
    return found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
@pytest.mark.parametrize("backend", sorted({"cuda", "triton"} & set(resfuse.available_backends())))
@runs
def test_on_a_gpu(name: str, case: str, training: bool, backend: str) -> None:
    """All kernels that the profiler sees; of cuDNN's gradients there may be more than one each."""
    gpu: Any = torch.cuda.get_device_properties(0)
    device = Device(
        gpu.name, "cuda", 1e12, {torch.float32: 1e12}, gpu.total_memory, 0, "made up", (gpu.major, gpu.minor),
        gpu.multi_processor_count, gpu.shared_memory_per_block_optin,
    )  # fmt: skip
    run = Run(name, case, training, "cuda")
    forward, backward = run.modelled(backend, device)
    with resfuse.use_backend(backend):
        with torch.no_grad():
            assert kernels_of(run.forward) == forward
        if not training and name != "add_relu":
            return  # where gradients are wanted, inference also launches what is per channel
        output = run.forward()
        found = kernels_of(lambda: run.backward(output, torch.ones_like(output)))
    found -= 1  # the ones
    if backend == "cuda" and name == "conv_bn_act":
        assert found >= backward
    else:
        assert found == backward
