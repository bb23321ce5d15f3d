"""The sm90 backend's choices, reasons and operands; its kernel's numbers are tested in tests/emulator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resfuse.backends import cuda, dispatch, first_contact, reference, sm90
from resfuse.backends.integers import cdiv
from resfuse.cli.tune import layer_problems
from resfuse.types import AbsentDevice, BatchNorm, Convolution, Problem
from tests.emulator import backend
from tests.emulator import sm90 as emulated
from tests.shapes import LAYOUTS

HOPPER, BF16 = AbsentDevice((9, 0)), torch.bfloat16
PROCESSORS = 132


def problem(
    input: tuple[int, ...] = (32, 64, 56, 56),
    weight: tuple[int, ...] = (64, 64, 3, 3),
    stride: int = 1,
    padding: int = 1,
    dilation: int = 1,
    groups: int = 1,
    dtype: torch.dtype = BF16,
    device: Any = HOPPER,
    kernel: str = "conv_bn_act_forward",
    tf32: bool = False,
) -> Problem:
    convolution = Convolution((stride, stride), (padding, padding), (dilation, dilation), groups)
    return Problem(kernel, device, dtype, torch.Size(input), torch.Size(weight), convolution, tf32=tf32)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"device": AbsentDevice((8, 0))}, "compute capability 9.0, not 8.0"),
        ({"device": AbsentDevice((10, 0))}, "compute capability 9.0, not 10.0"),
        ({"device": torch.device("cpu")}, "tensors on a CUDA device, not on cpu"),
        ({"dtype": torch.float64}, "bfloat16, float16 and TF32, not torch.float64"),
        ({"dtype": torch.float32}, "fp32_precision does not allow"),
        ({"dtype": torch.float32, "tf32": True, "input": (32, 62, 56, 56), "weight": (64, 62, 3, 3)}, "multiples of 4"),
        ({"weight": (64, 8, 3, 3), "groups": 8}, "no groups"),
        ({"input": (20, 3, 224, 224), "weight": (64, 3, 7, 7), "stride": 2, "padding": 3}, "not 3 and 64"),
        ({"input": (128, 3, 224, 224), "weight": (64, 3, 1, 1), "padding": 0}, "not 3 and 64"),
        ({"input": (128, 3, 224, 224), "weight": (60, 3, 7, 7), "padding": 3}, "not 3 and 60"),
        ({"input": (128, 3, 224, 224), "weight": (64, 3, 23, 23)}, "not 3 and 64"),  # a row is more than 128 bytes
        ({"weight": (100, 64, 3, 3)}, "not 64 and 100"),
        ({"input": (64, 64, 224, 224), "stride": 9}, "strides up to 8"),
        ({"padding": 128}, "a padding up to 127"),
        ({"input": (32, 64, 300, 300), "dilation": 65}, "up to 128 pixels into the image"),
        ({"input": (1, 512, 7, 7), "weight": (512, 512, 3, 3)}, "fewer than 64 tiles"),
        ({"input": (0, 64, 56, 56)}, "empty tensor"),
        ({"input": (64, 56, 56), "weight": (64, 64, 1)}, "(N, C, H, W)"),
        ({"input": (1 << 19, 8, 64, 64), "weight": (8, 8, 1, 1), "padding": 0}, "31 bits"),
    ],
)
def test_problems_that_it_leaves_to_others(options: dict[str, Any], reason: str) -> None:
    (found,) = sm90.unsupported_reasons(problem(**options))
    assert reason in found and found.startswith(("sm90", "TMA"))


def test_the_limits_of_tma_are_inclusive() -> None:
    for options in (
        {"padding": 127, "dilation": 127, "input": (8, 64, 56, 56)},  # 254 pixels, of which 127 are padding
        {"padding": 0, "dilation": 64, "input": (8, 64, 256, 256)},
        {"stride": 8, "input": (64, 64, 224, 224)},
        {"dtype": torch.float32, "tf32": True, "input": (32, 60, 56, 56), "weight": (68, 60, 3, 3)},  # 16 bytes
    ):
        assert sm90.unsupported_reasons(problem(**options)) == []  # type: ignore[arg-type]


def test_resnet50_at_batch_128_runs_on_it() -> None:
    layers = layer_problems("resnet50", [128], BF16)
    for layer in layers:
        convolution = Convolution(layer.stride, layer.padding, layer.dilation, layer.groups)
        shapes = torch.Size((layer.n, layer.c, layer.h, layer.w)), torch.Size((layer.k, layer.c, layer.r, layer.s))
        assert sm90.unsupported_reasons(Problem("conv_forward", HOPPER, BF16, *shapes, convolution)) == []
    assert 3 in {layer.c for layer in layers}


@pytest.mark.parametrize("kernel", sm90.KERNELS)
def test_on_hopper_it_is_preferred_where_it_can_run_the_problem(kernel: str) -> None:
    for dtype in sm90.DTYPES:
        name, rejected = dispatch.explain_choice(problem(dtype=dtype, kernel=kernel, tf32=dtype == torch.float32))
        assert name == "sm90" and set(rejected) == {"cuda", "triton"}
        why = "sm90 should be faster: TMA loads the operands and residuals of its next tile while wgmma multiplies "
        assert all(reasons[-1] == why + "(predicted, not measured)" for reasons in rejected.values())
        assert "triton should be faster" in rejected["cuda"][0] and len(rejected["triton"]) == 1
    assert dispatch.explain_choice(problem(dtype=torch.float32, kernel=kernel))[0] == "triton"
    assert dispatch.explain_choice(problem(device=AbsentDevice((10, 0)), kernel=kernel))[0] == "triton"
    assert dispatch.explain_choice(problem(device=AbsentDevice((8, 0)), kernel=kernel))[0] == "cuda"


@pytest.mark.parametrize("dtype", sm90.DTYPES, ids=str)
def test_first_contact_has_problems_for_it(dtype: torch.dtype) -> None:
    """Others are left out there too: automatic choice gives it none of them."""
    able = [
        problem(shape, weight, stride, weight[2] // 2, groups=groups, dtype=dtype, tf32=dtype == torch.float32)
        for shape, weight, stride, groups in first_contact.CONVOLUTIONS
    ]
    able = [one for one in able if not sm90.unsupported_reasons(one)]
    assert len(able) >= 3
    assert any(one.shape[1] % 64 and one.weight_shape[0] % 128 for one in able if one.weight_shape), "ragged tiles"


def test_a_missing_library_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: None)
    monkeypatch.setattr(sm90._extension, "load", lambda name: f"{name}: not built")
    assert sm90.unavailable_reason() == "_sm90: not built"
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: "no GPU")
    assert sm90.unavailable_reason() == "no GPU", "in training it needs the kernels of cuda"


@pytest.mark.parametrize(
    ("pixels", "filters", "expected"),
    [
        (128 * 56 * 56, 64, 64),  # no more channels than there are
        (128 * 56 * 56, 256, 256),
        (128 * 28 * 28, 128, 128),
        (64 * 7 * 7, 512, 128),  # 50 tiles of 256 would leave most of the GPU idle
    ],
)
def test_the_tile_is_chosen_by_size(pixels: int, filters: int, expected: int) -> None:
    assert sm90.tile_for(pixels, filters, PROCESSORS) == expected


@pytest.mark.parametrize("shape", [(256, 64, 56, 56), (7, 64, 13, 11), (1, 64, 100, 200)])
@pytest.mark.parametrize("filters", [64, 264, 2048, 32768])
def test_parts_of_the_statistics_cover_every_tile_once(shape: tuple[int, ...], filters: int) -> None:
    convolution = Convolution((1, 1), (0, 0), (1, 1), 1)
    plan = sm90.planned(torch.Size(shape), torch.Size((filters, 64, 1, 1)), convolution, True, PROCESSORS)
    tiles, columns = cdiv(shape[0] * shape[2] * shape[3], sm90.TILE_PIXELS), cdiv(filters, plan.tile)
    assert plan.parts * columns <= max(PROCESSORS, columns), "a block for each part, all of them resident if possible"
    assert (plan.parts - 1) * plan.tiles_per_part < tiles <= plan.parts * plan.tiles_per_part, "none is empty"


# --- operands --------------------------------------------------------------------------------------------------------


EMULATED = pytest.mark.skipif(emulated.unavailable_reason() is not None, reason=str(emulated.unavailable_reason()))


def operands(layout: torch.memory_format, residual_channels: int = 24, dtype: torch.dtype = BF16) -> tuple[Any, ...]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 16, 13, 11, generator=draw).to(dtype).contiguous(memory_format=layout)
    w = (torch.randn(24, 16, 3, 3, generator=draw) / 12).contiguous(memory_format=layout)  # float32, as under autocast
    residual = torch.randn(3, residual_channels, 13, 11, generator=draw).to(dtype)
    return x, w, torch.randn(24, generator=draw), Convolution((1, 1), (1, 1), (1, 1), 1), residual


def norm(training: bool) -> BatchNorm:
    vectors = [torch.linspace(0.5, 2, 24) for _ in range(4)]
    return BatchNorm(*vectors, training, 0.1, 1e-5)


def misaligned(tensor: Tensor) -> Tensor:
    return (
        torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)
    )


@EMULATED
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("change", [lambda tensor: tensor, misaligned], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_any_layout_dtype_and_address(
    dtype: torch.dtype, training: bool, layout: torch.memory_format, change: Callable[[Tensor], Tensor]
) -> None:
    for residual_channels in (24, 8):
        x, w, bias, convolution, residual = operands(layout, residual_channels, dtype)
        residual = change(residual)
        first, second = norm(training), norm(training)
        found = sm90.conv_bn_act_forward(change(x), change(w), bias, convolution, first, residual, True)
        expected = reference.conv_bn_act_forward(x, w.to(dtype), bias, convolution, second, residual, True)
        for one, other in zip((*found, *first[:2]), (*expected, *second[:2]), strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert (one.float() - other.float()).norm() < 0.01 * other.float().norm()
        assert found[0].is_contiguous(memory_format=layout)
    z = sm90.conv_forward(change(x), change(w), bias, convolution)
    torch.testing.assert_close(z, reference.conv_forward(x, w.to(dtype), bias, convolution), rtol=0.02, atol=0.02)


@EMULATED
@pytest.mark.parametrize("change", [lambda tensor: tensor, misaligned], ids=["aligned", "misaligned"])
def test_a_residual_may_be_overwritten(change: Callable[[Tensor], Tensor]) -> None:
    x, w, _, convolution, residual = operands(torch.channels_last)
    residual = change(residual.contiguous(memory_format=torch.channels_last))
    expected = sm90.conv_bn_act_forward(x, w, None, convolution, norm(False), residual.clone(), True)[0]
    found = sm90.conv_bn_act_forward(x, w, None, convolution, norm(False), residual, True, overwrite_residual=True)[0]
    assert torch.equal(found, expected)
    assert (found.data_ptr() == residual.data_ptr()) == (residual.data_ptr() % 16 == 0)


STEM = Convolution((2, 2), (3, 3), (1, 1), 1)


@EMULATED
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "nchw_slice_of_channels", "nhwc_slice_of_columns"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_the_rows_of_a_stem_are_packed(dtype: torch.dtype, training: bool, layout: str, channels: int) -> None:
    """In three launches, and one more for batch norm in training; what is not finite stays where it was."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, 31, 29, generator=draw).to(dtype)
    w, residual = torch.randn(24, channels, 7, 7, generator=draw) / 12, torch.randn(2, 24, 16, 15, generator=draw)
    given, packing = LAYOUTS[layout](x), emulated.use_tile(64, 2)
    with packing, backend.launches() as counted:
        found = sm90.conv_bn_act_forward(given, w, None, STEM, norm(training), residual.to(dtype), True)
    expected = reference.conv_bn_act_forward(given, w.to(dtype), None, STEM, norm(training), residual.to(dtype), True)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one.float() - other.float()).norm() < 0.01 * other.float().norm()
    assert found[0].stride() == expected[0].stride()
    assert counted.launches == 3 + training

    given[0, 0, 4, 4], given[1, -1, 9, 3] = torch.nan, torch.inf
    with emulated.use_tile(64, 2):
        z = sm90.conv_forward(given, w, None, STEM)
    other = F.conv2d(given.double(), w.double(), None, *STEM)
    assert torch.equal(z.isnan(), other.isnan()) and torch.equal(z.isinf(), other.isinf())


def test_a_packed_stem_has_no_route() -> None:
    shapes = {"weight": (64, 3, 7, 7), "stride": 2, "padding": 3, "device": torch.device("cuda:0")}
    assert sm90.inference_route(problem((21, 3, 224, 224), **shapes), 1e-5, True, False) is None  # type: ignore[arg-type]
