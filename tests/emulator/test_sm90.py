"""The kernels of csrc/cuda/sm90, executed on the CPU: their numbers, and the tensor maps that TMA loads by."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from resfuse import contract, types
from resfuse.backends import first_contact
from tests.emulator import backend, build, cases, sm90
from tests.shapes import Convolution

pytestmark = pytest.mark.skipif(
    build.sm90_unavailable_reason() is not None, reason=str(build.sm90_unavailable_reason())
)

CASES = dict(cases.cases("sm90_emulator", ("bfloat16", "float16", "float32")))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_numbers(case: Callable[[], None]) -> None:
    backend.unavailable_reason()  # loads the library
    with backend.device(seed=1):
        case()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
def test_tf32_is_as_accurate_as_its_operands(kernel: int, seed: int) -> None:
    """Which TMA rounds to nearest even here with odd seeds, and with others leaves to be cut off."""
    draw, padding = torch.Generator().manual_seed(seed), kernel // 2
    x, w = (torch.randn(shape, generator=draw) for shape in ((3, 100, 9, 9), (72, 100, kernel, kernel)))
    backend.unavailable_reason()
    with backend.device(seed=seed):
        found = sm90.conv_forward(x, w, None, types.Convolution((1, 1), (padding, padding), (1, 1), 1))
    bits = (operand.view(torch.int32) for operand in (x, w))
    rounded = (bits + seed % 2 * (0xFFF + (bits >> 13 & 1)) & -0x2000 for bits in bits)
    expected = F.conv2d(*(bits.view(torch.float32).double() for bits in rounded), padding=padding)
    assert contract.relative_error(found, expected) < 1e-6


@pytest.mark.parametrize(("seed", "verdict"), [(1, None), (2, "does not round to TF32")])
@pytest.mark.parametrize("kernel", sm90.KERNELS)
def test_first_contact_sees_whether_tma_rounds(
    kernel: str, seed: int, verdict: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_contact, "CONVOLUTIONS", (((2, 32, 9, 9), (64, 32, 3, 3), 1, 1),))
    monkeypatch.setattr(first_contact, "unsupported", lambda *arguments: [] if arguments[-1] else ["not TF32"])
    backend.unavailable_reason()
    with backend.device(seed=seed), cases.fp32_precision("ieee"):
        found = first_contact.fault(sm90, kernel, torch.float32, torch.device("cpu"))
    assert found == verdict or (verdict and found and found.startswith(verdict))


# (side, channels, filters, kernel, stride) of ImageNet's ResNets and of CIFAR's.
RESNETS = [
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


PACKED_STEM = Convolution((3, 24, 224, 112), 64, (7, 1), (2, 1), (3, 0))
CONVOLUTIONS = {"-".join(map(str, numbers)): resnet_convolution(*numbers) for numbers in RESNETS}
CONVOLUTIONS |= cases.SM90 | {"packed stem": PACKED_STEM}


@pytest.mark.parametrize("conv", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_tma_loads_the_operand(conv: Convolution) -> None:
    check = ctypes.CDLL(str(build.im2col())).wrong_loaded_values
    check.restype = ctypes.c_long
    n, c, h, w = conv.input
    shapes = (n, h, w, c, conv.channels, *conv.kernel, *conv.output[2:])
    numbers = (*shapes, *conv.stride, *conv.padding, *conv.dilation, conv.groups)
    assert check(ctypes.byref(Geometry((ctypes.c_int64 * 16)(*numbers), dtype=1))) == 0
