"""Launches of the Triton kernels: how many, in which form on which GPU, past Triton's binder, and repeatably."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import subprocess
import threading
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import torch
from torch import Tensor

import resfuse
from resfuse.backends import reference, triton
from resfuse.types import BatchNorm

if triton.unavailable_reason() is not None:
    pytest.skip(f"triton: {triton.unavailable_reason()}", allow_module_level=True)

import triton.language as tl
from triton import jit
from triton.backends.nvidia import driver as nvidia_driver

from resfuse.backends.triton import bn_act, launch, plan, reduce
from resfuse.backends.triton.config import A100, H100
from tests import shapes
from tests.backends.operands import TWO_PASSES, Operands
from tests.shapes import BOTH_FORMATS, LAYOUTS, Values

(DEVICE,) = shapes.devices_of("triton")
ONE_OR_TWO = 2 if triton.INTERPRETED else 1  # launches of a cooperative kernel
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GPUS = {gpu.name: gpu for gpu in (H100, A100)}
# (N, C, H, W) behind the convolutions of ResNet-50 and of the CIFAR networks.
ACTIVATIONS = [(n, c, size, size) for n in (1, 256) for c, size in ((64, 112), (256, 56), (512, 28), (2048, 7))]
ACTIVATIONS += [(128, c, size, size) for c, size in ((16, 32), (64, 8))]


@pytest.mark.parametrize("layout", BOTH_FORMATS)
def test_every_kernel_is_one_launch(layout: str) -> None:
    for name, call in Operands(triton, (3, 16, 9, 8), torch.float32, DEVICE, layout).calls().items():
        with launch.recorded() as names:
            call()
        assert len(names) == (ONE_OR_TWO if name in TWO_PASSES else 1), name


@pytest.mark.parametrize("frozen", [False, True])
def test_launches_of_a_convolution(frozen: bool) -> None:
    x = LAYOUTS["nhwc"](Values(torch.float32, DEVICE).normal(3, 16, 9, 8)).requires_grad_(not frozen)
    mean, var = torch.zeros(16, device=DEVICE), torch.ones(16, device=DEVICE)
    w = torch.ones(16, 16, 1, 1, device=DEVICE, requires_grad=True)
    with resfuse.use_backend("triton"), launch.recorded() as names:
        with torch.no_grad():
            resfuse.conv_bn_act(x, w, mean, var, residual=x)
        assert names == ["conv_bn_act_kernel"]
        names.clear()
        output = resfuse.conv_bn_act(x, w, mean, var, residual=x, training=True)
        assert names == ["conv_bn_act_train_kernel"] * ONE_OR_TWO
        names.clear()
        output.sum().backward()
    assert names == ["bn_backward_kernel"] * ONE_OR_TWO  # the convolution's gradients are PyTorch's


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("layout", BOTH_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions_take_one_launch_on_a_gpu(dtype: torch.dtype, layout: str, gpu: str) -> None:
    """All programs are resident: one of a program per multiprocessor at most, whatever it needs."""
    for shape in ACTIVATIONS:
        x = torch.empty(shape, dtype=dtype, device="meta").contiguous(
            memory_format=torch.channels_last if layout == "nhwc" else torch.contiguous_format
        )
        v = torch.empty(shape[1], device="meta")
        with launch.collected(GPUS[gpu]) as specs:
            triton.bn_act_forward(x, BatchNorm(v, v, v, v, True, 0.1, 1e-5), None, True)
            triton.bn_act_backward(x, x, x, v, None, v, v, True, True, True, True)
            triton.bn_statistics(x)
        assert len(specs) == 3
        for spec in specs:
            assert spec.options["launch_cooperative_grid"] and spec.constants["PHASE"] == 0
            assert GPUS[gpu].num_sms // 2 < spec.grid[0] <= GPUS[gpu].num_sms or x.numel() < 2**20
            assert spec.options["num_warps"] <= 16


def test_two_launches_where_the_grid_is_not_resident() -> None:
    x = torch.empty(2, 20_000, 3, 3, device="meta").contiguous(memory_format=torch.channels_last)
    with launch.collected(A100) as specs:
        triton.bn_statistics(x)
    forms = [(spec.constants["PHASE"], spec.options["launch_cooperative_grid"]) for spec in specs]
    assert forms == [(1, False), (2, False)]


def test_offsets_within_a_tile_fit_32_bits() -> None:
    """Those of tiles have 64; here of images with 2^28 and 2^32 pixels, and of 2^32 channels."""
    for shape, layout in (((1, 8, 2**14, 2**14), "nchw"), ((1, 2, 2**16, 2**16), "nchw"), ((3, 2**32, 1, 1), "nhwc")):
        for work in (plan.REDUCTION, plan.ELEMENTWISE):
            tile = plan._batch_norm_plan(torch.Size(shape), layout == "nhwc", torch.bfloat16, work, H100).tile
            _, channels, h, w = shape
            if layout == "nhwc":
                assert (tile.block_m - 1) * channels + tile.block_n <= 2**31 or tile.block_m == 1
            else:
                assert (tile.block_n - 1) * h * w + tile.block_m <= 2**31


def test_resident_programs() -> None:
    assert H100.resident_programs(16) == 132
    assert H100.resident_programs(8, registers=128) == 2 * 132
    assert H100.resident_programs(8, registers=129) == 132  # registers come in eights: 136
    assert A100.resident_programs(4, registers=32, shared_memory=80 << 10) == 2 * 108


# --- the grid barrier ------------------------------------------------------------------------------------------------


@jit
def arrive_kernel(word_ptr, before_ptr):
    tl.store(before_ptr + tl.program_id(0), reduce.arrive(word_ptr, tl.num_programs(0)))


@jit
def has_opened_kernel(word_ptr, before_ptr, opened_ptr):
    program = tl.program_id(0)
    opened = reduce.has_opened(tl.load(word_ptr), tl.load(before_ptr + program))
    tl.store(opened_ptr + program, opened.to(tl.int32))


def test_barrier_word() -> None:
    """Whatever the grids: the word's top bit flips with every barrier, the others are zero, and nothing is reset."""
    word = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    flipped = False
    for programs in (1, 2, 50, 1, 3, 27, 1, 1, 2):
        before = torch.zeros(programs, dtype=torch.int32, device=DEVICE)
        launch.launch(arrive_kernel, programs, word, before)
        flipped = not flipped
        assert word.item() == (-(2**31) if flipped else 0)
        opened = torch.empty_like(before)
        launch.launch(has_opened_kernel, programs, word, before, opened)
        assert opened.all()


# --- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not triton.INTERPRETED, reason="on a GPU the number of parts follows from the device")
@pytest.mark.parametrize("layout", BOTH_FORMATS)
def test_statistics_do_not_depend_on_the_number_of_parts(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More parts than a block of them, parts with fewer tiles than others, and a last tile that is not full."""
    x = Values(torch.float32, DEVICE).normal(3, 5, 41, 43, mean=100.0)
    mean, m2 = reference.bn_statistics(x.double())
    monkeypatch.setattr(bn_act, "REDUCTION", plan.Work(32, 16, 8))
    for programs in (1, 2, 3, 7, 1000):
        device = launch.properties(x.device)._replace(num_sms=programs)
        monkeypatch.setattr(bn_act, "properties", lambda _, device=device: device)
        found_mean, found_m2 = triton.bn_statistics(LAYOUTS[layout](x))
        torch.testing.assert_close(found_mean.double(), mean, rtol=1e-7, atol=0)  # one rounding, of the result
        torch.testing.assert_close(found_m2.double(), m2, rtol=5e-7, atol=0)


def test_why_kernels_cannot_be_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles C when it launches first: that it cannot is a reason, not an exception in a forward."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    reason = triton.launch_failure.__wrapped__()
    assert reason is not None and ("C compiler" in reason or not hasattr(nvidia_driver, "make_launcher"))
    monkeypatch.setenv("CC", "cc")
    failing, working = Mock(), Mock()
    failing.active.get_current_device.side_effect = subprocess.CalledProcessError(1, ["cc", "main.c"])
    for driver, expected in ((failing, "CalledProcessError: Command '['cc', 'main.c']' returned"), (working, None)):
        monkeypatch.setattr("triton.runtime.driver", driver)
        reason = triton.launch_failure.__wrapped__()
        assert reason is expected or (reason and expected and expected in reason)


# --- words through which programs meet -------------------------------------------------------------------------------


class FakeGPU:
    """Torch's allocator as far as it matters here: a memory pool is in force for a thread, and zeros are launches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.capturing, self.in_pool = 1, False, 0
        self.filled: list[int] = []
        thread, zeros = threading.get_ident(), torch.zeros

        def allocate(size: int, **_: Any) -> Tensor:
            self.filled.append(size)
            self.in_pool += threading.get_ident() == thread
            return zeros(size, dtype=torch.int32)

        monkeypatch.setattr(launch, "INTERPRETED", False)
        monkeypatch.setattr(launch, "_arenas", {})
        monkeypatch.setattr(launch, "_words", {})
        monkeypatch.setattr(launch, "_refused", set())
        monkeypatch.setattr(launch, "driver", MagicMock())
        launch.driver.active.get_current_stream = lambda _: self.stream
        monkeypatch.setattr(torch, "zeros", allocate)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())

    def words(self, size: int = 1, purpose: str = "barrier", device: str = "cuda:0") -> Tensor:
        return launch.shared_words(purpose, torch.device(device), size)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGPU:
    if torch.cuda.is_available():
        pytest.skip("stands for a GPU")
    return FakeGPU(monkeypatch)


def overlap(a: Tensor, b: Tensor) -> bool:
    first, second = sorted((one.data_ptr(), one.data_ptr() + 4 * one.numel()) for one in (a, b))
    return first[1] > second[0]


def test_words_that_live_on_are_in_no_memory_pool(gpu: FakeGPU) -> None:
    """`torch.compile(mode="reduce-overhead")` warms up inside a graph's pool and rejects what stays there."""
    first = gpu.words()
    assert gpu.words() is first, "launches of a stream come one after the other"
    others = [gpu.words(purpose="arrivals"), gpu.words(5000, "arrivals"), gpu.words(device="cuda:1")]
    gpu.stream = 2
    others.append(gpu.words())
    assert not any(overlap(first, other) for other in others)
    assert gpu.filled == [launch.ARENA_WORDS] * 2, "one arena per device"
    assert gpu.in_pool == 0


def test_captured_launches_have_words_of_their_own_and_fill_none(gpu: FakeGPU) -> None:
    eager = gpu.words()
    gpu.capturing, gpu.filled = True, []
    captured = [gpu.words() for _ in range(3)] + [gpu.words(53, "arrivals")]
    assert gpu.filled == []
    for one, other in itertools.combinations([eager, *captured], 2):
        assert not overlap(one, other)
    gpu.capturing = False
    assert gpu.words() is eager


def test_without_an_arena_or_enough_of_it_words_are_filled_at_each_call(gpu: FakeGPU) -> None:
    gpu.capturing = True
    assert gpu.words(7).numel() == 7 and gpu.filled == [7] and gpu.in_pool == 1
    gpu.capturing, gpu.filled = False, []
    assert gpu.words(launch.ARENA_WORDS + 1).numel() > launch.ARENA_WORDS
    assert gpu.words(3).numel() >= 3
    assert gpu.filled == [launch.ARENA_WORDS, launch.ARENA_WORDS + 1]


def test_two_launches_where_the_driver_refuses_a_cooperative_one(
    gpu: FakeGPU, caplog: pytest.LogCaptureFixture
) -> None:
    """Under MPS or in a green context fewer programs are resident than the device could hold."""
    device, phases = torch.device("cuda:0"), list[int]()

    def run(phase: int, word: Tensor | None) -> None:
        phases.append(phase)
        assert (word is not None) == (phase == 0)
        if phase == 0:
            raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")

    for _ in range(2):
        launch.in_phases(plan.COOPERATIVE, device, run)
    assert phases == [0, 1, 2, 1, 2] and "too many blocks" in caplog.text

    def fails(phase: int, word: Tensor | None) -> None:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        launch.in_phases(plan.COOPERATIVE, torch.device("cuda:1"), fails)


# --- past Triton's binder --------------------------------------------------------------------------------------------


def compiled_kernel() -> MagicMock:
    """Stands for a kernel under triton.jit: `kernel[grid]` binds and launches, its result's `run` launches directly."""
    kernel = MagicMock(__name__="kernel")
    kernel.bound = kernel.__getitem__.return_value
    kernel.compiled = kernel.bound.return_value
    return kernel


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    if torch.cuda.is_available():
        pytest.skip("stands for a GPU")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "takes_direct_calls", lambda _: True)
    monkeypatch.setattr(launch, "driver", MagicMock())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # as get_device() of a CPU tensor
    monkeypatch.setattr(launch, "_compiled", {})
    return compiled_kernel()


def test_the_same_signature_is_called_directly(kernel: MagicMock) -> None:
    """Another grid, another pointer and another float are arguments, as ever."""
    x, y = torch.empty(64), torch.empty(64)
    assert x.data_ptr() % 16 == y.data_ptr() % 16 == 0
    launch.launch(kernel, 3, x, None, 64, 0.5, BLOCK=32)
    kernel.compiled.run.assert_not_called()
    launch.launch(kernel, 5, y, None, 64, 0.25, BLOCK=32)
    kernel.bound.assert_called_once()
    stream, found = launch.driver.active.get_current_stream(-1), kernel.compiled
    found.run.assert_called_once_with(
        5, 1, 1, stream, found.function, found.packed_metadata, None, None, None, y.data_ptr(), None, 64, 0.25, 32
    )


@pytest.mark.parametrize(
    "change",
    [
        {"second": torch.empty(64, dtype=torch.bfloat16)}, {"second": torch.empty(65)[1:]}, {"second": None}, {"n": 65},
        {"BLOCK": 64}, {"num_warps": 8}, {"num_stages": 2}, {"cooperative": True}, {"kernel": compiled_kernel()},
    ],
    ids=["dtype", "misaligned", "absent", "n", "BLOCK", "num_warps", "num_stages", "cooperative", "kernel"],
)  # fmt: skip
def test_another_signature_is_bound_by_triton(change: dict[str, Any], kernel: MagicMock) -> None:
    x = torch.empty(64)
    usual = {"kernel": kernel, "second": torch.empty(64), "n": 64, "BLOCK": 32, "num_warps": 4}

    def run(kernel: Any, second: Tensor | None, n: int, **options: Any) -> None:
        launch.launch(kernel, 1, x, second, n, **options)

    run(**usual)  # type: ignore[arg-type]
    other = (usual | change)["kernel"]
    run(**(usual | change))  # type: ignore[arg-type]
    assert other.bound.call_count == (1 if other is not kernel else 2)
    kernel.compiled.run.assert_not_called()
    run(**(usual | change))  # type: ignore[arg-type]
    second = change.get("second")
    aligned = second is None or second.data_ptr() % 16 == 0
    assert other.compiled.run.call_count == aligned, "a misaligned tensor is never passed directly"


def test_the_installed_launcher_takes_direct_calls() -> None:
    from triton.backends.nvidia.driver import CudaLauncher

    assert launch.takes_direct_calls(CudaLauncher)


@pytest.mark.parametrize(
    ("parameters", "direct"),
    [
        ("self, gridX, gridY, gridZ, stream, function, *args", True),  # 3.6
        ("self, gridX, gridY, gridZ, stream, function, kernel_metadata, launch_metadata, launch_enter_hook, "
         "launch_exit_hook, *args", True),  # 3.7 to 3.9
        ("self, gridX, gridY, gridZ, function, stream, *args", False),
        ("self, gridX, gridY, gridZ, *args", False),
        ("self, gridX, gridY, gridZ, stream, function, args", False),
    ],
)  # fmt: skip
def test_launchers_of_other_releases(parameters: str, direct: bool) -> None:
    launcher = type("Launcher", (), {"__call__": eval(f"lambda {parameters}: None")})
    assert launch.takes_direct_calls(launcher) is direct


def test_profilers_see_every_launch(kernel: MagicMock, monkeypatch: pytest.MonkeyPatch) -> None:
    for hooks in ([], [print]):
        monkeypatch.setattr(launch.knobs.runtime.launch_enter_hook, "calls", hooks)
        launch.launch(kernel, 1, torch.empty(64), BLOCK=32)
    assert kernel.bound.call_count == 2


def test_remembered_signatures_are_bounded(kernel: MagicMock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MOST_COMPILED", 4)
    for n in range(2, 20):
        launch.launch(kernel, 1, torch.empty(64), n, BLOCK=32)
    assert len(launch._compiled) <= 4
