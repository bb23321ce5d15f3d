"""The convolution kernels of csrc/cuda: bad arguments are named, problems too large refused, tiles chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resfuse.backends import cuda, cuda_conv
from resfuse.types import Convolution, Problem
from tests.emulator import backend as emulator

DEVICES = [
    *(["cpu"] if emulator.unavailable_reason() is None else []),
    *(["cuda"] if cuda.unavailable_reason() is None else []),
]
pytestmark = pytest.mark.skipif(not DEVICES, reason="neither the emulator nor the cuda backend runs here")
DEVICE = pytest.mark.parametrize("device", DEVICES)
EMULATED = pytest.mark.skipif("cpu" not in DEVICES, reason="the emulator does not run here")


def nhwc(*shape: int) -> torch.Tensor:
    return torch.zeros(shape).to(memory_format=torch.channels_last)


def arguments(training: bool, **changes: Any) -> list[Any]:
    """Arguments of the operator, right but for the changes, in the order of its schema."""
    found: dict[str, Any] = {
        "input": nhwc(2, 8, 4, 4), "conv_weight": nhwc(16, 8, 3, 3), "conv_bias": None,
        "running_mean": torch.zeros(16), "running_var": torch.ones(16), "weight": None, "bias": None, "residual": None,
        "relu": True, "momentum": 0.1, "eps": 1e-5, "stride_h": 1, "stride_w": 1, "padding_h": 1, "padding_w": 1,
        "dilation_h": 1, "dilation_w": 1, "groups": 1, "tf32": False, "block_m": 64, "block_n": 64, "splits": 1,
        "launches": 0, "workspace": torch.zeros(64) if training else None, "z": nhwc(2, 16, 4, 4),
        "output": nhwc(2, 16, 4, 4), "mean": torch.zeros(16), "invstd": torch.zeros(16),
    }  # fmt: skip
    assert changes.keys() <= found.keys()
    schema = operator(training).default._schema
    return [(found | changes)[argument.name] for argument in schema.arguments]


def operator(training: bool) -> Any:
    operators = torch.ops.resfuse_cuda
    return operators.conv_train_forward if training else operators.conv_inference_forward


@EMULATED
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": torch.zeros(2, 8, 4, 4)}, "input must be dense in channels_last"),
        ({"input": torch.zeros(2, 8, 4)}, "input must have 4 dimensions"),
        ({"input": torch.zeros(2, 8, 4, 4).double()}, "input must be float32, bfloat16 or float16"),
        ({"conv_weight": nhwc(16, 8, 3, 3).half()}, "conv_weight must have the dtype"),
        ({"conv_weight": torch.zeros(16, 8, 3, 3)}, "conv_weight must be dense in channels_last"),
        ({"input": nhwc(0, 8, 4, 4), "output": nhwc(0, 16, 4, 4)}, "output must not be empty"),
        ({"groups": 2}, "conv_weight must have the channels of input / groups"),
        ({"groups": 3}, "groups must divide"),
        ({"groups": 0}, "groups must divide"),
        ({"stride_w": 0}, "stride must be positive"),
        ({"padding_h": -1}, "padding must not be negative"),
        ({"dilation_h": 0}, "dilation must be positive"),
        ({"padding_h": 0}, "output must have the shape"),
        ({"residual": nhwc(2, 16, 4, 3)}, "residual must have the shape of output"),
        ({"residual": torch.zeros(2, 16, 4, 4)}, "residual must be dense in channels_last"),
        ({"weight": torch.zeros(15)}, "weight must have one element per channel"),
        ({"running_var": torch.zeros(32)[::2]}, "running_var must be contiguous"),
        ({"conv_bias": torch.zeros(16).half()}, "conv_bias must be float32 or have the dtype"),
        ({"splits": 0}, "splits must be in 1 .. 1024"),
        ({"launches": 3}, "launches must be 0, 1 or 2"),
        ({"block_m": 96}, "unsupported tile 96 x 64"),
        ({"splits": 2}, "the workspace has 0 values and needs"),
        ({"workspace": torch.zeros(8).half()}, "workspace must be contiguous and float32"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        operator(False)(*arguments(False, **changes))


@EMULATED
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z": torch.zeros(2, 16, 4, 4)}, "z must be dense in channels_last"),
        ({"z": nhwc(2, 16, 4, 3)}, "z must have the shape of output"),
        ({"mean": torch.zeros(16).half()}, "mean must be float32"),
        ({"invstd": torch.zeros(15)}, "invstd must have one element per channel"),
        ({"running_mean": torch.zeros(16).half()}, "running_mean must be float32 or have the dtype"),
        ({"workspace": torch.zeros(16)}, "the workspace has 16 values and needs 32"),
        ({"workspace": torch.zeros(65)[1:]}, "workspace must be aligned"),
        ({"block_n": 32}, "unsupported tile 64 x 32"),
    ],
)
def test_bad_arguments_of_training_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        operator(True)(*arguments(True, **changes))


@EMULATED
def test_good_arguments_pass() -> None:
    for training in (True, False):
        operator(training)(*arguments(training))


@DEVICE
def test_a_dimension_beyond_31_bits_is_refused(device: str) -> None:
    """`unsupported_reasons` keeps it from happening.  Nothing touches the 4 GB."""
    storage = torch.UntypedStorage(2**32, device=device)
    memory = torch.tensor([], dtype=torch.float16, device=device).set_(storage)
    x = torch.as_strided(memory, (1, 1, 2**31, 1), (2**31, 1, 1, 1))
    w = torch.ones(1, 1, 1, 1, dtype=torch.float16, device=device)
    with pytest.raises(RuntimeError, match=r"height exceeds 2\^31 - 1"):
        cuda_conv.conv_forward(x, w, None, Convolution((2**20, 1), (0, 0), (1, 1), 1))


def problem(shape: tuple[int, ...], weight: tuple[int, ...]) -> Problem:
    convolution = torch.Size(weight), Convolution((1, 1), (0, 0), (1, 1), 1)
    return Problem("conv_forward", torch.device("cuda"), torch.float32, torch.Size(shape), *convolution)


def test_problems_that_are_too_large_are_refused_with_a_reason() -> None:
    assert cuda_conv.unsupported_reasons(problem((64, 256, 56, 56), (64, 256, 1, 1))) == []
    assert "31 bits" in cuda_conv.unsupported_reasons(problem((1, 1, 1 << 16, 1 << 16), (1, 1, 1, 1)))[0]
    assert "tiles" in cuda_conv.unsupported_reasons(problem((1 << 30, 1, 1 << 10, 1 << 10), (64, 1, 1, 1)))[0]
    assert "(N, C, H, W)" in cuda_conv.unsupported_reasons(problem((64, 256, 56), (64, 256, 1)))[0]


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
