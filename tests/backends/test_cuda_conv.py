"""The convolution kernels of csrc/cuda: every tile and form of launch, splits, odd channels and addresses, TF32.

Run in the emulator, and on a GPU where there is one.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resfuse import contract
from resfuse.backends import cuda, cuda_conv, reference, stems
from resfuse.backends.cuda_conv import TILES, ConvConfig, use_config
from resfuse.types import Convolution as Geometry
from tests.backends.operands import convolved
from tests.contract import Call, Results
from tests.emulator import backend as emulator
from tests.shapes import LAYOUTS, Convolution, conv_bn_act_call

DEVICES = [
    *(["cpu"] if emulator.unavailable_reason() is None else []),
    *(["cuda"] if cuda.unavailable_reason() is None else []),
]
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory", "one_thread", "convolutions"),
    pytest.mark.skipif(not DEVICES, reason="neither the emulator nor the cuda backend runs here"),
]
DEVICE = pytest.mark.parametrize("device", DEVICES)
DTYPE = pytest.mark.parametrize("dtype", cuda.DTYPES, ids=lambda dtype: str(dtype)[6:])
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
NHWC = torch.channels_last

# Nothing in them is a multiple of a tile; the last needs more than one step per tap, and one of them is ragged.
ODD = {
    "3x3": Convolution((2, 24, 9, 8), 72, (3, 3), (2, 1), (1, 1)),
    "1x1": Convolution((3, 40, 5, 9), 136, (1, 1)),
    "1x1_stride2": Convolution((3, 16, 9, 7), 40, (1, 1), (2, 2)),
    "dilated": Convolution((1, 16, 13, 11), 24, (3, 3), (1, 2), (2, 3), (2, 3)),
    "asymmetric": Convolution((2, 16, 7, 12), 16, (2, 5), (3, 1), (1, 0), (1, 2)),
    "rows_in_the_padding": Convolution((2, 4, 9, 6), 10, (3, 3), padding=(1, 4)),  # all of their first and last pixels
    "dilated_row": Convolution((2, 3, 9, 8), 8, (3, 3), padding=(2, 2), dilation=(2, 2)),  # not one piece of memory
    "flat": Convolution((2, 1, 8, 8), 3, (1, 7), (1, 2), (0, 3)),
    "narrow_groups": Convolution((2, 15, 6, 5), 10, (3, 3), padding=(1, 1), groups=5),
    "grouped": Convolution((2, 32, 6, 7), 144, (3, 3), (1, 1), (1, 1), groups=2),
    "ragged_step": Convolution((2, 72, 4, 5), 8, (2, 2), padding=(1, 1)),
}


STEM = Convolution((2, 3, 21, 19), 40, (7, 7), (2, 2), (3, 3))


def problem(conv: Convolution, dtype: torch.dtype, device: str, training: bool = False, **options: Any) -> Call:
    """A call in NHWC memory, with a residual unless `residual_layout` is None."""
    options = {"residual_layout": "nhwc", **options}
    return conv_bn_act_call(conv, dtype, device, layout="nhwc", training=training, **options)


def check(call: Call, config: ConvConfig | None = None) -> Results:
    """Hold the kernels against the contract, in float64 on the CPU."""
    with use_config(config):
        found = convolved(cuda_conv, call)
    there = call.map(lambda tensor: tensor.cpu())
    eager, truth = convolved(reference, there), convolved(reference, call.truth())
    dtype = call.input.dtype
    for name, tensor in found.items():
        deviation = contract.measure(name, tensor.cpu(), eager[name], truth[name], dtype, floor=contract.FLOORS[dtype])
        assert not deviation.violated, str(deviation)
    return found


def same(first: Results, second: Results) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@DEVICE
@DTYPE
@MODES
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile[0]}x{tile[1]}")
@pytest.mark.parametrize("conv", ODD)
def test_every_tile(conv: str, tile: tuple[int, int], training: bool, dtype: torch.dtype, device: str) -> None:
    check(problem(ODD[conv], dtype, device, training), ConvConfig(*tile))


@DEVICE
@DTYPE
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile[0]}x{tile[1]}")
def test_both_forms_of_training_give_the_same_bits(tile: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    """One tile per block, and several of them: of 7 tiles two blocks have at most 4, and the last has fewer."""
    for conv in (Convolution((1, 8, 4, 5), 16, (3, 3), padding=(1, 1)), Convolution((3, 8, 17, 16), 80, (1, 1))):
        given = problem(conv, dtype, device, training=True)
        one = check(given, ConvConfig(*tile, launches=1))
        two = check(given, ConvConfig(*tile, launches=2))
        assert same(one, two)
        with use_config(ConvConfig(*tile)):
            assert same(one, convolved(cuda_conv, given))


@DEVICE
def test_more_channels_than_are_resident_take_two_launches(device: str) -> None:
    """Every block of a column waits for the others: where not even one per column is resident, none can."""
    given = problem(Convolution((1, 8, 3, 3), 64 * 5 if device == "cpu" else 1 << 17, (1, 1)), torch.float32, device,
                     training=True)  # fmt: skip
    check(given, ConvConfig(64, 64))
    with use_config(ConvConfig(64, 64, launches=1)), pytest.raises(RuntimeError, match="not all resident"):
        convolved(cuda_conv, given)


@DEVICE
@DTYPE
@pytest.mark.parametrize("splits", [2, 3, 4])
def test_splits(splits: int, dtype: torch.dtype, device: str) -> None:
    """Blocks that share a tile's steps: within the contract, the same bits in each run and in each form."""
    for tile in TILES:
        given = problem(Convolution((1, 40, 5, 4), 24, (3, 3), padding=(1, 1)), dtype, device, conv_bias=True)
        one = check(given, ConvConfig(*tile, splits, 1))
        assert same(one, check(given, ConvConfig(*tile, splits, 2)))
        assert same(one, check(given, ConvConfig(*tile, splits)))
    few = problem(Convolution((1, 8, 2, 2), 8, (1, 1)), dtype, device)  # of one step
    check(few, ConvConfig(64, 64, splits))
    operands = given.input, given.tensors["conv_weight"], given.tensors["conv_bias"], given.convolution
    plain = cuda_conv.conv_forward(*operands)
    with use_config(ConvConfig(64, 64, splits)):
        split = cuda_conv.conv_forward(*operands)
    torch.testing.assert_close(split, plain, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@DEVICE
@DTYPE
@MODES
def test_any_number_of_channels(training: bool, dtype: torch.dtype, device: str) -> None:
    """1 to 17: those that 16 bytes divide, and those that are copied one by one, on either side."""
    for channels in range(1, 18):
        for kernel in ((1, 1), (3, 3)):
            conv = Convolution((2, channels, 4, 5), 18 - channels, kernel, padding=(kernel[0] // 2,) * 2)
            check(problem(conv, dtype, device, training, conv_bias=True))


def misaligned(tensor: Tensor, elements: int = 1) -> Tensor:
    room = torch.zeros(tensor.numel() + elements, dtype=tensor.dtype, device=tensor.device)
    return torch.as_strided(room, tensor.shape, tensor.stride(), elements).copy_(tensor)


@DEVICE
@DTYPE
@MODES
@pytest.mark.parametrize("name", ["input", "conv_weight", "residual", "weight", "running_var"])
def test_misaligned_pointers(name: str, training: bool, dtype: torch.dtype, device: str) -> None:
    given = problem(ODD["3x3"], dtype, device, training)
    for elements in (1, 2, 4):  # of 16-bit types the last are 8 bytes, of float32 the last but one
        check(given.replace(**{name: misaligned(given.tensors[name], elements)}))


@pytest.fixture
def padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels are padded in small problems too."""
    monkeypatch.setattr(stems, "PADDED_FROM", 0)
    for cached in ("planned", "_settings"):
        monkeypatch.setattr(cuda_conv, cached, getattr(cuda_conv, cached).__wrapped__)


@DEVICE
@DTYPE
@MODES
@pytest.mark.usefixtures("padding")
def test_few_channels_are_padded(training: bool, dtype: torch.dtype, device: str) -> None:
    """The stem of a large batch, which is then read 8 bytes at a time."""
    for conv in (STEM, Convolution((2, 1, 9, 9), 8, (5, 5))):
        given = problem(conv, dtype, device, training, conv_bias=True)
        for layout in ("nchw", "nhwc", "nhwc_slice_of_columns"):
            check(given.replace(input=LAYOUTS[layout](given.input)))
        plan = cuda_conv.planned(
            given.input.shape, torch.Size(conv.weight), conv.settings, training, dtype, processors=4
        )
        assert plan.channels == (2 if dtype == torch.float32 and conv.input[1] == 1 else 4)


@DEVICE
@DTYPE
@pytest.mark.usefixtures("padding")
def test_padding_meets_nothing_that_is_not_finite(dtype: torch.dtype, device: str) -> None:
    """A zero behind a pixel's channels is multiplied by a zero of the weight, whatever the neighbours are."""
    given = problem(STEM, dtype, device)
    x, weight = given.input.clone(), given.tensors["conv_weight"]
    x[0, 0, 4, 4], x[1, 2, 9, 3] = math.nan, math.inf
    found = cuda_conv.conv_forward(x, weight, None, given.convolution)
    expected = F.conv2d(x.double(), weight.double(), None, *given.convolution)
    assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.isinf(), expected.isinf())
    assert found.isnan().any() and found.isfinite().any()


@DEVICE
@DTYPE
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_copies_bits(layout: str, dtype: torch.dtype, device: str) -> None:
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    for channels, padded in ((1, 2), (1, 4), (2, 4), (3, 4), (3, 8), (4, 5), (13, 40)):
        bits = torch.randint(-(2**15), 2**15, (3, channels, 5, 37), dtype=integer).to(device)  # of NaN, too
        x = LAYOUTS[layout](bits.view(dtype))
        found = cuda_conv.padded(x, padded)
        assert found.is_contiguous(memory_format=NHWC)
        assert torch.equal(found.view(integer), F.pad(bits, (0, 0, 0, 0, 0, padded - channels)))


@DEVICE
@DTYPE
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "transposed"])
def test_packing_keeps_the_convolution(layout: str, dtype: torch.dtype, device: str) -> None:
    """A filter row of several pixels is one of one pixel that has all their channels."""
    for conv, channels in ((STEM, 24), (ODD["flat"], 7), (ODD["dilated_row"], 16)):
        given = problem(conv, dtype, device)
        x, weight = LAYOUTS[layout](given.input), LAYOUTS[layout](given.tensors["conv_weight"])
        packed_x, packed_weight, settings = cuda_conv.packed(x, weight, given.convolution, channels)
        assert packed_x.shape[1] == packed_weight.shape[1] == channels and packed_weight.shape[3] == 1
        found = F.conv2d(packed_x.double(), packed_weight.double(), None, *settings)
        expected = F.conv2d(x.double(), weight.double(), None, *given.convolution)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@DEVICE
@MODES
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile[0]}x{tile[1]}")
def test_tf32(tile: tuple[int, int], training: bool, device: str, convolutions: Any) -> None:
    """11 significant bits per factor, rounded to nearest: by truncation, sums of positive products would be biased."""
    given = problem(ODD["3x3"], torch.float32, device, training, residual_layout=None)
    weight = given.tensors["conv_weight"].abs()
    given = given.replace(input=given.input.abs(), conv_weight=weight).with_options(activation="identity")
    truth = convolved(reference, given.truth())
    errors = {}
    for precision in ("ieee", "tf32"):
        convolutions.fp32_precision = precision
        with use_config(ConvConfig(*tile)):
            found = convolved(cuda_conv, given)
            z = cuda_conv.conv_forward(given.input, weight, None, given.convolution)
        expected = F.conv2d(given.input.cpu().double(), weight.cpu().double(), None, *given.convolution)
        relative = z.cpu().double() / expected - 1
        errors[precision] = relative.square().mean().sqrt().item()
        assert relative.mean().abs() < relative.std()
        if training:
            torch.testing.assert_close(found["z"].cpu().double(), expected, rtol=2**-10, atol=0)
            torch.testing.assert_close(found["mean"].cpu().double(), truth["mean"].double(), rtol=2**-12, atol=0)
    assert errors["ieee"] < 4e-7
    assert 1e-6 < errors["tf32"] < 2**-12


@DEVICE
def test_tf32_keeps_what_is_not_finite(device: str, convolutions: Any) -> None:
    """Rounding by an addition would make a NaN whose low bits are set a zero."""
    convolutions.fp32_precision = "tf32"
    x = torch.ones(1, 8, 1, 4, device=device).to(memory_format=NHWC)
    x[0, 0, 0, 0] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    x[0, 0, 0, 1], x[0, 0, 0, 2] = math.inf, -math.inf
    w = torch.ones(8, 8, 1, 1, device=device)
    z = cuda_conv.conv_forward(x, w, None, Geometry((1, 1), (0, 0), (1, 1), 1))[0, 0, 0]
    assert z[0].isnan()
    assert z[1:].tolist() == [math.inf, -math.inf, 8.0]


EMULATED = pytest.mark.skipif("cpu" not in DEVICES, reason="the emulator does not run here")


@EMULATED
def test_launches() -> None:
    """One wherever all blocks are resident: always in inference, and in training with up to 4 tiles of channels."""
    small, large = Convolution((1, 32, 3, 3), 24, (3, 3)), Convolution((3, 8, 17, 16), 80, (3, 3), padding=(1, 1))
    columns = Convolution((1, 8, 3, 3), 64 * 5, (1, 1))
    for conv, config, training, expected in (
        (large, None, False, 1),
        (small, ConvConfig(64, 64, 4), False, 1),
        (large, ConvConfig(64, 64, 2), False, 2),  # splits of more tiles than can wait for each other
        (small, None, True, 1),
        (large, ConvConfig(32, 64), True, 1),
        (large, ConvConfig(32, 64, launches=2), True, 2),
        (columns, ConvConfig(64, 64), True, 2),
    ):
        given = problem(conv, torch.bfloat16, "cpu", training, conv_bias=True)
        with emulator.launches() as counted, use_config(config):
            convolved(cuda_conv, given)
        assert counted.launches == expected, (conv, config, training)


@EMULATED
@MODES
@pytest.mark.usefixtures("padding")
def test_padding_takes_a_launch_each_for_input_and_weight(training: bool) -> None:
    given = problem(STEM, torch.bfloat16, "cpu", training, residual_layout=None)
    given = given.replace(input=given.input.contiguous(), conv_weight=given.tensors["conv_weight"].contiguous())
    with (
        emulator.launches() as counted,
        torch.profiler.profile(acc_events=True) as profiled,
        use_config(ConvConfig(64, 64)),
    ):
        cuda_conv.conv_bn_act_forward(
            given.input, given.tensors["conv_weight"], None, given.convolution, given.batch_norm, None, True
        )
    assert counted.launches == 3
    copies = sum(event.count for event in profiled.key_averages() if event.key in ("aten::copy_", "aten::zero_"))
    assert copies == (2 if training else 1), "of results alone, into the layout of the input"


@EMULATED
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile[0]}x{tile[1]}")
def test_shared_memory_is_read_without_bank_conflicts(tile: tuple[int, int], convolutions: Any) -> None:
    convolutions.fp32_precision = "tf32"
    for dtype, conv in itertools.product((torch.bfloat16, torch.float32), ODD.values()):
        given = problem(conv, dtype, "cpu")
        with emulator.launches() as counted, use_config(ConvConfig(*tile)):
            convolved(cuda_conv, given)
        assert counted.ldmatrix_cycles == counted.ldmatrix_phases > 0


@EMULATED
@MODES
@pytest.mark.parametrize("config", [*TILES, (64, 64, 4)], ids=str)
def test_any_order_of_threads_and_blocks_gives_the_same_bits(config: tuple[int, ...], training: bool) -> None:
    for conv in (Convolution((2, 24, 9, 8), 16, (3, 3), (2, 1), (1, 1)), Convolution((3, 9, 7, 7), 16, (1, 1))):
        given = problem(conv, torch.bfloat16, "cpu", training)
        with use_config(ConvConfig(*config)):
            expected = convolved(cuda_conv, given)
            for seed in (1, 2, 3):
                with emulator.device(seed=seed):
                    assert same(convolved(cuda_conv, given), expected)


@EMULATED
@pytest.mark.parametrize("resident", [1, 2, 3, 64])
def test_any_number_of_resident_blocks(resident: int) -> None:
    """Tiles are dealt to as many blocks as there are, and both forms of the launch to the same ones.

    The mean is a hundred times the deviation: merged statistics keep their precision.
    """
    given = problem(Convolution((4, 16, 16, 16), 72, (1, 1)), torch.float32, "cpu", training=True, residual_layout=None)
    given = given.replace(conv_bias=torch.full((72,), 100.0))
    with emulator.device(resident_blocks=resident):
        found = check(given, ConvConfig(32, 64))
        assert same(found, check(given, ConvConfig(32, 64, launches=2)))


@EMULATED
@MODES
def test_two_launches_where_a_cooperative_one_is_refused(training: bool) -> None:
    given = problem(Convolution((1, 64, 6, 6), 72, (3, 3), padding=(1, 1)), torch.bfloat16, "cpu", training)
    with use_config(ConvConfig(64, 64, 1 if training else 2)):
        expected = convolved(cuda_conv, given)
        with emulator.device(cooperative=False), emulator.launches() as counted:
            convolved(cuda_conv, given)
            found = convolved(cuda_conv, given)
    assert counted.launches == 4 and counted.refusals == 1 and same(found, expected)
    with (
        emulator.device(cooperative=False),
        use_config(ConvConfig(64, 64, 1 if training else 2, launches=1)),
        pytest.raises(RuntimeError, match="one launch was asked for"),
    ):
        convolved(cuda_conv, given)


# Arguments of the bindings


def nhwc(*shape: int) -> torch.Tensor:
    return torch.zeros(shape).to(memory_format=torch.channels_last)


SETTINGS = (
    "stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w", "groups", "eps", "relu",
    "overwrite_residual", "tf32", "block_m", "block_n", "splits", "launches", "workspace_size",
)  # fmt: skip


def arguments(training: bool, **changes: Any) -> list[Any]:
    """Arguments of the operator, right but for the changes, in the order of its schema."""
    found: dict[str, Any] = {
        "input": nhwc(2, 8, 4, 4), "conv_weight": nhwc(16, 8, 3, 3), "conv_bias": None,
        "running_mean": torch.zeros(16), "running_var": torch.ones(16), "weight": None, "bias": None, "residual": None,
        "relu": True, "momentum": 0.1, "eps": 1e-5, "stride_h": 1, "stride_w": 1, "padding_h": 1, "padding_w": 1,
        "dilation_h": 1, "dilation_w": 1, "groups": 1, "tf32": False, "block_m": 64, "block_n": 64, "splits": 1,
        "launches": 0, "workspace": torch.zeros(64) if training else None, "z": nhwc(2, 16, 4, 4),
        "output": nhwc(2, 16, 4, 4), "mean": torch.zeros(16), "invstd": torch.zeros(16), "overwrite_residual": False,
        "workspace_size": 0,
    }  # fmt: skip
    assert changes.keys() <= found.keys()
    found |= changes
    names = [argument.name for argument in operator(training).default._schema.arguments]
    if not training:
        numbers = [float(found[name]) for name in SETTINGS]
        found["settings"] = torch.tensor(numbers, dtype=torch.float64)
    return [found[name] for name in names]


def operator(training: bool) -> Any:
    operators = torch.ops.resfuse_cuda
    return operators.conv_train_forward if training else operators.conv_inference_forward


BOTH = [
    ({"input": torch.zeros(2, 8, 4)}, "input must have 4 dimensions"),
    ({"input": nhwc(2, 8, 4, 4).double()}, "input must be float32, bfloat16 or float16"),
    ({"conv_weight": nhwc(16, 8, 3, 3).half()}, "conv_weight must have the dtype"),
    ({"input": nhwc(0, 8, 4, 4)}, "input and conv_weight must not be empty"),
    ({"groups": 2}, "conv_weight must have the channels of input / groups"),
    ({"groups": 3}, "groups must divide"),
    ({"groups": 0}, "groups must divide"),
    ({"stride_w": 0}, "stride must be positive"),
    ({"padding_h": -1}, "padding must not be negative"),
    ({"dilation_h": 0}, "dilation must be positive"),
    ({"dilation_h": 3}, "input must not be smaller than the filter"),
    ({"residual": nhwc(2, 16, 4, 3)}, "residual must have the shape of the convolution's result"),
    ({"weight": torch.zeros(15)}, "weight must have one element per channel"),
    ({"conv_bias": torch.zeros(16).half()}, "conv_bias must be float32 or have the dtype"),
    ({"launches": 3}, "launches must be 0, 1 or 2"),
    ({"block_m": 96}, "unsupported tile 96 x 64"),
]
INFERENCE = [
    *BOTH,
    ({"splits": 0}, "splits must be in 1 .. 1024"),
    ({"splits": 2}, "the workspace has 0 values and needs"),
]
TRAINING = [
    *BOTH,
    ({"input": torch.zeros(2, 8, 4, 4)}, "input must be dense in channels_last"),
    ({"conv_weight": torch.zeros(16, 8, 3, 3)}, "conv_weight must be dense in channels_last"),
    ({"residual": torch.zeros(2, 16, 4, 4)}, "residual must be dense in channels_last"),
    ({"running_var": torch.zeros(32)[::2]}, "running_var must be contiguous"),
    ({"padding_h": 0}, "z must have the shape of the convolution's result"),
    ({"z": torch.zeros(2, 16, 4, 4)}, "z must be dense in channels_last"),
    ({"output": nhwc(2, 16, 4, 3)}, "output must have the shape of the convolution's result"),
    ({"mean": torch.zeros(16).half()}, "mean must be float32"),
    ({"invstd": torch.zeros(15)}, "invstd must have one element per channel"),
    ({"running_mean": torch.zeros(16).half()}, "running_mean must be float32 or have the dtype"),
    ({"workspace": torch.zeros(16)}, "the workspace has 16 values and needs 32"),
    ({"workspace": torch.zeros(8).half()}, "workspace must be contiguous and float32"),
    ({"workspace": torch.zeros(65)[1:]}, "workspace must be aligned"),
    ({"block_n": 32}, "unsupported tile 64 x 32"),
]


@EMULATED
@MODES
def test_bad_arguments_are_named(training: bool) -> None:
    for changes, message in TRAINING if training else INFERENCE:
        with pytest.raises(RuntimeError, match=message):
            operator(training)(*arguments(training, **changes))
    operator(training)(*arguments(training))
    with pytest.raises(RuntimeError, match="settings must be 16 numbers in float64"):
        torch.ops.resfuse_cuda.conv_inference_forward(*arguments(False)[:-1], torch.zeros(16))


@EMULATED
def test_bad_arguments_of_padding_are_named() -> None:
    x = torch.zeros(2, 3, 4, 4)
    for arguments, message in (
        ((x[0], 4, 4, 1, 1, 0, 1), "input must have 4 dimensions"),
        ((x[:0], 4, 4, 1, 1, 0, 1), "and not be empty"),
        ((x.double(), 4, 4, 1, 1, 0, 1), "input must be float32, bfloat16 or float16"),
        ((x, 2, 4, 1, 1, 0, 1), "channels must be at least those of input by taps"),
        ((x, 8, 4, 3, 1, 0, 1), "channels must be at least those of input by taps"),
        ((x, 2**29, 4, 1, 1, 0, 1), "a row of them fit 31 bits"),
        ((x, 4, 0, 1, 1, 0, 1), "taps and width must be positive"),
        ((x, 4, 4, 1, -1, 0, 1), "must not be negative"),
        ((x, 4, 4, 1, 1, 2**31, 1), "a row of input, with its padding, must fit 31 bits"),
        ((x, 4, 4, 1, 2**29, 0, 1), "a row of input, with its padding, must fit 31 bits"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.resfuse_cuda.pad_channels(*arguments)


@DEVICE
def test_a_dimension_beyond_31_bits_is_refused(device: str) -> None:
    """`unsupported_reasons` keeps it from happening.  Nothing touches the 4 GB."""
    storage = torch.UntypedStorage(2**32, device=device)
    memory = torch.tensor([], dtype=torch.float16, device=device).set_(storage)
    x = torch.as_strided(memory, (1, 1, 2**31, 1), (2**31, 1, 1, 1))
    w = torch.ones(1, 1, 1, 1, dtype=torch.float16, device=device)
    with pytest.raises(RuntimeError, match=r"height exceeds 2\^31 - 1"):
        cuda_conv.conv_forward(x, w, None, Geometry((2**20, 1), (0, 0), (1, 1), 1))


# The choice of tiles

# (pixels of an image, filters, steps of 32 channels) of the layers of ResNet-50.
RESNET50 = [(112**2, 64, 7)] + [
    (side**2, filters, depth)
    for side, width in ((56, 64), (28, 128), (14, 256), (7, 512))
    for filters, depth in ((width, 4 * width // 32), (width, 9 * width // 32), (4 * width, width // 32))
]


@pytest.mark.parametrize("batch", [1, 8, 32, 256])
@pytest.mark.parametrize("processors", [108, 132])
def test_the_heuristic_keeps_the_device_busy(batch: int, processors: int) -> None:
    for pixels, filters, depth in RESNET50:
        m = batch * pixels
        config = cuda_conv.heuristic_config(m, filters, depth, 1, False, processors)
        blocks = -(-m // config.block_m) * -(-filters // config.block_n) * config.splits
        most = -(-m // 32) * -(-filters // 64) * max(1, depth // 8)  # that the smallest tile allows
        assert blocks >= min(processors, most) / 2, (m, filters, depth, config)
        assert config.splits == 1 or blocks <= processors
        training = cuda_conv.heuristic_config(m, filters, depth, 1, True, processors)
        assert training == config._replace(splits=1)
        if batch == 256:
            assert config.block_m == 128
