"""The sm100 backend's reasons and operands, with the kernel for sm_90 in its place: nothing emulates tcgen05."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import resfuse
from resfuse.backends import cuda, dispatch, reference, sm100, stems
from resfuse.types import AbsentDevice, BatchNorm, Convolution
from tests.backends import test_sm90
from tests.backends.test_sm90 import BF16, EMULATED, misaligned, norm, operands
from tests.emulator import build
from tests.emulator.run import run

BLACKWELL = AbsentDevice((10, 0))


def problem(device: Any = BLACKWELL, training: bool = False, **options: Any) -> Any:
    return test_sm90.problem(device=device, **options)._replace(training=training)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"device": AbsentDevice((9, 0))}, "sm100 needs compute capability 10.0, not 9.0"),
        ({"device": AbsentDevice((10, 3))}, "sm100 needs compute capability 10.0, not 10.3"),
        ({"device": torch.device("cpu")}, "sm100 needs tensors on a CUDA device, not on cpu"),
        ({"dtype": torch.float32}, "sm100 computes in bfloat16 and float16, not torch.float32"),
        ({"training": True}, "sm100 has no kernel for training"),
        ({"weight": (64 * 65536, 64, 3, 3), "input": (1, 64, 3, 3)}, "sm100 has up to 4194240 filters"),
        ({"weight": (64, 8, 3, 3), "groups": 8}, "sm100 has no groups"),
        ({"weight": (100, 64, 3, 3)}, "not 64 and 100"),
        ({"input": (64, 64, 224, 224), "stride": 9}, "strides up to 8"),
        ({"input": (1, 512, 7, 7), "weight": (512, 512, 3, 3)}, "sm100 does not split sums"),
    ],
)
def test_problems_that_it_cannot_run(options: dict[str, Any], reason: str) -> None:
    (found,) = sm100.unsupported_reasons(problem(**options))
    assert reason in found


@pytest.mark.parametrize("kernel", sm100.KERNELS)
def test_it_runs_on_request_alone(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in sm100.DTYPES:
        asked = problem(dtype=dtype, kernel=kernel)
        assert dispatch.explain_choice(asked, "sm100") == ("sm100", {})
        name, rejected = dispatch.explain_choice(asked)
        assert name == "triton" and "sm100" not in rejected
    with pytest.raises(RuntimeError, match="sm100: sm100 has no kernel for training"):
        dispatch.explain_choice(problem(training=True), "sm100")
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: None)
    monkeypatch.setattr(sm100._extension, "load", lambda name: None)
    on_gpu = problem(device=torch.device("cuda"), kernel=kernel)
    assert dispatch.reasons_against("sm100", on_gpu, automatic=True) == (sm100.only_on_request_reason(),)


def test_a_missing_library_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: None)
    monkeypatch.setattr(sm100._extension, "load", lambda name: f"{name}: not built")
    with pytest.raises(RuntimeError, match="'sm100' is not available: _sm100: not built"), resfuse.use_backend("sm100"):
        pass


# --- operands --------------------------------------------------------------------------------------------------------


@EMULATED
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("change", [lambda tensor: tensor, misaligned], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
def test_any_layout_dtype_and_address(layout: torch.memory_format, change: Callable[[Tensor], Tensor]) -> None:
    for residual_channels in (24, 8):
        x, w, bias, convolution, residual = operands(layout, residual_channels)
        args = bias, convolution, norm(False), change(residual), True
        found = sm100.conv_bn_act_forward(change(x), change(w), *args)
        expected = reference.conv_bn_act_forward(x, w.to(BF16), *args)
        assert found[1:] == (None, None, None)
        assert (found[0].float() - expected[0].float()).norm() < 0.01 * expected[0].float().norm()
        assert found[0].is_contiguous(memory_format=layout)
    z = sm100.conv_forward(change(x), change(w), bias, convolution)
    torch.testing.assert_close(z, reference.conv_forward(x, w.to(BF16), bias, convolution), rtol=0.02, atol=0.02)


@EMULATED
@pytest.mark.usefixtures("poisoned_memory")
def test_the_rows_of_a_stem_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stems, "PACKED_FROM", 0)
    x, w = torch.randn(2, 3, 31, 29, dtype=BF16), torch.randn(24, 3, 7, 7, dtype=BF16) / 12
    args = None, test_sm90.STEM, norm(False), None, True
    found, expected = (kernels.conv_bn_act_forward(x, w, *args)[0] for kernels in (sm100, reference))
    assert (found.float() - expected.float()).norm() < 0.01 * expected.float().norm()
    assert found.is_contiguous()


@EMULATED
def test_a_residual_may_be_overwritten() -> None:
    x, w, _, convolution, residual = operands(torch.channels_last)
    residual = residual.contiguous(memory_format=torch.channels_last)
    expected = sm100.conv_bn_act_forward(x, w, None, convolution, norm(False), residual, True)[0]
    found = sm100.conv_bn_act_forward(x, w, None, convolution, norm(False), residual, True, overwrite_residual=True)[0]
    assert found.data_ptr() == residual.data_ptr() and torch.equal(found, expected)


@EMULATED
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": lambda x: x.float(), "conv_weight": lambda w: w.float()}, "input must be bfloat16 or float16"),
        ({"conv_weight": lambda w: w[:, :8]}, "conv_weight must have the channels of input / groups"),
        ({"conv_weight": lambda w: w[:20]}, "channels and filters multiples of 8"),
        ({"residual": lambda r: r[:2]}, "residual must have the shape of the convolution's result"),
        ({"conv_bias": lambda b: b[:16]}, "conv_bias must have one element per channel"),
        ({"settings": lambda s: s[1:]}, "settings must be 11 numbers in float64 on the CPU"),
    ],
)
def test_what_the_operator_refuses(change: dict[str, Callable[[Tensor], Tensor]], message: str) -> None:
    x, w, bias, convolution, residual = operands(torch.channels_last)
    settings = sm100._settings(x.device, x.shape, w.shape, convolution, 1e-5, True, False)
    named = {"input": x, "conv_weight": w.to(BF16), "conv_bias": bias, "residual": residual, "settings": settings}
    named = {name: change.get(name, lambda tensor: tensor)(tensor) for name, tensor in named.items()}
    with pytest.raises(RuntimeError, match=message):
        sm100._conv_forward(running_mean=None, running_var=None, weight=None, bias=None, **named)


@EMULATED
@pytest.mark.slow
def test_the_epilogue_computes_scale_and_shift_itself(tmp_path: Path) -> None:
    """As on sm_100, in the kernel for sm_90, which then leaves it to the epilogue."""
    shutil.copytree(build.CSRC, tmp_path / "csrc")
    for file, pattern, replacement in (
        ("conv_kernel", r"if \(thread < kTileN\) .*\n *vectors\.scale_and_shift\(.*;", ""),
        ("bn_act_epilogue", r"if constexpr \(kSm100\)", "if constexpr (true)"),
        ("bn_act_epilogue", r"template terms<Element>\(", "template terms<cutlass::bfloat16_t>("),
        ("conv_launch", r"case (128|256):\n.*\n", ""),
    ):
        path = tmp_path / "csrc" / "cuda" / "sm90" / f"{file}.cuh"
        text, found = re.subn(pattern, replacement, path.read_text())
        assert found, f"look for the new place of {pattern} in {path.name}"
        path.write_text(text)
    library = build.library(build.PLAIN, tmp_path / "csrc", ("sm90/conv_bf16.cu",))
    options = ("sm90_emulator", "bfloat16", "--seed", "1", "2", "-k", "conv eval bf16 128x64")
    done = run(build.PLAIN, library, *options)
    assert done.returncode == 0 and "FAILED" not in done.stdout, done.stdout


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("filters", [64, 264])
@pytest.mark.parametrize("dtype", sm100.DTYPES, ids=str)
def test_on_blackwell_products_are_exact(dtype: torch.dtype, filters: int, kernel: int) -> None:
    """Both tiles, ragged in pixels, channels and filters; then batch norm, residual and ReLU behind them."""
    reason = sm100.unavailable_reason()
    if reason is not None or torch.cuda.get_device_capability() != sm100.CAPABILITY:
        pytest.skip(reason or "not a Blackwell GPU")
    draw = torch.Generator().manual_seed(kernel)
    x = torch.randint(-2, 3, (256, 72, 15, 17), generator=draw).to("cuda", dtype)
    w = torch.randint(-1, 2, (filters, 72, kernel, kernel), generator=draw).to("cuda", dtype)
    convolution = Convolution((1, 1), (kernel // 2, kernel // 2), (1, 1), 1)
    z = F.conv2d(x.double(), w.double(), padding=kernel // 2)
    assert z.abs().max() <= 256, "integers that bfloat16 has"
    assert torch.equal(sm100.conv_forward(x, w, None, convolution).double(), z)
    vectors = [torch.rand(filters, generator=draw).add(0.5).cuda() for _ in range(4)]
    bn = BatchNorm(*vectors, False, 0.1, 1e-5)
    found = sm100.conv_bn_act_forward(x, w, None, convolution, bn, z.to(dtype), True)[0].double()
    expected = F.relu(F.batch_norm(z, *(vector.double() for vector in vectors), eps=bn.eps) + z)
    assert (found - expected).norm() < 0.01 * expected.norm()
