"""Independent implementations of the same operators on the same random problems: CUDA C++ in the emulator (and on a
GPU), Triton in its interpreter (or on a GPU), the cpu backend and the reference.

Each is held to the numerical contract, and to the others: outputs of the same memory format, results that differ by no
more than a few roundings of their terms, those of add_relu in no bit, and the same values that are not finite.  A
problem follows from its number alone, which the test's name ends with.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import resfuse
from resfuse import contract as rule
from tests import contract, shapes, split
from tests.contract import Call, Results
from tests.shapes import BOTH_FORMATS, LAYOUTS, Convolution, add_relu_call, bn_act_call, conv_bn_act_call

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

PROBLEMS = {"add_relu": 40, "bn_act": 60, "conv_bn_act": 80, "split": 30, "not_finite": 30}
"""In the default tier; the full suite has five times as many."""
TYPES = (torch.float32, torch.bfloat16, torch.float16)
CHANNELS = (1, 3, 5, 7, 8, 9, 16, 17, 24, 31, 32, 40, 64, 65, 72, 130)
KERNELS = ((1, 1), (1, 1), (3, 3), (3, 3), (3, 3), (1, 3), (3, 2), (5, 5), (7, 7))
ROUNDINGS = 32
"""Roundings of all terms of a result by which two implementations may differ: each may round z, the normalised values,
the sum with the residual, and their gradients.  Results that are no sums (the gradient of the residual), or are rounded
once (the output of add_relu), are the same in every bit."""
TF32_EPS = 2.0**-10


@dataclasses.dataclass(frozen=True)
class Problem:
    """Arguments of a maker of `tests.shapes`, for any backend and device."""

    kind: str
    number: int
    dtype: torch.dtype
    shape: Any
    options: dict[str, Any]
    tf32: bool = False

    @property
    def op(self) -> str:
        return self.kind if self.kind in contract.FUSED else self.options["op"]

    def call(self, device: str) -> Call:
        make = {"add_relu": add_relu_call, "bn_act": bn_act_call, "conv_bn_act": conv_bn_act_call}[self.op]
        options = {name: value for name, value in self.options.items() if name not in ("op", "shares")}
        return make(self.shape, self.dtype, device, seed=self.number, **options)

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        dtype = f"{str(self.dtype)[6:]}{' as TF32' if self.tf32 else ''}"
        return (
            f'python -m pytest "tests/ops/test_differential.py::test_{self.kind}[{self.number}]"\n'
            f"{self.kind} of {self.shape} in {dtype}, {options}"
        )


def problem(kind: str, number: int) -> Problem:
    """The problem of this number; a random generator of its own makes it, so it depends on no other."""
    pick = random.Random(f"{kind} {number}")
    dtype = pick.choice(TYPES)
    op = pick.choice(("add_relu", "bn_act", "conv_bn_act")) if kind == "not_finite" else kind
    options: dict[str, Any] = {"op": op} if kind == "not_finite" else {"op": "bn_act"} if kind == "split" else {}
    if op == "add_relu":
        size = [pick.randint(1, 12) for _ in range(pick.choice((1, 2, 3, 4, 4, 4)))]
        chosen = tuple(LAYOUTS) if len(size) == 4 else ("nchw",)
        options |= {"layout": pick.choice(chosen), "residual_layout": pick.choice(chosen)}
        return Problem(kind, number, dtype, tuple(size), options)
    training = kind in ("bn_act", "conv_bn_act") and pick.random() < 0.6
    options |= {
        "residual_layout": pick.choice((None, *LAYOUTS)),
        "affine": pick.random() < 0.8,
        "activation": pick.choice(("relu", "relu", "identity")),
        "training": training or kind == "split",
        "eps": pick.choice((1e-5, 1e-3, 0.1)),
        "momentum": pick.choice((0.1, pick.random())),
        "mean": pick.choice((0.0, 0.5, -20.0 if op == "bn_act" else 0.5)),
    }
    if op == "conv_bn_act":
        shape = convolution(pick, training)
        options |= {"layout": pick.choice(BOTH_FORMATS), "weight_layout": pick.choice(BOTH_FORMATS)}
        options["conv_bias"] = pick.random() < 0.3
        return Problem(kind, number, dtype, shape, options, tf32=dtype == torch.float32 and pick.random() < 0.5)
    size = [pick.randint(1, 5), pick.choice(CHANNELS), pick.randint(1, 10), pick.randint(1, 10)]
    while options["training"] and size[0] * size[2] * size[3] < 8:  # of fewer, the gradient is noise
        size[pick.choice((0, 2, 3))] += 1
    if kind == "split":
        size[0] += 1
        options["shares"] = pick.randint(1, size[0] - 1)
        options["residual_layout"] = options["residual_layout"] or "nchw"
        options["layout"] = options["residual_layout"] = pick.choice(BOTH_FORMATS)
    else:
        options["layout"] = pick.choice(tuple(LAYOUTS))
    return Problem(kind, number, dtype, tuple(size), options)


def convolution(pick: random.Random, training: bool) -> Convolution:
    """Small, and wide enough that PyTorch's own results are a measure (see test_known_bugs)."""
    kernel = pick.choice(KERNELS)
    groups = pick.choice((1, 1, 1, 1, 2, 4, 5))
    in_channels, out_channels = (groups * max(2, pick.choice(CHANNELS) // groups) for _ in range(2))
    stride = pick.choice(((1, 1), (1, 1), (2, 2), (2, 1), (3, 2)))
    if kernel == (1, 1) and in_channels < 16:
        stride = (1, 1)
    if max(kernel) == 7:  # the stem
        in_channels, groups = 3, 1
    dilation = (1, 1) if max(kernel) > 3 else pick.choice(((1, 1), (1, 1), (2, 2), (1, 2)))
    padding = tuple(pick.randint(0, k // 2 + 1) for k in kernel)
    low = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    size = [max(extent, 1, step) + pick.randint(0, 6) for extent, step in zip(low, stride, strict=True)]
    images = pick.randint(1, 3)
    conv = Convolution((images, in_channels, *size), out_channels, kernel, stride, padding, dilation, groups)  # type: ignore[arg-type]
    while training and conv.output[0] * conv.output[2] * conv.output[3] < 8:
        conv = dataclasses.replace(conv, input=(conv.input[0] + 1, *conv.input[1:]))
    return conv


def implementations(item: Problem) -> list[tuple[str, str]]:
    """(backend, device) of everything that runs the problem."""
    return shapes.running("split" if item.kind == "split" else item.op, item.dtype)


@contextmanager
def float32_convolutions(precision: str) -> Iterator[None]:
    """TF32 or not, by torch's switch, which is what the backends read."""
    switch: Any = torch.backends.cudnn.conv
    before = switch.fp32_precision
    switch.fp32_precision = precision
    try:
        yield
    finally:
        switch.fp32_precision = before


@pytest.fixture(autouse=True)
def _ieee() -> Iterator[None]:
    with float32_convolutions("ieee"):
        yield


def numbers(kind: str) -> pytest.MarkDecorator:
    more = range(PROBLEMS[kind], 5 * PROBLEMS[kind])
    return pytest.mark.parametrize(
        "number", [*range(PROBLEMS[kind]), *(pytest.param(number, marks=pytest.mark.slow) for number in more)]
    )


def test_all_implementations_take_part() -> None:
    """Every backend of this machine takes part in each operator and dtype."""
    for kind in ("add_relu", "bn_act", "conv_bn_act", "split"):
        for dtype in TYPES:
            found = {backend for backend, _ in implementations(dataclasses.replace(problem(kind, 0), dtype=dtype))}
            expected = {"cuda_emulator", "triton", "cuda"} & set(shapes.BACKENDS) | {"reference"}
            assert expected <= found, f"{kind} in {dtype}"


@numbers("add_relu")
def test_add_relu(number: int) -> None:
    hold_together(problem("add_relu", number))


@numbers("bn_act")
def test_bn_act(number: int) -> None:
    hold_together(problem("bn_act", number))


@numbers("conv_bn_act")
def test_conv_bn_act(number: int) -> None:
    item = problem("conv_bn_act", number)
    with float32_convolutions("tf32" if item.tf32 else "ieee"):
        hold_together(item)


@numbers("split")
def test_split(number: int) -> None:
    hold_together(problem("split", number))


def hold_together(item: Problem) -> None:
    """Run a problem, forward and backward, on everything that can; hold each to the contract and all to each other."""
    call = item.call("cpu")
    grad_output = contract.random_grad_output(call, torch.Generator().manual_seed(1))
    if item.tf32 and item.options["activation"] == "relu":  # float16 has the precision of TF32
        grad_output = grad_output.masked_fill(contract.decided_by_rounding(call.map(Tensor.half)), 0)
    reference = contract.results(contract.EAGER, call.truth(), grad_output.double())
    terms = contract.term_sizes(call, grad_output)
    # Twice: of hundreds of small problems some are unlucky for us, or lucky for eager.
    floor = 2 * (rule.TF32_FLOOR if item.tf32 else rule.FLOORS[item.dtype])
    found: dict[tuple[str, str], Results] = {}
    eagers: dict[str, list[Results]] = {}
    try:
        for backend, device in implementations(item):
            there = item.call(device)
            with resfuse.use_backend(backend):
                results = run(item, backend, there, grad_output)
            if device not in eagers:
                measures = [there, there.map(channels_last), *([rounded_to_tf32(there)] if item.tf32 else [])]
                eagers[device] = [contract.eager_results(each, grad_output) for each in measures]
            eager = [{name: other[name] for name in results} for other in eagers[device]]
            truth = {name: reference[name] for name in results}
            contract.assert_within_contract(results, eager, truth, item.dtype, terms, floor=floor)
            found[backend, device] = results
        for (first, a), (second, b) in itertools.combinations(found.items(), 2):
            hold_to_each_other(item, a, b, terms, f"{first} and {second}")
    except Exception as error:
        raise AssertionError(f"{item}\n{error}") from error


def run(item: Problem, backend: str, call: Call, grad_output: Tensor) -> Results:
    if item.kind != "split":
        return contract.results(contract.FUSED, call, grad_output)
    share = item.options["shares"]
    return split.results(backend, call, grad_output.to(call.input), [slice(0, share), slice(share, None)])


def hold_to_each_other(item: Problem, a: Results, b: Results, terms: Results, who: str) -> None:
    assert a.keys() == b.keys(), who
    assert strides(a["output"]) == strides(b["output"]), f"{who}: the output's memory format"
    eps = TF32_EPS if item.tf32 else torch.finfo(item.dtype).eps
    # Of normalised values, which are about one apart, a mean of 20 in float32 costs 20 roundings.
    eps += torch.finfo(torch.float32).eps * abs(item.options.get("mean", 0))
    for name, left in a.items():
        right = b[name].cpu()
        assert left.dtype == right.dtype, f"{who}: {name}"
        difference = (left.cpu().double() - right.double()).abs()
        sizes = terms.get(name, torch.zeros(()))
        allowed = ROUNDINGS * eps * (sizes + sizes.mean() / 8)
        excess = (difference - allowed).max().item()
        assert excess <= 0, f"{who}: {name} differs by {difference.max().item():.2e}, {excess:.2e} too much"


def strides(tensor: Tensor) -> list[int]:
    """Those that address something."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def rounded_to_tf32(call: Call) -> Call:
    """The convolution's operands as tensor cores take them: on a CPU, eager has no TF32 to be measured by."""
    x, w = call.input, call.tensors["conv_weight"]
    assert w is not None
    return call.replace(input=x.half().float(), conv_weight=w.half().float())


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


@numbers("not_finite")
def test_not_finite(number: int) -> None:
    """NaN and Inf come out where eager has them, and nowhere else; forward and with running statistics."""
    item = problem("not_finite", number)
    pick = random.Random(number)
    call = item.call("cpu")
    planted = call.input.clone()  # keeps the layout of a dense tensor
    for value in (torch.nan, torch.inf, -torch.inf)[: pick.randint(1, 3)]:
        planted[tuple(pick.randrange(extent) for extent in planted.shape)] = value
    call = call.replace(input=planted)
    expected, eager = (contract.forward(contract.EAGER, each) for each in (call.truth(), call.map(torch.clone)))
    for backend, device in implementations(item):
        with resfuse.use_backend(backend), torch.no_grad():
            output = contract.forward(contract.FUSED, call.map(lambda tensor: tensor.to(device))).cpu()  # noqa: B023
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            wrong = kind(output) != kind(expected)
            wrong &= kind(eager) == kind(expected)  # oneDNN, in bfloat16, multiplies padding of zeros with infinities
            assert not wrong.any(), f"{item}\n{backend}: {kind.__name__}"
