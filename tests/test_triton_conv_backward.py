"""The Triton kernels for the gradients of a convolution: what is special to them, besides the operators' tests."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import resfuse
from resfuse.backends import reference, registry
from tests import contract, shapes
from tests.shapes import CONVOLUTIONS, Convolution, Values

if registry.backend("triton").unavailable_reason() is not None:
    pytest.skip("Triton's kernels can not run here", allow_module_level=True)

from resfuse.backends.triton import bn_act, configs, fused_backward, grad_plan, launch
from resfuse.backends.triton.configs import ConvConfig
from resfuse.backends.triton.dgrad import dgrad
from resfuse.backends.triton.grad_prologue import BatchNormGrad
from resfuse.backends.triton.split_sum import column_sum, sum_splits
from resfuse.backends.triton.wgrad import wgrad

DEVICE = shapes.devices_of("triton")[0]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS32 = torch.finfo(torch.float32).eps
HALF = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def _ieee() -> Iterator[None]:
    """Exact products: on a GPU torch's switch allows TF32 unless told otherwise."""
    with float32_precision("ieee"):
        yield


@contextlib.contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    switch = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = switch.fp32_precision
    switch.fp32_precision = precision
    try:
        yield
    finally:
        switch.fp32_precision = before


@dataclasses.dataclass
class Case:
    """A convolution's input, weight and dz in NHWC memory, and launches of its gradients into memory full of NaN."""

    conv: Convolution
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __post_init__(self) -> None:
        values = Values(self.dtype, DEVICE, self.seed)
        self.x, self.w, self.dz = (
            nhwc(values.normal(*shape)) for shape in (self.conv.input, self.conv.weight, self.conv.output)
        )
        self.geometry = tuple(self.conv.options.values())

    def dgrad(self, dz: Tensor | BatchNormGrad | None = None) -> Tensor:
        dx = torch.full_like(self.x, torch.nan)
        dgrad(self.dz if dz is None else dz, self.w, *self.geometry, dx)
        return dx

    def wgrad(self, dz: Tensor | BatchNormGrad | None = None) -> Tensor:
        dw = torch.full_like(self.w, torch.nan)
        wgrad(self.dz if dz is None else dz, self.x, *self.geometry, dw)
        return dw

    def check(self) -> None:
        """Both gradients, every element: one rounding to the dtype, and float32 sums in whatever order."""
        truth, terms = (
            reference.conv_backward(*tensors, *self.geometry, (True, True, False))
            for tensors in (
                [tensor.double().cpu() for tensor in (self.dz, self.x, self.w)],
                [tensor.double().cpu().abs() for tensor in (self.dz, self.x, self.w)],
            )
        )
        for name, found, true, size in zip(("dx", "dw"), (self.dgrad(), self.wgrad()), truth, terms, strict=False):
            assert true is not None and size is not None
            allowed = torch.finfo(self.dtype).eps / 2 * true.abs() + 8 * EPS32 * size
            if self.dtype == torch.float16:
                allowed = allowed + 2.0**-25  # subnormal results
            wrong = ~((found.double().cpu() - true).abs() <= allowed)
            assert not wrong.any(), f"{name}: {wrong.sum()} of {wrong.numel()} elements, first {wrong.nonzero()[0]}"


def nhwc(tensor: Tensor) -> Tensor:
    """A copy with the strides of NHWC, also where its sizes would let other strides count as such."""
    result = torch.empty_like(tensor, memory_format=torch.channels_last)
    return result.copy_(tensor)


# --- phases of a strided dgrad ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [(1, 2), (2, 2), (3, 2), (2, 4)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 2), (3, 4)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 2)])
def test_phases(stride: shapes.Pair, dilation: shapes.Pair, padding: shapes.Pair) -> None:
    """Strides and dilations with and without a common divisor, which decides which pixels meet any tap."""
    Case(Convolution((2, 6, 9, 14), 5, (3, 3), stride, padding, dilation)).check()


@pytest.mark.parametrize("stride", range(1, 8))
@pytest.mark.parametrize("dilation", range(1, 8))
def test_taps_of_phases_by_enumeration(stride: int, dilation: int) -> None:
    plan = grad_plan.phases(stride, dilation)
    gcd = stride // plan.step
    for shift in range(2 * stride):
        first = shift // gcd * plan.inverse % plan.step if shift % gcd == 0 else 20
        expected = [r for r in range(20) if (shift - r * dilation) % stride == 0]
        assert list(range(first, 20, plan.step)) == expected


@HALF
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 5)])
def test_pixels_that_no_output_reads_get_zeros(size: shapes.Pair, dtype: torch.dtype) -> None:
    """Three quarters of the input of a 1x1 convolution of stride 2; in the same launch as the rest."""
    case = Case(Convolution((2, 16, *size), 24, (1, 1), (2, 2)), dtype)
    with configs.forced("dgrad", ConvConfig(64, 16, 16, 4, 2)), launch.recorded() as names:
        dx = case.dgrad()
    assert names == ["dgrad_kernel"]
    read = torch.zeros(size, dtype=torch.bool, device=DEVICE)
    read[::2, ::2] = True
    assert (dx[:, :, ~read] == 0).all()
    assert (dx[:, :, read] != 0).all()
    case.check()


@pytest.mark.parametrize("name", ["narrower_than_stride", "padding_beyond_kernel", "asymmetric_dilation"])
def test_odd_geometry_in_every_dtype(name: str) -> None:
    for dtype in DTYPES:
        Case(CONVOLUTIONS[name], dtype).check()


# --- tiles -----------------------------------------------------------------------------------------------------------

TILES = (
    ConvConfig(64, 16, 16, 4, 2),
    ConvConfig(32, 32, 16, 4, 3),
    ConvConfig(64, 64, 32, 4, 3, group_m=2),
    ConvConfig(128, 128, 64, 8, 3),  # eight warps: convolution loops have been miscompiled with them
    ConvConfig(256, 64, 64, 8, 3),
)


@HALF
@pytest.mark.parametrize("config", TILES, ids=lambda config: f"{config.block_m}x{config.block_n}x{config.block_k}")
@pytest.mark.parametrize(
    "conv",
    [
        Convolution((1, 72, 9, 11), 80, (3, 3), padding=(1, 1)),
        Convolution((2, 40, 13, 12), 136, (1, 1), (2, 2)),
        Convolution((3, 136, 7, 7), 40, (1, 1)),
    ],
    ids=["3x3", "1x1_stride2", "1x1"],
)
def test_tiles_that_do_not_divide_the_problem(conv: Convolution, config: ConvConfig, dtype: torch.dtype) -> None:
    if dtype == torch.float32 and DEVICE == "cuda":
        config = dataclasses.replace(config, block_k=16, num_stages=2)  # what float32 leaves room for
    with configs.forced("dgrad", config), configs.forced("wgrad", config):
        Case(conv, dtype).check()


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 17, 33])
def test_channels_of_any_number(channels: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for kernel, padding in (((1, 1), (0, 0)), ((3, 3), (1, 1))):
            Case(Convolution((2, channels, 5, 6), channels + 2, kernel, padding=padding), dtype).check()


@HALF
@pytest.mark.parametrize("kernel", [(7, 7), (3, 2)])
def test_the_taps_of_a_stem_share_a_tile(kernel: shapes.Pair, dtype: torch.dtype) -> None:
    """Three input channels: columns of dw are the whole filter, and some of a tile are padding while others are not."""
    case = Case(Convolution((2, 3, 14, 13), 20, kernel, (2, 2), (3, 3), (1, 2)), dtype)
    assert grad_plan.packs_taps(problem_of(case, "wgrad"))
    case.check()


# --- groups ----------------------------------------------------------------------------------------------------------


@HALF
@pytest.mark.parametrize(
    ("groups", "inputs", "outputs"),
    [(16, 4, 4), (8, 8, 8), (5, 3, 2), (3, 40, 24), (2, 96, 64), (37, 1, 1), (9, 1, 4), (7, 6, 1)],
)
def test_groups(groups: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """ResNeXt's, odd numbers of them, wider than a tile, and depthwise; each twice, with a stride too."""
    for stride in ((1, 1), (2, 2)):
        conv = Convolution((2, groups * inputs, 6, 5), groups * outputs, (3, 3), stride, (1, 1), groups=groups)
        Case(conv, dtype).check()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinities_stay_within_their_group(value: float) -> None:
    """Although narrow groups are multiplied together."""
    case = Case(Convolution((2, 24, 5, 5), 18, (3, 3), padding=(1, 1), groups=6))
    case.dz[0, 7, 2, 2] = value  # of group 2: its output channels are 6 to 8, its input channels 8 to 11
    dx, dw = case.dgrad().isfinite(), case.wgrad().isfinite()
    assert not dx[0, 8:12, 1:4, 1:4].any()
    assert (~dx).sum() == 4 * 9
    assert not dw[7].all()
    assert (~dw).sum() == (~dw[7]).sum()


def test_narrow_groups_are_packed() -> None:
    for kind, width in (("dgrad", 32), ("wgrad", 64)):
        case = Case(Convolution((1, 128, 2, 2), 128, (1, 1), groups=32), torch.bfloat16)
        problem = problem_of(case, kind)
        assert grad_plan.packed_groups(problem) == width // 4
        assert grad_plan.tile_problem(problem).group_in == width


# --- split-K ---------------------------------------------------------------------------------------------------------


@HALF
@pytest.mark.parametrize("split_k", [2, 3, 8])
@pytest.mark.parametrize(
    "conv",
    [
        Convolution((2, 24, 7, 9), 40, (3, 3), padding=(1, 1)),
        Convolution((2, 24, 8, 9), 40, (3, 3), (2, 2), (1, 1)),
        Convolution((2, 48, 12, 12), 64, (1, 1)),
        Convolution((2, 24, 6, 6), 24, (3, 3), padding=(1, 1), groups=6),
    ],
    ids=["3x3", "3x3_stride2", "1x1", "grouped"],
)
def test_split_k(conv: Convolution, split_k: int, dtype: torch.dtype) -> None:
    """Also with more parts than there are steps, so that some have nothing to add."""
    config = ConvConfig(64, 32, 16, 4, 2, split_k=split_k)
    with configs.forced("dgrad", config), configs.forced("wgrad", config):
        case = Case(conv, dtype)
        case.check()
        with launch.recorded() as names:
            case.dgrad()
            case.wgrad()
    assert names == ["dgrad_kernel", "sum_splits_kernel", "wgrad_kernel", "sum_splits_kernel"]


def test_without_split_k_a_gradient_is_one_launch() -> None:
    config = ConvConfig(64, 32, 16, 4, 2)
    with configs.forced("dgrad", config), configs.forced("wgrad", config), launch.recorded() as names:
        case = Case(CONVOLUTIONS["3x3_stride2_odd"])
        case.dgrad()
        case.wgrad()
    assert names == ["dgrad_kernel", "wgrad_kernel"]


@HALF
def test_results_repeat_bit_for_bit(dtype: torch.dtype) -> None:
    config = ConvConfig(64, 32, 16, 4, 2, split_k=5)
    case = Case(Convolution((2, 40, 7, 9), 72, (3, 3), padding=(1, 1)), dtype)
    with configs.forced("dgrad", config), configs.forced("wgrad", config):
        assert torch.equal(case.dgrad(), case.dgrad())
        assert torch.equal(case.wgrad(), case.wgrad())
    sums = [torch.empty(72, dtype=dtype, device=DEVICE) for _ in range(2)]
    for out in sums:
        column_sum(case.dz, out)
    assert torch.equal(*sums)


@pytest.mark.parametrize(("splits", "size"), [(1, 5), (2, 5000), (7, 100), (64, 64), (200, 333)])
def test_sum_splits(splits: int, size: int) -> None:
    parts = Values(torch.float32, DEVICE).normal(splits, size)
    out = torch.full((size,), torch.nan, device=DEVICE)
    sum_splits(parts, out)
    torch.testing.assert_close(out.double(), parts.double().sum(0), rtol=0, atol=8 * EPS32 * splits**0.5)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 3, 3), (3, 70, 41, 40), (2, 64, 8, 8)])
def test_column_sum(shape: shapes.Shape4) -> None:
    for dtype in DTYPES:
        dz = nhwc(Values(dtype, DEVICE).normal(*shape))
        out = torch.full((shape[1],), torch.nan, dtype=dtype, device=DEVICE)
        column_sum(dz, out)
        true, size = dz.double().sum((0, 2, 3)), dz.double().abs().sum((0, 2, 3))
        assert ((out.double() - true).abs() <= torch.finfo(dtype).eps / 2 * true.abs() + 4 * EPS32 * size).all()


# --- dz computed while it is loaded ----------------------------------------------------------------------------------


def batch_norm_grad(
    shape: shapes.Shape4, dtype: torch.dtype, *, relu: bool, training: bool, affine: bool, seed: int = 0
) -> BatchNormGrad:
    values = Values(dtype, DEVICE, seed)
    dy, z, y = (nhwc(values.normal(*shape)) for _ in range(3))
    y = torch.relu(y)
    y[0, 0, 0, 0] = torch.nan
    vectors = [values.normal(shape[1], dtype=torch.float32) for _ in range(5)]
    weight, mean, invstd, sum_g, sum_g_xhat = vectors
    count = dy.numel() // shape[1] if training else None
    return BatchNormGrad(
        dy, z, y if relu else None, weight if affine else None, mean, invstd.abs(), sum_g, sum_g_xhat, count
    )


@HALF
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_computed_dz(relu: bool, training: bool, affine: bool, dtype: torch.dtype) -> None:
    """A 1x1 convolution whose weight is the identity hands dz through."""
    conv = Convolution((2, 20, 5, 5), 20, (1, 1))
    grad = batch_norm_grad(conv.output, dtype, relu=relu, training=training, affine=affine)
    case = Case(conv, dtype)
    case.w.copy_(torch.eye(20).view(20, 20, 1, 1))
    fields = [getattr(grad, field.name) for field in dataclasses.fields(grad)]
    expected = reference.bn_backward_apply(*[f.double() if isinstance(f, Tensor) else f for f in fields])
    rtol = torch.finfo(dtype).eps if dtype != torch.float32 else 8 * EPS32
    torch.testing.assert_close(case.dgrad(grad).double(), expected, rtol=rtol, atol=8 * EPS32)


@HALF
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["3x3", "3x3_stride2_odd", "1x1_stride2", "grouped", "stem", "padding_beyond_kernel"])
def test_gradients_with_computed_dz(name: str, training: bool, dtype: torch.dtype) -> None:
    """As with dz in memory, where padding counts for nothing: dz is not zero where dy, z and y are."""
    case = Case(CONVOLUTIONS[name], dtype)
    grad = batch_norm_grad(case.conv.output, dtype, relu=True, training=training, affine=True)
    fields = [getattr(grad, field.name) for field in dataclasses.fields(grad)]
    dz = reference.bn_backward_apply(*fields)
    # The reference may round an element of dz the other way: 2^-8 of a term in bfloat16.
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 6e-2}
    torch.testing.assert_close(case.dgrad(grad), case.dgrad(dz), **tolerance)
    torch.testing.assert_close(case.wgrad(grad), case.wgrad(dz), **tolerance)


# --- precision and addresses -----------------------------------------------------------------------------------------


def problem_of(case: Case, kind: configs.Kind) -> configs.ConvProblem:
    n, c, h, w = case.conv.input
    k, r, s = case.conv.channels, *case.conv.kernel
    stride, padding, dilation, groups = case.geometry
    return configs.ConvProblem(kind, case.dtype, n, h, w, c, k, r, s, stride, padding, dilation, groups)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_float32_follows_the_switch_of_torch(precision: str) -> None:
    conv = Convolution((2, 64, 9, 9), 64, (3, 3), padding=(1, 1))
    case = Case(conv)
    with float32_precision(precision):
        with launch.collected(launch.H100) as specs:
            case.dgrad()
            case.wgrad()
        found = case.dgrad().double().cpu()
    for spec in specs:
        assert spec.constants.get("PRECISION", precision) == precision
    if DEVICE == "cuda":
        grads = reference.conv_backward(
            case.dz.double(), case.x.double(), case.w.double(), *case.geometry, (True, False, False)
        )
        assert grads[0] is not None
        error = (found - grads[0].cpu()).norm() / grads[0].norm().cpu()
        assert error < 1e-6 if precision == "ieee" else 1e-5 < error < 2e-3


@pytest.mark.parametrize("name", ["3x3_stride2_odd", "grouped", "stem", "1x1"])
def test_64_bit_addresses_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(CONVOLUTIONS[name], torch.bfloat16)
    for split_k in (1, 3):
        config = ConvConfig(64, 16, 16, 4, 2, split_k=split_k)
        with configs.forced("dgrad", config), configs.forced("wgrad", config):
            narrow = case.dgrad(), case.wgrad()
            grad_plan.plan.cache_clear()
            with monkeypatch.context() as patch:
                patch.setattr(grad_plan, "_INT32_ELEMENTS", 1)
                wide = case.dgrad(), case.wgrad()
                assert grad_plan.plan(problem_of(case, "wgrad"), config).constants["INDEX64"]
            grad_plan.plan.cache_clear()
        assert all(torch.equal(*pair) for pair in zip(narrow, wide, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_more_elements_than_32_bits_can_count() -> None:
    """The gradients of the last of 33 images, whose elements are those beyond 2^31; the others have dz = 0."""
    images, channels, size = 33, 64, 1024
    whole, last = (Convolution((n, channels, size, size), channels, (1, 1)) for n in (images, 1))
    one = Case(last, torch.bfloat16)
    x, dz = (
        torch.zeros(whole.input, dtype=torch.bfloat16, device=DEVICE).to(memory_format=torch.channels_last)
        for _ in range(2)
    )
    x[-1:], dz[-1:] = one.x, one.dz
    dx, dw = torch.full_like(x, torch.nan), torch.full_like(one.w, torch.nan)
    dgrad(dz, one.w, *one.geometry, dx)
    wgrad(dz, x, *one.geometry, dw)
    torch.testing.assert_close(dx[-1:], one.dgrad(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(dw, one.wgrad(), rtol=1e-2, atol=1)  # sums of 2^20 products
    assert not dx[:-1].any()


# --- the verb --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "nhwc_slice_of_channels", "nchw_misaligned", "transposed"])
def test_gradients_have_the_layout_of_what_they_are_gradients_of(layout: str) -> None:
    conv = CONVOLUTIONS["3x3_stride2_odd"]
    values = Values(torch.float32, DEVICE)
    laid_out = shapes.LAYOUTS[layout]
    x, w, dz = (laid_out(values.normal(*shape)) for shape in (conv.input, conv.weight, conv.output))
    geometry = tuple(conv.options.values())
    triton = registry.backend("triton")
    grads = triton.conv_backward(dz, x, w, *geometry, (True, True, True))
    expected = reference.conv_backward(dz, x, w, *geometry, (True, True, True))
    for grad, like, true in zip(grads, (x, w, None), expected, strict=True):
        torch.testing.assert_close(grad, true, rtol=1e-5, atol=1e-4)
        if like is not None:
            assert grad.stride() == torch.empty_like(like).stride()
    assert triton.conv_backward(dz, x, w, *geometry, (False, False, False)) == (None, None, None)


# --- the backward of conv_bn_act without dz in memory ----------------------------------------------------------------

EVERYTHING = ("input", "conv_weight", "weight", "bias", "residual")


@HALF
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("needs_grad", [EVERYTHING, ("conv_weight", "bias"), ("input",), ("conv_weight", "residual")])
def test_fused_backward(
    needs_grad: tuple[str, ...], training: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every gradient meets the contract, whichever are wanted, also where it would not have been chosen."""
    chosen = []
    monkeypatch.setattr(fused_backward, "pays", lambda *args, **facts: chosen.append(args) or True)
    conv = Convolution((2, 24, 7, 6), 40, (3, 3), (2, 2), (1, 1))
    for activation in ("relu", "identity"):
        for affine in (True, False):
            call = shapes.conv_bn_act_call(
                conv, dtype, DEVICE, layout="nhwc", residual_layout="nchw", affine=affine, training=training,
                activation=activation,
            )  # fmt: skip
            with resfuse.use_backend("triton"):
                contract.check(call, needs_grad=needs_grad)
    assert len(chosen) == 4


def test_where_the_fused_backward_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory in which the separate verbs keep dz is not there: batch norm's backward writes no input gradient."""
    written = []
    backward = bn_act.backward

    def spy(*args: Any, **options: Any) -> None:
        written.append(args[6] is not None)
        backward(*args, **options)

    monkeypatch.setattr(bn_act, "backward", spy)

    def dz_is_written(conv: Convolution, needs_grad: tuple[str, ...], layout: str = "nhwc", **options: Any) -> bool:
        call = shapes.conv_bn_act_call(conv, torch.float32, DEVICE, layout=layout, residual_layout=None, **options)
        written.clear()
        with resfuse.use_backend("triton"):
            contract.check(call, needs_grad=needs_grad)
        return any(written)

    pointwise = Convolution((2, 16, 7, 7), 32, (1, 1))  # 16 channels: a single tile of them
    assert not dz_is_written(pointwise, ("conv_weight", "weight", "bias"), training=True)
    assert not dz_is_written(pointwise, ("input",), training=True)
    assert not dz_is_written(pointwise, ("input", "conv_weight"), training=False)
    assert dz_is_written(pointwise, ("input", "conv_weight"), training=True)  # read twice as three tensors
    assert dz_is_written(CONVOLUTIONS["3x3"], ("input",), training=True)  # read for nine taps
    assert dz_is_written(pointwise, ("conv_weight",), training=True, layout="nchw")
    assert dz_is_written(pointwise, ("conv_weight", "conv_bias"), training=True, conv_bias=True)


def test_when_computing_dz_pays() -> None:
    """Counted by hand, in passes over a tensor: separate (reduce, again, write dz, load it), fused (reduce, load)."""
    pays = functools.partial(fused_backward.pays, relu=True, training=True, sums=True, residual=False)
    assert pays([1])  # 3 + 3 + 1 + 1 against 3 + 3
    assert not pays([1, 1])  # 3 + 3 + 1 + 2 against 3 + 6
    assert not pays([1, 1], residual=True)  # 4 + 2 + 1 + 2 against 4 + 4: gains too little
    assert pays([1], relu=False)  # 2 + 2 + 1 + 1 against 2 + 2
    assert pays([1, 1], training=False, sums=False)  # 3 + 1 + 2 against 4: nothing has to be summed
    assert not pays([1, 1], training=False)  # 3 + 1 + 2 against 3 + 4
    assert not pays([])
