"""What is special to the Triton convolution kernels of the forward pass: their tiles, forms and packings.

Everything here runs in the interpreter and, with the same tolerances, on a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import resfuse
from resfuse.backends import triton

if triton.unavailable_reason() is not None:
    pytest.skip(f"triton: {triton.unavailable_reason()}", allow_module_level=True)

from resfuse.backends.triton import configs, conv_bn_act, conv_bn_act_train, conv_plan, launch
from resfuse.backends.triton.problems import ConvConfig, ConvProblem
from tests import contract, shapes
from tests.shapes import CONVOLUTIONS, Convolution, conv_bn_act_call

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

(DEVICE,) = shapes.devices_of("triton")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])

TILES = {
    "one_tile": ConvConfig(256, 64, 64, 8, 3),
    "many_small_tiles": ConvConfig(16, 16, 16, 4, 2),
    "wide": ConvConfig(32, 64, 32, 4, 4),
    "tall": ConvConfig(128, 16, 16, 4, 3),
    "eight_warps": ConvConfig(128, 64, 64, 8, 3),
    "bands_of_one": ConvConfig(32, 16, 32, 4, 3, group_m=1),
    "bands_of_three": ConvConfig(16, 16, 32, 4, 3, group_m=3),
}
SPLIT = ConvConfig(32, 16, 16, 4, 3, split_k=4)
# Tails in M (2*5*7 pixels), N (40 channels) and K (72), at every tap.
TAILS = Convolution((2, 72, 5, 7), 40, (3, 3), padding=(1, 1))


def check(conv: Convolution, dtype: torch.dtype, training: bool, **options: object) -> contract.Results:
    """Output and running statistics against the contract."""
    call = conv_bn_act_call(
        conv, dtype, DEVICE, layout="nhwc", residual_layout="nhwc", conv_bias=True, training=training, **options
    )
    with resfuse.use_backend("triton"):
        return contract.check(call, needs_grad=[])


@contextlib.contextmanager
def forced(config: ConvConfig, training: bool = False) -> Iterator[None]:
    with configs.forced("train" if training else "forward", config):
        yield


@pytest.fixture
def one_multiprocessor(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU where one or two programs are resident: each of them has many tiles."""
    few = dataclasses.replace(launch.properties(torch.device(DEVICE, 0)), num_sms=1)
    for module in (conv_bn_act, conv_bn_act_train):
        monkeypatch.setattr(module, "properties", lambda device: few)


@MODES
@pytest.mark.parametrize(
    ("tile", "dtype"),
    [(tile, torch.bfloat16) for tile in TILES] + [("eight_warps", torch.float32), ("eight_warps", torch.float16)],
)
def test_tiles(tile: str, dtype: torch.dtype, training: bool) -> None:
    """Any tile gives the same numbers; with 8 warps too, which a flattened loop has been miscompiled for."""
    with forced(TILES[tile], training):
        for conv in (TAILS, CONVOLUTIONS["1x1_stride2_odd"], CONVOLUTIONS["stem"]):
            check(conv, dtype, training)


@DTYPES
def test_split_k(dtype: torch.dtype) -> None:
    """Parts of the sum from several programs, in one launch; the counters of arrivals are left at zero."""
    counters: list[Tensor] = []

    def kept(device: torch.device, size: int) -> Tensor:
        counters.append(torch.zeros(size, dtype=torch.int32, device=device))
        return counters[-1]

    with pytest.MonkeyPatch.context() as patch, forced(SPLIT), launch.recorded() as names:
        patch.setattr(conv_bn_act, "arrival_counters", kept)
        for conv in (TAILS, CONVOLUTIONS["1x1"], CONVOLUTIONS["to_one_pixel"]):
            del names[:]
            check(conv, dtype, training=False)
            assert names == ["conv_bn_act_kernel"]
    assert len(counters) == 3 and all(not counter.any() for counter in counters)


@pytest.mark.parametrize(("channels", "split_k"), [(512, 4), (48, 2), (16, 1)])
def test_split_k_is_no_more_than_there_are_steps(channels: int, split_k: int) -> None:
    problem = ConvProblem("forward", torch.bfloat16, 1, 7, 7, channels, 512, 3, 3, padding=(1, 1))
    with configs.forced("forward", SPLIT):
        assert conv_plan.chosen_config(problem, launch.H100).split_k == split_k


@pytest.mark.usefixtures("one_multiprocessor")
@DTYPES
def test_persistent_programs(dtype: torch.dtype) -> None:
    """Each program has several tiles, and they are computed as without."""
    tile = ConvConfig(16, 16, 32, 4, 3, group_m=2)
    with forced(tile):
        expected = check(TAILS, dtype, training=False)["output"]
    with forced(dataclasses.replace(tile, persistent=True)):
        assert torch.equal(check(TAILS, dtype, training=False)["output"], expected)


@pytest.mark.usefixtures("one_multiprocessor")
@DTYPES
def test_training_with_several_tiles_per_program(dtype: torch.dtype) -> None:
    with forced(ConvConfig(16, 16, 32, 4, 3), training=True):
        for conv in (TAILS, CONVOLUTIONS["1x1"], CONVOLUTIONS["depthwise"]):
            check(conv, dtype, training=True)
            check(conv, dtype, training=True, mean=30.0)


def test_results_repeat() -> None:
    for training, config in ((False, SPLIT), (True, ConvConfig(16, 16, 32, 4, 2))):
        with forced(config, training):
            first, second = (check(TAILS, torch.bfloat16, training) for _ in range(2))
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), name


GROUPED = {
    "resnext_4d": (Convolution((1, 128, 6, 5), 128, (3, 3), padding=(1, 1), groups=32), 8),
    "resnext_8d": (Convolution((1, 64, 6, 5), 64, (3, 3), (2, 2), (1, 1), groups=8), 4),
    "wide_groups": (Convolution((1, 96, 5, 5), 64, (3, 3), padding=(1, 1), groups=2), 1),
    "odd_number_of_groups": (Convolution((2, 55, 5, 5), 33, (1, 1), groups=11), 4),
    "more_outputs_than_inputs": (Convolution((2, 6, 5, 5), 60, (3, 3), padding=(1, 1), groups=6), 2),
}


@MODES
@DTYPES
@pytest.mark.parametrize("name", GROUPED)
def test_groups(name: str, dtype: torch.dtype, training: bool) -> None:
    """Narrow groups are multiplied as one block-diagonal matrix, which covers all of them for any number of groups."""
    conv, packed = GROUPED[name]
    problem = _problem(conv, torch.bfloat16)
    assert conv_plan.packing(problem).groups == packed
    tiled = conv_plan.tile_problem(problem)
    assert tiled.groups * packed >= conv.groups and tiled.group_in == packed * conv.weight[1]
    check(conv, dtype, training)


@MODES
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_group(value: float, training: bool) -> None:
    """The zeros beside the diagonal do not make NaN of it."""
    conv = GROUPED["odd_number_of_groups"][0]
    call = conv_bn_act_call(conv, torch.bfloat16, DEVICE, layout="nhwc", residual_layout=None, training=training)
    call.input[1, 12, 2, 2] = value  # of group 2, whose outputs are the channels 6, 7 and 8
    with resfuse.use_backend("triton"), torch.no_grad():
        found = contract.forward(contract.FUSED, call.map(torch.clone))
    expected = contract.forward(contract.EAGER, call.map(torch.clone))
    struck = expected.isnan() | expected.isinf()
    assert struck.any() and not struck[:, :6].any() and not struck[:, 9:].any()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())


def test_a_filter_row_is_packed_where_channels_are_few() -> None:
    """Rows of 7 taps with 3 channels are 21 neighbours in memory, unless the taps have gaps."""
    stem = _problem(Convolution((1, 3, 32, 32), 64, (7, 7), (2, 2), (3, 3)), torch.bfloat16)
    assert conv_plan.packing(stem).row
    tiled = conv_plan.tile_problem(stem)
    assert (tiled.c, tiled.s, tiled.oh, tiled.ow, tiled.gemm_k) == (21, 1, 16, 16, 147)
    for other in ({"dilation": (1, 2)}, {"c": 32}, {"r": 1, "s": 1}):
        assert not conv_plan.packing(dataclasses.replace(stem, **other)).row  # type: ignore[arg-type]


@pytest.mark.parametrize("device", [launch.H100, launch.A100], ids=["H100", "A100"])
def test_forms_of_training(device: launch.DeviceProperties) -> None:
    """Chosen by shape and device: one launch as soon as a program per tile of N is resident, in registers if small."""

    def specs(batch: int, size: int, channels: int, launches: int | None = None) -> list[launch.KernelSpec]:
        x = _meta(batch, 64, size, size)
        z = _meta(batch, channels, size, size)
        w, v = _meta(channels, 64, 1, 1), torch.empty(channels, device="meta")
        conv = ((1, 1), (0, 0), (1, 1), 1)
        with launch.collected(device) as found:
            conv_bn_act.train_forward(
                x, w, v, v, v, v, None, z, True, *conv, 0.1, 1e-5, z, z, v, v, launches=launches
            )  # fmt: skip
        return found

    def form(spec: launch.KernelSpec) -> tuple[bool, bool, int]:
        return spec.cooperative, spec.constants["IN_REGISTERS"], spec.constants["PHASE"]

    assert [form(spec) for spec in specs(1, 14, 64)] == [(True, True, 0)]
    large = specs(256, 56, 256)
    assert [form(spec) for spec in large] == [(True, False, 0)]
    assert large[0].grid[0] <= 2 * device.num_sms
    assert [form(spec) for spec in specs(256, 56, 256, launches=2)] == [(False, False, 1), (False, False, 2)]
    assert [form(spec) for spec in specs(1, 1, 1 << 17)] == [(False, False, 1), (False, False, 2)]
    with pytest.raises(ValueError, match="not resident"):
        specs(1, 1, 1 << 17, launches=1)
    with pytest.raises(ValueError, match="launches"):
        specs(1, 14, 64, launches=3)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_float32_follows_the_switch_of_torch(precision: str) -> None:
    x, w = (_meta(*shape, dtype=torch.float32) for shape in ((2, 64, 8, 8), (64, 64, 3, 3)))
    switch = torch.backends.cudnn.conv
    before = switch.fp32_precision
    try:
        switch.fp32_precision = precision
        with launch.collected(launch.H100) as specs:
            conv_bn_act.conv_forward(x, w, None, (1, 1), (1, 1), (1, 1), 1, torch.empty_like(x))
    finally:
        switch.fp32_precision = before
    assert specs[0].constants["PRECISION"] == precision


@MODES
def test_offsets_beyond_32_bits(training: bool) -> None:
    """Pixels from 2^31 elements on; of the input, 4 GB, only those pages are touched that the stride reaches."""
    channels, side, stride = 64, 5888, 2900
    memory = torch.empty_strided((1, channels, side, side), (channels * side**2, 1, channels * side, channels),
                                 dtype=torch.float16, device="meta")  # fmt: skip
    assert memory.numel() > 2**31
    x = _untouched(memory)
    pixels = torch.randn(1, channels, 3, 3).half().to(DEVICE)
    x[:, :, ::stride, ::stride] = pixels
    w = torch.randn(16, channels, 1, 1).half().to(DEVICE).contiguous(memory_format=torch.channels_last)
    out = torch.empty(1, 16, 3, 3, dtype=torch.float16, device=DEVICE, memory_format=torch.channels_last)
    conv = ((stride, stride), (0, 0), (1, 1), 1)
    if training:
        v = [torch.empty(16, device=DEVICE) for _ in range(2)]
        y = torch.empty_like(out)
        conv_bn_act.train_forward(x, w, None, None, None, None, None, None, False, *conv, 0.1, 1e-5, out, y, *v)
    else:
        conv_bn_act.conv_forward(x, w, None, *conv, out)
    expected = F.conv2d(pixels.double(), w.double())
    torch.testing.assert_close(out.double(), expected, rtol=2**-10, atol=1e-2)  # sums of 64 products, rounded once


def test_the_residual_is_overwritten_where_that_is_allowed() -> None:
    call = conv_bn_act_call(CONVOLUTIONS["3x3"], torch.bfloat16, DEVICE, layout="nhwc", residual_layout="nhwc")
    residual = call.tensors["residual"]
    assert residual is not None
    with resfuse.use_backend("triton"), torch.no_grad():
        expected = contract.forward(contract.FUSED, call)
        assert expected.data_ptr() != residual.data_ptr()
        found = contract.forward(contract.FUSED, call.replace(overwrite_residual=True))
    assert found.data_ptr() == residual.data_ptr()
    assert torch.equal(found, expected)


def _problem(conv: Convolution, dtype: torch.dtype) -> ConvProblem:
    n, c, h, w = conv.input
    geometry = conv.stride, conv.padding, conv.dilation, conv.groups
    return ConvProblem("forward", dtype, n, h, w, c, conv.channels, *conv.kernel, *geometry)


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


def _untouched(like: Tensor) -> Tensor:
    """Memory for such a tensor, which the tests' poison (and so the machine) has not been through."""
    storage = torch.UntypedStorage(like.numel() * like.element_size(), device=DEVICE)
    flat = torch.tensor([], dtype=like.dtype, device=DEVICE).set_(storage)  # type: ignore[call-overload]
    return torch.as_strided(flat, like.shape, like.stride())
