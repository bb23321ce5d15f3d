"""Small problems that together take every path of csrc/cuda: what runs under the sanitizers, for coverage, and on
kernels with planted bugs.  Each compares the emulated kernels with the reference in float64.

Bounds are a few roundings of the dtype: the numerical contract, which is stricter, is held by the tests of the
operators, on problems of more sizes.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from resfuse.backends import cuda, cuda_conv, reference
from resfuse.backends.cuda_conv import TILES, ConvConfig
from resfuse.types import BatchNorm
from tests.shapes import LAYOUTS, Convolution, Values

Results = Mapping[str, Tensor | None]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EPS = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
TF32_EPS = 2.0**-8


def cases() -> dict[str, Callable[[], None]]:
    """By name, such as "conv train bf16 128x64"; each raises an AssertionError where a kernel is wrong."""
    return {name: case for group in (_add_relu(), _batch_norm(), _convolutions()) for name, case in group}


Cases = Iterator[tuple[str, Callable[[], None]]]


def _add_relu() -> Cases:
    for (name, dtype), layout in itertools.product(DTYPES.items(), ("nhwc", "nhwc_misaligned")):

        def case(dtype: torch.dtype = dtype, layout: str = layout) -> None:
            values = Values(dtype)
            input, residual, grad = (LAYOUTS[layout](values.normal(3, 7, 9, 11)) for _ in range(3))
            _compare(
                {
                    "output": cuda.add_relu_forward(input, residual),
                    "grad": cuda.add_relu_backward(grad, input),
                },
                {
                    "output": reference.add_relu_forward(input.double(), residual.double()),
                    "grad": reference.add_relu_backward(grad.double(), input.double()),
                },
                EPS[dtype],
            )

        yield f"add_relu {name} {layout}", case


# (N, C, H, W): channels that vectors of 16 bytes divide, and that they do not; more pixels than one step of the blocks.
ACTIVATIONS = {"vectors": (3, 40, 8, 8), "scalars": (3, 17, 7, 5)}


def _batch_norm() -> Cases:
    shapes = itertools.product(DTYPES.items(), ACTIVATIONS.items(), ("nhwc", "nchw"))
    for (dtype_name, dtype), (name, shape), layout in shapes:
        label = f"{dtype_name} {name} {layout}"
        for launches in (1, 2):
            yield f"bn train {label} launches={launches}", _bn_train(dtype, shape, layout, launches)
        yield f"bn eval {label}", _bn_eval(dtype, shape, layout)
        yield f"bn split {label}", _bn_split(dtype, shape, layout)


def _bn_train(dtype: torch.dtype, shape: tuple[int, ...], layout: str, launches: int) -> Callable[[], None]:
    def case() -> None:
        input, residual, grad, bn = _activation(dtype, shape, layout)
        with _form(launches):
            found = _train(cuda, input, residual, grad, bn)
        _compare(found, _train(reference, input.double(), residual.double(), grad.double(), _double(bn)), EPS[dtype])

    return case


def _train(
    backend: Any, input: Tensor, residual: Tensor, grad: Tensor, bn: dict[str, Tensor], relu: bool = True
) -> Results:
    means, variances = bn["running_mean"].clone(), bn["running_var"].clone()
    batch_norm = BatchNorm(means, variances, bn["weight"], bn["bias"], True, 0.1, 1e-5)
    output, mean, invstd = backend.bn_act_forward(input, batch_norm, residual, relu)
    # The mask comes from the residual, which no rounding moves across zero.
    mask = residual if relu else None
    grads = backend.bn_act_backward(grad, input, mask, bn["weight"], mean, invstd, True, True, True)
    names = ("output", "mean", "invstd", "running_mean", "running_var", "grad_input", "sums", "sum", "grad_residual")
    return dict(zip(names, (output, mean, invstd, means, variances, *grads), strict=True))


def _bn_eval(dtype: torch.dtype, shape: tuple[int, ...], layout: str) -> Callable[[], None]:
    def case() -> None:
        input, residual, grad, bn = _activation(dtype, shape, layout)

        def run(backend: Any, input: Tensor, residual: Tensor, grad: Tensor, bn: dict[str, Tensor]) -> Results:
            mean, var = bn["running_mean"], bn["running_var"]
            frozen = BatchNorm(mean, var, None, None, False, 0.1, 1e-5)
            output, _, _ = backend.bn_act_forward(input, frozen, None, False)
            affine = frozen._replace(weight=bn["weight"], bias=bn["bias"])
            both, _, _ = backend.bn_act_forward(input, affine, residual, True)
            grads = backend.bn_act_backward(grad, input, residual, bn["weight"], mean, var, False, True, True)
            return dict(zip(("output", "both", "dx", "dw", "db", "dr"), (output, both, *grads), strict=True))

        expected = run(reference, input.double(), residual.double(), grad.double(), _double(bn))
        _compare(run(cuda, input, residual, grad, bn), expected, EPS[dtype])

    return case


def _bn_split(dtype: torch.dtype, shape: tuple[int, ...], layout: str) -> Callable[[], None]:
    def case() -> None:
        input, residual, grad, bn = _activation(dtype, shape, layout)

        def run(backend: Any, input: Tensor, residual: Tensor, grad: Tensor, bn: dict[str, Tensor]) -> Results:
            weight, mean, invstd = bn["weight"], bn["running_mean"], bn["running_var"]
            found = dict(zip(("mean", "m2"), backend.bn_statistics(input), strict=True))
            found["output"] = backend.bn_apply(input, mean, invstd, weight, bn["bias"], residual, True)
            sums = backend.bn_backward_reduce(grad, input, residual, mean, invstd)
            count = input.numel() // input.shape[1]
            found["frozen"] = backend.bn_backward_apply(grad, input, None, weight, mean, invstd, *sums[:2], None)
            found["grad_input"] = backend.bn_backward_apply(
                grad, input, residual, weight, mean, invstd, bn["bias"], mean, count
            )
            return found | dict(zip(("sum", "sums", "masked"), sums, strict=True))

        expected = run(reference, input.double(), residual.double(), grad.double(), _double(bn))
        _compare(run(cuda, input, residual, grad, bn), expected, EPS[dtype])

    return case


# Several tiles in M of each size and nothing that fills one; nine steps of the main loop, so that every slot of shared
# memory is filled again.
CONV = Convolution((2, 32, 12, 9), 72, (3, 3), padding=(1, 1))
SMALL = {
    "1x1": Convolution((2, 24, 7, 9), 16, (1, 1), (2, 1)),
    "channels": Convolution((2, 9, 5, 6), 11, (3, 3), (2, 2), (1, 1)),
    "stem": Convolution((1, 3, 15, 13), 8, (7, 7), (2, 2), (3, 3)),
    "padded stem": Convolution((1, 4, 15, 13), 8, (7, 7), (2, 2), (3, 3)),
    "groups": Convolution((1, 16, 5, 5), 32, (3, 3), padding=(1, 1), groups=2),
}


def _convolutions() -> Cases:
    for name in ("bf16", "fp16", "fp32", "tf32"):
        for tile in TILES:
            label = f"{name} {tile[0]}x{tile[1]}"
            yield f"conv train {label}", _conv(name, CONV, True, ConvConfig(*tile, launches=1))
            yield f"conv eval {label}", _conv(name, CONV, False, ConvConfig(*tile))
        yield f"conv train {name} launches=2", _conv(name, CONV, True, ConvConfig(64, 64, launches=2))
        for launches in (1, 2):
            few = Convolution((1, 32, 5, 4), 16, (3, 3), padding=(1, 1))
            config = ConvConfig(64, 64, 3, launches)
            yield f"conv splits {name} launches={launches}", _conv(name, few, False, config)
        for label, conv in SMALL.items():
            for training in (False, True):
                mode = "train" if training else "eval"
                yield f"conv {mode} {name} {label}", _conv(name, conv, training, ConvConfig(64, 64))


def _conv(name: str, conv: Convolution, training: bool, config: ConvConfig) -> Callable[[], None]:
    def case() -> None:
        dtype = DTYPES.get(name, torch.float32)
        values = Values(dtype)
        scale = (conv.weight[1] * conv.weight[2] * conv.weight[3]) ** -0.5
        input, residual = LAYOUTS["nhwc"](values.normal(*conv.input)), LAYOUTS["nhwc"](values.normal(*conv.output))
        weight, bn = LAYOUTS["nhwc"](values.normal(*conv.weight, scale=scale)), values.batch_norm(conv.channels)
        bias = values.normal(conv.channels, dtype=torch.float32)

        def run(backend: Any, cast: Callable[[Tensor], Tensor]) -> Results:
            running = {key: cast(bn[key].clone()) for key in ("running_mean", "running_var")}
            affine = cast(bn["weight"]), cast(bn["bias"])
            output, z, mean, invstd = backend.conv_bn_act_forward(
                cast(input), cast(weight), cast(bias), conv.settings,
                BatchNorm(*running.values(), *affine, training, 0.1, 1e-5), cast(residual), True,
            )  # fmt: skip
            return {"output": output, "z": z, "mean": mean, "invstd": invstd, **running}

        with cuda_conv.use_config(config), _tf32(name == "tf32"):
            found = run(cuda, lambda tensor: tensor)
        _compare(found, run(reference, Tensor.double), TF32_EPS if name == "tf32" else EPS[dtype])

    return case


@contextlib.contextmanager
def _form(launches: int) -> Iterator[None]:
    """Batch norm in so many launches."""
    before, cuda._launches = cuda._launches, launches
    yield
    cuda._launches = before


@contextlib.contextmanager
def _tf32(on: bool) -> Iterator[None]:
    switch: Any = torch.backends.cudnn.conv
    before, switch.fp32_precision = switch.fp32_precision, "tf32" if on else "ieee"
    yield
    switch.fp32_precision = before


def _activation(
    dtype: torch.dtype, shape: tuple[int, ...], layout: str
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Input, residual, gradient of the output, and batch norm's vectors."""
    values = Values(dtype)
    input, residual, grad = (LAYOUTS[layout](values.normal(*shape, mean=0.5)) for _ in range(3))
    return input, residual, grad, values.batch_norm(shape[1])


def _double(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


def _compare(found: Results, expected: Results, eps: float) -> None:
    for name, tensor in expected.items():
        other = found[name]
        assert (tensor is None) == (other is None), name
        if tensor is None or other is None:
            continue
        error = (other.double() - tensor).abs() / (tensor.abs() + tensor.abs().mean() + 1e-3)
        worst = error.max().item() if not error.isnan().any() else float("nan")
        assert worst <= 2 * eps, f"{name}: {worst:.2e} of {2 * eps:.2e}, {int((error > 2 * eps).sum())} elements"
