"""How the Triton kernels are launched: how often, in which form on which GPU, past Triton's binder, and repeatably."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import resfuse
from resfuse.backends import reference, triton

if triton.unavailable_reason() is not None:
    pytest.skip(f"triton: {triton.unavailable_reason()}", allow_module_level=True)

import triton.language as tl
from triton import jit

from resfuse.backends.triton import barrier, bn_act, bn_plan, launch, verbs
from tests import shapes
from tests.shapes import BOTH_FORMATS, LAYOUTS, Values

(DEVICE,) = shapes.devices_of("triton")
ONE_OR_TWO = 2 if triton.INTERPRETED else 1  # launches of a cooperative kernel
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GPUS = {gpu.name: gpu for gpu in (launch.H100, launch.A100)}
# (N, C, H, W) behind the convolutions of ResNet-50 and of the CIFAR networks.
ACTIVATIONS = [(n, c, size, size) for n in (1, 32, 256) for c, size in ((64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))]  # fmt: skip  # noqa: E501
ACTIVATIONS += [(128, c, size, size) for c, size in ((16, 32), (32, 16), (64, 8))]

Call = Callable[[], object]


def calls(x: Tensor) -> dict[str, tuple[Call, int]]:
    """Verb -> (a call, the launches it is allowed) on an activation; cooperative ones count as one."""
    v = torch.ones(x.shape[1], device=x.device)
    w = torch.ones(x.shape[1], x.shape[1], 1, 1, dtype=x.dtype, device=x.device)
    conv = ((1, 1), (0, 0), (1, 1), 1)

    def bn_forward(training: bool) -> Call:
        return lambda: verbs.bn_act_forward(x, v, v, v, v, x, True, training, 0.1, 1e-5)

    def bn_backward(training: bool, needs_input: bool = True) -> Call:
        return lambda: verbs.bn_act_backward(x, x, x, v, v, v, training, needs_input, True)

    def conv_forward(training: bool) -> Call:
        return lambda: verbs.conv_bn_act_forward(x, w, v, v, v, v, v, x, True, *conv, training, 0.1, 1e-5)

    return {
        "add_relu_forward": (lambda: verbs.add_relu_forward(x, x), 1),
        "add_relu_backward": (lambda: verbs.add_relu_backward(x, x), 1),
        "bn_act_forward, train": (bn_forward(True), ONE_OR_TWO),
        "bn_act_forward, eval": (bn_forward(False), 1),
        "bn_act_backward, train": (bn_backward(True), ONE_OR_TWO),
        "bn_act_backward, train, frozen input": (bn_backward(True, False), ONE_OR_TWO),
        "bn_act_backward, eval": (bn_backward(False), ONE_OR_TWO),
        "bn_statistics": (lambda: verbs.bn_statistics(x), ONE_OR_TWO),
        "bn_apply": (lambda: verbs.bn_apply(x, v, v, v, v, x, True), 1),
        "bn_backward_reduce": (lambda: verbs.bn_backward_reduce(x, x, x, v, v), ONE_OR_TWO),
        "bn_backward_apply": (lambda: verbs.bn_backward_apply(x, x, x, v, v, v, v, v, 7), 1),
        "conv_forward": (lambda: verbs.conv_forward(x, w, v, *conv), 1),
        "conv_bn_act_forward, eval": (conv_forward(False), 1),
        "conv_bn_act_forward, train": (conv_forward(True), ONE_OR_TWO),
    }


@pytest.mark.parametrize("verb", calls(torch.empty(1, 1, 1, 1)))
@pytest.mark.parametrize("layout", BOTH_FORMATS)
def test_launches_of_a_verb(layout: str, verb: str) -> None:
    call, allowed = calls(LAYOUTS[layout](Values(torch.float32, DEVICE).normal(3, 16, 9, 8)))[verb]
    with launch.recorded() as names:
        call()
    assert len(names) == allowed, names


def test_launches_of_a_training_step() -> None:
    x = LAYOUTS["nhwc"](Values(torch.float32, DEVICE).normal(3, 16, 9, 8)).requires_grad_()
    mean, var = torch.zeros(16, device=DEVICE), torch.ones(16, device=DEVICE)
    with resfuse.use_backend("triton"), launch.recorded() as names:
        output = resfuse.bn_act(x, mean, var, residual=x, training=True)
        assert names == ["bn_train_forward_kernel"] * ONE_OR_TWO
        names.clear()
        output.sum().backward()
    assert names == ["bn_backward_kernel"] * ONE_OR_TWO


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
            bn_act.train_forward(x, None, x, v, v, v, v, v, v, 0.1, 1e-5, True)
            bn_act.backward(x, x, x, v, v, v, x, x, v, v, True)
            bn_act.statistics(x, v, v)
        assert len(specs) == 3
        for spec in specs:
            assert spec.cooperative and spec.constants["PHASE"] == 0
            assert GPUS[gpu].num_sms // 2 < spec.grid[0] <= GPUS[gpu].num_sms or x.numel() < 2**20
            assert spec.num_warps <= 16


def test_two_launches_where_the_grid_is_not_resident() -> None:
    x = torch.empty(2, 20_000, 3, 3, dtype=torch.float32, device="meta").contiguous(memory_format=torch.channels_last)
    v = torch.empty(20_000, device="meta")
    with launch.collected(launch.A100) as specs:
        bn_act.statistics(x, v, v)
    assert [(spec.constants["PHASE"], spec.cooperative) for spec in specs] == [(1, False), (2, False)]
    with launch.collected(launch.A100), pytest.raises(ValueError, match="launches: one launch is not possible"):
        bn_act.statistics(x, v, v, launches=1)


def test_the_form_can_be_asked_for() -> None:
    x, v = torch.empty(2, 64, 8, 8, device="meta"), torch.empty(64, device="meta")
    for launches, phases in ((None, [0]), (1, [0]), (2, [1, 2])):
        with launch.collected(launch.H100) as specs:
            bn_act.statistics(x, v, v, launches=launches)
        assert [spec.constants["PHASE"] for spec in specs] == phases
    with launch.collected(launch.H100), pytest.raises(ValueError, match="launches: expected 1, 2 or None, got 3"):
        bn_act.statistics(x, v, v, launches=3)


@pytest.mark.skipif(not triton.INTERPRETED, reason="of the interpreter")
def test_the_interpreter_has_no_grid_barrier() -> None:
    x, v = torch.ones(2, 4, 3, 3), torch.empty(4)
    with pytest.raises(ValueError, match="launches: one launch is not possible, the interpreter"):
        bn_act.statistics(x, v, v, launches=1)


def test_offsets_within_a_tile_fit_32_bits() -> None:
    """Those of tiles have 64; here of images with 2^28 and 2^32 pixels, and of 2^32 channels."""
    for shape, layout in (((1, 8, 2**14, 2**14), "nchw"), ((1, 2, 2**16, 2**16), "nchw"), ((3, 2**32, 1, 1), "nhwc")):
        for work in (bn_plan.REDUCTION, bn_plan.ELEMENTWISE):
            cut = bn_plan.plan(torch.Size(shape), layout == "nhwc", 2, work, 132)
            _, channels, h, w = shape
            if layout == "nhwc":
                assert (cut.block_m - 1) * channels + cut.block_n <= 2**31 or cut.block_m == 1
            else:
                assert (cut.block_n - 1) * h * w + cut.block_m <= 2**31


def test_resident_programs() -> None:
    assert launch.resident_programs(launch.H100, 16) == 132
    assert launch.resident_programs(launch.H100, 8, registers=128) == 2 * 132
    assert launch.resident_programs(launch.H100, 8, registers=129) == 132  # registers come in eights: 136
    assert launch.resident_programs(launch.A100, 4, registers=32, shared_memory=80 << 10) == 2 * 108


# --- the grid barrier ------------------------------------------------------------------------------------------------


@jit
def arrive_kernel(word_ptr, before_ptr):
    tl.store(before_ptr + tl.program_id(0), barrier.arrive(word_ptr, tl.num_programs(0)))


@jit
def has_opened_kernel(word_ptr, before_ptr, opened_ptr):
    program = tl.program_id(0)
    opened = barrier.has_opened(tl.load(word_ptr), tl.load(before_ptr + program))
    tl.store(opened_ptr + program, opened.to(tl.int32))


def has_opened(word: Tensor, before: Tensor) -> list[bool]:
    opened = torch.empty_like(before)
    launch.launch(has_opened_kernel, (len(before),), word, before, opened)
    return opened.bool().tolist()


def test_barrier_word() -> None:
    """Whatever the grids: the word's top bit flips with every barrier, the others are zero, and nothing is reset."""
    word = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    flipped = False
    for programs in (1, 2, 50, 1, 3, 27, 1, 1, 2):
        before = torch.zeros(programs, dtype=torch.int32, device=DEVICE)
        launch.launch(arrive_kernel, (programs,), word, before)
        flipped = not flipped
        assert word.item() == (-(2**31) if flipped else 0)
        assert all(has_opened(word, before))


@pytest.mark.parametrize("seed", range(10))
def test_barrier_opens_with_the_last_arrival(seed: int) -> None:
    """Whoever comes first: nobody passes before the last has arrived."""
    order, value = random.Random(seed), 0
    for programs in (1, 2, 132, 1, 3, 108, 264, 1, 1, 2):
        arrivals = [-(2**31) - (programs - 1), *[1] * (programs - 1)]
        order.shuffle(arrivals)
        seen: list[int] = []
        for arrival in arrivals:
            assert not any((value ^ before) < 0 for before in seen)
            seen.append(value)
            value = (value + arrival + 2**31) % 2**32 - 2**31  # in 32 bits
        assert all((value ^ before) < 0 for before in seen)


# --- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not triton.INTERPRETED, reason="on a GPU the number of parts follows from the device")
@pytest.mark.parametrize("layout", BOTH_FORMATS)
def test_statistics_do_not_depend_on_the_number_of_parts(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More parts than a block of them, parts with fewer tiles than others, and a last tile that is not full."""
    x = Values(torch.float32, DEVICE).normal(3, 5, 41, 43, mean=100.0)
    mean, m2 = reference.bn_statistics(x.double())
    for programs in (1, 2, 3, 7, 1000):
        monkeypatch.setattr(bn_plan, "INTERPRETED_PROGRAMS", programs)
        monkeypatch.setattr(bn_plan, "REDUCTION", bn_plan.Work(32, 16, 8))
        found_mean, found_m2 = verbs.bn_statistics(LAYOUTS[layout](x))
        torch.testing.assert_close(found_mean.double(), mean, rtol=1e-7, atol=0)  # one rounding, of the result
        torch.testing.assert_close(found_m2.double(), m2, rtol=5e-7, atol=0)


@pytest.mark.parametrize("layout", BOTH_FORMATS)
def test_a_mean_as_large_as_float32_allows(layout: str) -> None:
    """Deviations of single units in the last place of the mean: they are exact, and so is their variance."""
    x = LAYOUTS[layout]((4096 + torch.randint(-3, 4, (4, 6, 23, 29)) * 2.0**-11).to(DEVICE))
    mean, m2 = reference.bn_statistics(x.double())
    found_mean, found_m2 = verbs.bn_statistics(x)
    torch.testing.assert_close(found_mean.double(), mean, rtol=2**-24, atol=0)
    torch.testing.assert_close(found_m2.double(), m2, rtol=5e-7, atol=0)


@pytest.mark.parametrize("layout", BOTH_FORMATS)
def test_nan_stays_in_its_channel(layout: str) -> None:
    x = LAYOUTS[layout](Values(torch.float32, DEVICE).normal(3, 40, 13, 11))
    x[1, 7, 5, 5] = torch.nan
    mean, var = torch.zeros(40, device=DEVICE), torch.ones(40, device=DEVICE)
    output, *statistics = verbs.bn_act_forward(x, mean, var, None, None, None, True, True, 0.1, 1e-5)
    for tensor in (mean, var, *statistics):
        assert tensor is not None
        assert tensor.isnan().nonzero().flatten().tolist() == [7]
    assert output.isnan().any((0, 2, 3)).nonzero().flatten().tolist() == [7]
    assert output[:, 7].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", BOTH_FORMATS)
def test_two_runs_give_the_same_bits(layout: str, dtype: torch.dtype) -> None:
    x, dy = (LAYOUTS[layout](Values(dtype, DEVICE, seed).normal(3, 70, 17, 19)) for seed in (0, 1))
    weight, bias = (Values(torch.float32, DEVICE, seed).normal(70) for seed in (2, 3))

    def run() -> list[Tensor | None]:
        running = torch.zeros(70, device=DEVICE), torch.ones(70, device=DEVICE)
        y, mean, invstd = verbs.bn_act_forward(x, *running, weight, bias, dy, True, True, 0.1, 1e-5)
        assert mean is not None and invstd is not None
        return [y, mean, invstd, *running, *verbs.bn_act_backward(dy, x, y, weight, mean, invstd, True, True, True)]

    for first, second in zip(run(), run(), strict=True):
        assert first is not None and second is not None
        assert torch.equal(first, second)


# --- past Triton's binder --------------------------------------------------------------------------------------------


class Binder:
    """Stands for a kernel under triton.jit: counts what goes its own way, and what calls the compiled kernel."""

    __name__ = "kernel"

    def __init__(self) -> None:
        self.fn = object()
        self.bound: list[tuple[Any, ...]] = []
        self.called: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        def run(*args: Any, **options: Any) -> object:
            self.bound.append(args)
            return SimpleNamespace(
                function=1, packed_metadata=(4, 1, 0), run=lambda *args: self.called.append((grid, args))
            )

        return run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Binder:
    if torch.cuda.is_available():
        pytest.skip("stands for a GPU")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "HAS_DIRECT_CALL", True)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda _: 77)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # as get_device() of a CPU tensor
    monkeypatch.setattr(launch, "_compiled", {})
    return Binder()


def test_the_same_signature_is_called_directly(kernel: Binder) -> None:
    x, y = torch.empty(64), torch.empty(64)
    assert x.data_ptr() % 16 == y.data_ptr() % 16 == 0
    launch.launch(kernel, (3,), x, None, 64, 0.5, BLOCK=32)
    launch.launch(kernel, (5, 2), y, None, 64, 0.25, BLOCK=32)
    assert (len(kernel.bound), len(kernel.called)) == (1, 1)
    # Another grid, another pointer and another float are arguments, as ever.
    assert kernel.called == [((3,), (5, 2, 1, 77, 1, (4, 1, 0), None, None, None, y.data_ptr(), None, 64, 0.25, 32))]


@pytest.mark.parametrize(
    "change",
    ["dtype", "misaligned", "integer", "absent", "constant", "num_warps", "num_stages", "cooperative", "kernel"],
)
def test_another_signature_is_bound_by_triton(change: str, kernel: Binder) -> None:
    x, args = torch.empty(64), {"second": torch.empty(64), "n": 64, "BLOCK": 32}
    options = {"num_warps": 4, "num_stages": 3, "cooperative": False}

    def run(kernel: Binder) -> None:
        launch.launch(kernel, (1,), x, args["second"], args["n"], BLOCK=args["BLOCK"], **options)  # type: ignore[arg-type]

    run(kernel)
    values: dict[str, tuple[str, Any]] = {
        "dtype": ("second", torch.empty(64, dtype=torch.bfloat16)),
        "misaligned": ("second", torch.empty(65)[1:]),
        "integer": ("n", 65),  # no multiple of 16 any more
        "absent": ("second", None),
        "constant": ("BLOCK", 64),
    }
    other = Binder() if change == "kernel" else kernel
    if change in values:
        args[values[change][0]] = values[change][1]
    elif change in options:
        options[change] = {"num_warps": 8, "num_stages": 2, "cooperative": True}[change]
    run(other)
    assert (len(kernel.bound) + (len(other.bound) if other is not kernel else 0), kernel.called) == (2, [])
    run(other)  # what is misaligned is never called directly
    assert len(other.called) == (change != "misaligned")


def test_profilers_see_every_launch(kernel: Binder, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(64)
    launch.launch(kernel, (1,), x, BLOCK=32)
    monkeypatch.setattr(launch.knobs.runtime.launch_enter_hook, "calls", [print])
    launch.launch(kernel, (1,), x, BLOCK=32)
    assert (len(kernel.bound), kernel.called) == (2, [])


def test_what_is_remembered_is_bounded(kernel: Binder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MOST_COMPILED", 4)
    for n in range(2, 20):
        launch.launch(kernel, (1,), torch.empty(64), n, BLOCK=32)
    assert len(launch._compiled) <= 4
