"""The kernels of csrc/cuda/sm90, executed on the CPU: their numbers, and the tensor maps that TMA loads by."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest

from tests.emulator import backend, build, cases
from tests.shapes import Convolution

pytestmark = pytest.mark.skipif(
    build.sm90_unavailable_reason() is not None, reason=str(build.sm90_unavailable_reason())
)

CASES = dict(cases.cases("sm90_emulator", ("bfloat16", "float16")))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_numbers(case: Callable[[], None]) -> None:
    backend.unavailable_reason()  # loads the library
    with backend.device(seed=1):
        case()


# (side, channels, filters, kernel, stride) of ImageNet's ResNets, the stem's channels padded to 8, and of CIFAR's.
RESNETS = [
    (224, 8, 64, 7, 2),
    (56, 64, 64, 1, 1), (56, 64, 64, 3, 1), (56, 64, 256, 1, 1), (56, 256, 64, 1, 1),
    (56, 256, 128, 1, 1), (56, 128, 128, 3, 2), (56, 256, 512, 1, 2), (56, 64, 128, 3, 2), (56, 64, 128, 1, 2),
    (28, 128, 128, 3, 1), (28, 128, 512, 1, 1), (28, 512, 128, 1, 1),
    (28, 512, 256, 1, 1), (28, 256, 256, 3, 2), (28, 512, 1024, 1, 2), (28, 128, 256, 3, 2), (28, 128, 256, 1, 2),
    (14, 256, 256, 3, 1), (14, 256, 1024, 1, 1), (14, 1024, 256, 1, 1),
    (14, 1024, 512, 1, 1), (14, 512, 512, 3, 2), (14, 1024, 2048, 1, 2), (14, 256, 512, 3, 2), (14, 256, 512, 1, 2),
    (7, 512, 512, 3, 1), (7, 512, 2048, 1, 1), (7, 2048, 512, 1, 1),
    (32, 16, 16, 3, 1), (32, 16, 32, 3, 2), (16, 32, 32, 3, 1), (16, 32, 64, 3, 2), (8, 64, 64, 3, 1),
]  # fmt: skip


def resnet_convolution(side: int, channels: int, filters: int, kernel: int, stride: int) -> Convolution:
    return Convolution(
        (3, channels, side, side), filters, (kernel, kernel), (stride, stride), (kernel // 2, kernel // 2)
    )


class Geometry(ctypes.Structure):
    """resfuse::Convolution."""

    _fields_ = [
        ("numbers", ctypes.c_int64 * 16),
        ("dtype", ctypes.c_int32),
        ("tf32", ctypes.c_bool),
    ]


CONVOLUTIONS = {"-".join(map(str, numbers)): resnet_convolution(*numbers) for numbers in RESNETS} | cases.SM90


@pytest.mark.parametrize("conv", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_tma_loads_the_operand(conv: Convolution) -> None:
    check = ctypes.CDLL(str(build.im2col())).wrong_loaded_values
    check.restype = ctypes.c_long
    n, c, h, w = conv.input
    shapes = (n, h, w, c, conv.channels, *conv.kernel, *conv.output[2:])
    numbers = (*shapes, *conv.stride, *conv.padding, *conv.dilation, conv.groups)
    assert check(ctypes.byref(Geometry((ctypes.c_int64 * 16)(*numbers), dtype=1))) == 0
