"""Triton's convolution kernels: tiles, split sums, persistent programs, packing, and the forms of training.

Everything here runs in the interpreter and, with the same tolerances, on a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import resfuse
from resfuse.backends import stems, triton
from resfuse.types import BatchNorm
from resfuse.types import Convolution as Settings

if triton.unavailable_reason() is not None:
    pytest.skip(f"triton: {triton.unavailable_reason()}", allow_module_level=True)

from resfuse.backends.triton import conv_bn_act, launch, plan
from resfuse.backends.triton.config import A100, H100, ConvConfig, ConvProblem, DeviceProperties
from tests import contract, shapes
from tests.shapes import CONVOLUTIONS, Convolution, conv_bn_act_call

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

(DEVICE,) = shapes.devices_of("triton")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
UNIT = Settings((1, 1), (0, 0), (1, 1), 1)

TILES = {
    "one_tile": ConvConfig(256, 64, 64, 8, 3),
    "many_small_tiles": ConvConfig(16, 16, 16, 4, 2),
    "wide": ConvConfig(32, 64, 32, 4, 4),
    "tall": ConvConfig(128, 16, 16, 4, 3),
    "bands_of_three": ConvConfig(16, 16, 32, 4, 3, group_m=3),
}
SPLIT = ConvConfig(32, 16, 16, 4, 3, split_k=4)
# Tails in M (5*7 pixels), N (24 channels) and K (72), at every tap.
TAILS = Convolution((1, 72, 5, 7), 24, (3, 1), padding=(1, 0))


def check(
    conv: Convolution, dtype: torch.dtype, training: bool, config: ConvConfig | None = None, mean: float = 0.0
) -> contract.Results:
    """Output and running statistics against the contract, with the configuration given or chosen."""
    call = conv_bn_act_call(
        conv, dtype, DEVICE, layout="nhwc", residual_layout="nhwc", conv_bias=True, training=training, mean=mean
    )
    with resfuse.use_backend("triton"), plan.forced("train" if training else "forward", config):
        return contract.check(call, needs_grad=[])


@pytest.fixture
def one_multiprocessor(monkeypatch: pytest.MonkeyPatch) -> None:
    """One or two programs are resident: each of them has many tiles."""
    few = launch.properties(torch.device(DEVICE, 0))._replace(num_sms=1)
    monkeypatch.setattr(conv_bn_act, "properties", lambda device: few)


@MODES
@pytest.mark.parametrize("tile", TILES)
def test_tiles(tile: str, training: bool) -> None:
    for conv in (TAILS, CONVOLUTIONS["1x1_stride2_odd"], CONVOLUTIONS["stem"]):
        check(conv, torch.bfloat16, training, TILES[tile])


@DTYPES
def test_split_k(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs share a sum, in one launch; the counters of arrivals are left at zero."""
    counters: list[Tensor] = []

    def kept(purpose: str, device: torch.device, size: int) -> Tensor:
        counters.append(torch.zeros(size, dtype=torch.int32, device=device))
        return counters[-1]

    monkeypatch.setattr(conv_bn_act, "shared_words", kept)
    for conv in (TAILS, CONVOLUTIONS["1x1"], CONVOLUTIONS["to_one_pixel"]):
        with launch.recorded() as names:
            check(conv, dtype, False, SPLIT)
        assert set(names) == {"conv_bn_act_kernel"}
    assert counters and not any(counter.any() for counter in counters)


@pytest.mark.parametrize(("channels", "split_k"), [(512, 4), (48, 2), (16, 1)])
def test_split_k_is_at_most_the_number_of_steps(channels: int, split_k: int) -> None:
    with plan.forced("forward", SPLIT):
        x, w = meta(1, channels, 7, 7), meta(512, channels, 3, 3)
        chosen = plan.conv_plan("forward", x, w, UNIT._replace(padding=(1, 1)), H100)
    assert chosen.config.split_k == split_k
    with plan.forced("train", SPLIT):
        assert plan.conv_plan("train", x, w, UNIT, H100).constants.split_k == 1, "batch statistics need whole sums"


@pytest.mark.usefixtures("one_multiprocessor")
@DTYPES
def test_persistent_programs(dtype: torch.dtype) -> None:
    """Each program has several tiles, and computes the same bits."""
    tile = ConvConfig(16, 16, 32, 4, 3, group_m=2)
    expected, found = (check(TAILS, dtype, False, tile._replace(persistent=value)) for value in (False, True))
    assert torch.equal(found["output"], expected["output"])


@pytest.mark.usefixtures("one_multiprocessor")
@DTYPES
def test_training_with_several_tiles_per_program(dtype: torch.dtype) -> None:
    for conv in (TAILS, CONVOLUTIONS["1x1"], CONVOLUTIONS["depthwise"]):
        for mean in (0.0, 30.0):
            check(conv, dtype, True, ConvConfig(16, 16, 32, 4, 3), mean)


def test_results_repeat() -> None:
    for training, config in ((False, SPLIT), (True, ConvConfig(16, 16, 32, 4, 2))):
        first, second = (check(TAILS, torch.bfloat16, training, config) for _ in range(2))
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), name


GROUPED = {
    "resnext_4d": (Convolution((1, 128, 6, 5), 128, (3, 3), padding=(1, 1), groups=32), 8),
    "wide_groups": (Convolution((1, 96, 5, 5), 64, (3, 3), padding=(1, 1), groups=2), 1),
    "odd_number_of_groups": (Convolution((2, 55, 5, 5), 33, (1, 1), groups=11), 4),
}


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GROUPED)
def test_groups(name: str, dtype: torch.dtype, training: bool) -> None:
    """Narrow groups are multiplied as one block-diagonal matrix, which covers all of them for any number of groups."""
    conv, packed = GROUPED[name]
    problem = conv_problem(conv)
    assert plan.packing(problem) == (packed, False)
    tiled = plan.tile_problem(problem)
    assert tiled.groups * packed >= conv.groups and tiled.group_in == packed * conv.weight[1]
    check(conv, dtype, training)


def test_non_finite_padding_is_never_read() -> None:
    """The image is the middle of a larger one of NaN: no mask of the padding lets a neighbour through."""
    conv = CONVOLUTIONS["3x3"]
    n, c, h, w = conv.input
    room = torch.full((n + 2, c, h, w), math.nan, device=DEVICE).contiguous(memory_format=torch.channels_last)
    x = room[1:-1]
    x.copy_(torch.randn(conv.input))
    weight = torch.randn(conv.weight, device=DEVICE)
    z = triton.conv_forward(x, weight, None, conv.settings)
    torch.testing.assert_close(z, F.conv2d(x, weight, None, *conv.settings), rtol=1e-4, atol=1e-4)


def test_a_filter_row_is_packed_where_channels_are_few() -> None:
    """Rows of 7 taps with 3 channels are 21 neighbours in memory, unless the taps have gaps."""
    stem = conv_problem(Convolution((1, 3, 32, 32), 64, (7, 7), (2, 2), (3, 3)))
    assert plan.packing(stem) == (1, True)
    tiled = plan.tile_problem(stem)
    assert (tiled.c, tiled.s, tiled.oh, tiled.ow, tiled.gemm[2]) == (21, 1, 16, 16, 147)
    for other in (stem._replace(dilation=(1, 2)), stem._replace(c=32), stem._replace(r=1, s=1)):
        assert plan.packing(other) == (1, False)


@DTYPES
@MODES
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "nchw_slice_of_channels", "nhwc_slice_of_columns", "transposed"])
def test_few_channels_are_padded(
    layout: str, training: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a launch each for input and weight; the zeros meet nothing that is not finite."""
    monkeypatch.setattr(stems, "PADDED_FROM", 0)
    kernel, phases = ("conv_bn_act_train_kernel", 1 + triton.INTERPRETED) if training else ("conv_bn_act_kernel", 1)
    once = ["pad_channels_kernel"] * 2 + [kernel] * phases
    for channels in (1, 2, 3):
        stem = Convolution((2, channels, 13, 11), 24, (7, 7), (2, 2), (3, 3))
        call = conv_bn_act_call(stem, dtype, DEVICE, layout=layout, conv_bias=True, training=training)
        with resfuse.use_backend("triton"), launch.recorded() as names:
            contract.check(call, needs_grad=[])
        assert names == once * (1 if training else 2)  # in inference, without gradients too
    x, weight = call.input, call.tensors["conv_weight"]
    x[0, 0, 4, 4], x[1, 2, 9, 3] = math.nan, math.inf
    found = triton.conv_forward(x, weight, None, stem.settings)
    expected = F.conv2d(x.double(), weight.double(), None, *stem.settings)
    assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.isinf(), expected.isinf())


def test_channels_are_padded_where_it_pays() -> None:
    for batch, channels, kernel, padded in ((2, 3, 7, False), (3, 3, 7, True), (3, 4, 7, False), (3, 3, 1, False)):
        x, w = meta(batch, channels, 224, 224), meta(64, channels, kernel, kernel)
        with launch.collected(H100) as specs:
            triton.conv_forward(x, w, None, Settings((2, 2), (kernel // 2, kernel // 2), (1, 1), 1))
        assert (len(specs) == 3) == padded
        assert specs[-1].constants["CONV"].c == (4 if padded else channels)


@pytest.mark.parametrize("device", [H100, A100], ids=["H100", "A100"])
def test_forms_of_training(device: DeviceProperties) -> None:
    """One launch as soon as a program per tile of N is resident, from registers where each has one tile."""

    def form(batch: int, size: int, channels: int) -> list[tuple[bool, bool, int]]:
        x, w, v = meta(batch, 64, size, size), meta(channels, 64, 1, 1), torch.empty(channels, device="meta")
        with launch.collected(device) as specs:
            triton.conv_bn_act_forward(x, w, None, UNIT, BatchNorm(v, v, v, v, True, 0.1, 1e-5), None, True)
        assert all(spec.grid[0] <= 2 * device.num_sms for spec in specs if spec.options["launch_cooperative_grid"])
        return [
            (spec.options["launch_cooperative_grid"], spec.constants["IN_REGISTERS"], spec.constants["PHASE"])
            for spec in specs
        ]

    assert form(1, 14, 64) == [(True, True, 0)]
    assert form(256, 56, 256) == [(True, False, 0)]
    assert form(1, 1, 1 << 17) == [(False, False, 1), (False, False, 2)]


@pytest.mark.parametrize(("alone", "several"), [(120, 100), (100, 120), (255, 90), (168, 168)])
def test_the_grid_of_training_is_as_large_as_its_own_kernel_allows(
    alone: int, several: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program with one tile runs another kernel than one with several; no grid is larger than what is resident."""
    monkeypatch.setattr(conv_bn_act, "properties", lambda device: H100)
    monkeypatch.setattr(conv_bn_act, "_registers", {})
    compiled: list[plan.ConvPlan] = []

    def registers_of(planned: plan.ConvPlan) -> int:
        compiled.append(planned)
        return alone if planned.tiles_per_program == 1 else several

    for batch in (1, 4, 8, 32):
        x, w = (torch.empty_like(meta(*shape), device="cpu") for shape in ((batch, 64, 28, 28), (64, 64, 1, 1)))
        with plan.forced("train", ConvConfig(64, 64, 32, 4, 2)):
            before = plan.conv_plan("train", x, w, UNIT, H100)
            found = conv_bn_act.resident_plan(x, w, UNIT, (True,), registers_of)
        needed = alone if found.tiles_per_program == 1 else several
        assert before.programs <= found.programs <= H100.resident_programs(4, needed)
    assert found.programs > before.programs or alone == plan.MAX_REGISTERS
    count = len(compiled)
    with plan.forced("train", ConvConfig(64, 64, 32, 4, 2)):
        assert conv_bn_act.resident_plan(x, w, UNIT, (True,), registers_of) is found
    assert len(compiled) == count, "a kernel is looked at once"


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_float32_follows_the_switch_of_torch(precision: str, convolutions: Any) -> None:
    x, w = (meta(*shape, dtype=torch.float32) for shape in ((2, 64, 8, 8), (64, 64, 3, 3)))
    convolutions.fp32_precision = precision
    with launch.collected(H100) as specs:
        triton.conv_forward(x, w, None, UNIT)
    assert specs[0].constants["CONV"].precision == precision


def test_tf32_operands_are_rounded(convolutions: Any) -> None:
    """To nearest, as cuDNN and the CUDA kernels do: tensor cores cut off the bits that TF32 does not have."""
    convolutions.fp32_precision = "tf32"
    ulp = 2.0**-10
    values = torch.tensor([1 + 0.75 * ulp, 1 + 0.25 * ulp, -1 - 0.5 * ulp, math.inf, -math.inf, math.nan])
    values.view(torch.int32)[-1] = 0x7FFFFFFF  # CUDA's NaN, to which nothing can be added
    expected = torch.tensor([1 + ulp, 1, -1 - ulp, math.inf, -math.inf, math.nan], device=DEVICE)
    ones = torch.zeros(16, 16, device=DEVICE)
    ones[:, 0] = 1
    given = torch.zeros(6, 16, device=DEVICE)
    given[:, 0] = values.to(DEVICE)
    as_input = triton.conv_forward(given.T.reshape(1, 16, 6, 1), ones.reshape(16, 16, 1, 1), None, UNIT)
    as_weight = triton.conv_forward(ones[:1].reshape(1, 16, 1, 1), given.reshape(6, 16, 1, 1), None, UNIT)
    torch.testing.assert_close(as_input[0, 0, :, 0], expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(as_weight[0, :, 0, 0], expected, rtol=0, atol=0, equal_nan=True)


def conv_problem(conv: Convolution) -> ConvProblem:
    n, c, h, w = conv.input
    return ConvProblem("forward", torch.bfloat16, n, h, w, c, conv.channels, *conv.kernel, *conv.settings)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)
