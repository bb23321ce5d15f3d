"""Small problems that together take every path of csrc/cuda: what runs under the sanitizers, for coverage, and on
kernels with planted bugs.  Each compares a backend's kernels with the reference in float64.

Bounds are a few roundings of the dtype: the numerical contract, which is stricter, is held by the tests of the
operators, on problems of more sizes.

`python -m tests.emulator.cases cuda`, or `triton bfloat16`, is what compute-sanitizer watches: no PyTorch kernel of any
size runs beside ours, for tensors are made and compared on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from resfuse.backends import cuda, cuda_conv, dispatch, reference
from resfuse.backends.cuda_conv import TILES, ConvConfig
from resfuse.types import Pooling
from tests.backends.operands import TWO_PASSES, Operands, convolved
from tests.contract import to_device
from tests.emulator import backend as emulator
from tests.emulator import sm90
from tests.shapes import Convolution, conv_bn_act_call, devices_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}
EPS = {"fp32": 1e-5, "bf16": 2.0**-6, "fp16": 2.0**-9, "tf32": 2.0**-8}

# (N, C, H, W): channels that vectors of 16 bytes divide, and that they do not; more pixels than one step of the blocks.
ACTIVATIONS = {"vectors": (3, 40, 8, 8), "scalars": (3, 17, 7, 5)}
# Several tiles in M of each size and nothing that fills one; nine steps of the main loop, so that every slot of shared
# memory is filled again.
CONV = Convolution((2, 32, 12, 9), 72, (3, 3), padding=(1, 1))
FEW_PIXELS = Convolution((1, 32, 5, 4), 16, (3, 3), padding=(1, 1))
SMALL = {
    "1x1": Convolution((2, 24, 7, 9), 16, (1, 1), (2, 1)),
    "channels": Convolution((2, 9, 5, 6), 11, (3, 3), (2, 2), (1, 1)),
    "stem": Convolution((1, 3, 15, 13), 8, (7, 7), (2, 2), (3, 3)),
    "padded stem": Convolution((1, 4, 15, 13), 8, (7, 7), (2, 2), (3, 3)),
    "groups": Convolution((1, 16, 5, 5), 32, (3, 3), padding=(1, 1), groups=2),
}

# For csrc/cuda/sm90: several tiles for each block; pixels, channels and filters that fill none; and more steps than
# slots of shared memory.
SM90 = {
    "3x3": Convolution((2, 64, 14, 14), 136, (3, 3), padding=(1, 1)),
    "3x3 stride 2": Convolution((3, 72, 15, 13), 64, (3, 3), (2, 2), (1, 1)),
    "1x1": Convolution((2, 72, 14, 14), 64, (1, 1)),
    "1x1 odd": Convolution((3, 200, 11, 13), 136, (1, 1)),
    "1x1 padded": Convolution((2, 16, 11, 13), 72, (1, 1), padding=(1, 0)),
    "1x1 stride 2": Convolution((2, 64, 14, 15), 200, (1, 1), (2, 2)),
    "dilated": Convolution((1, 64, 20, 17), 64, (3, 3), padding=(2, 2), dilation=(2, 2)),
    "7x7": Convolution((1, 8, 32, 32), 64, (7, 7), (2, 2), (3, 3)),
    "asymmetric": Convolution((2, 16, 11, 9), 264, (3, 5), (2, 1), (0, 2), (2, 1)),
    "to one pixel": Convolution((5, 64, 3, 3), 72, (3, 3)),
}
SM90_STEM = Convolution((1, 3, 31, 28), 72, (7, 7), (2, 2), (3, 3))  # whose filter rows are packed
SM90_MODES: dict[str, dict[str, Any]] = {
    "eval": {"residual_layout": "nhwc", "conv_bias": True},
    "eval in place": {"residual_layout": "nhwc"},
    "eval plain": {"residual_layout": None, "activation": "identity"},
    "train": {"residual_layout": "nhwc", "conv_bias": True, "training": True},
}
SM90_BLOCKS = 2
dispatch.register("sm90_emulator", sm90)

POOLINGS = {
    "3x3": Pooling((3, 3), (2, 2), (1, 1), (1, 1), False),
    "ceil": Pooling((2, 3), (3, 2), (1, 0), (1, 1), True),
    "dilated": Pooling((3, 2), (1, 2), (1, 1), (2, 3), False),
}

Cases = Iterator[tuple[str, Callable[[], None]]]


def cases(backend: str, dtypes: Collection[str]) -> Cases:
    """(name, case), such as "conv train bf16 128x64"; a case raises an AssertionError where a kernel is wrong.

    Those that differ in csrc's own settings alone are left out for Triton.
    """
    kernels, device = dispatch.backend(backend), devices_of(backend)[0]
    for dtype in (name for name, dtype in DTYPES.items() if str(dtype)[6:] in dtypes):
        if backend.startswith("sm90"):
            if dtype != "fp32":
                yield from _sm90(kernels, device, dtype)
            continue
        if dtype != "tf32":
            yield from _pointwise(kernels, device, dtype)
        if dtype != "tf32" and backend != "triton":  # which has no kernels for it
            yield from _pooling(kernels, device, dtype)
            yield from _padding(device, dtype)
        for label, *problem in _convolutions():
            if backend != "triton" or label.rpartition(" ")[2] in (*SMALL, "64x64"):
                yield f"conv {label.format(dtype)}", _conv(kernels, device, dtype, *problem)


def _pointwise(kernels: Any, device: str, dtype: str) -> Cases:
    for (label, shape), layout in itertools.product(ACTIVATIONS.items(), ("nhwc", "nchw", "nhwc_misaligned")):
        ours, truth = (Operands(module, shape, DTYPES[dtype], "cpu", layout) for module in (kernels, reference))
        ours.tensors = {name: to_device(tensor, device) for name, tensor in ours.tensors.items()}
        truth.tensors = {name: tensor.double() for name, tensor in truth.tensors.items()}
        expected = truth.calls()
        for name, call in ours.calls().items():
            for launches in (1, 2) if name in TWO_PASSES else (0,):

                def case(call: Any = call, expected: Any = expected[name], launches: int = launches) -> None:
                    with mock.patch.object(cuda, "_launches", launches):
                        _compare(_named(call()), _named(expected()), EPS[dtype])

                yield f"{name} {dtype} {label} {layout}" + f" launches={launches}" * (launches > 0), case


def _pooling(kernels: Any, device: str, dtype: str) -> Cases:
    for channels, (label, pooling) in itertools.product((16, 5), POOLINGS.items()):

        def case(channels: int = channels, pooling: Pooling = pooling) -> None:
            input = torch.randn(2, channels, 9, 11).to(DTYPES[dtype]).contiguous(memory_format=torch.channels_last)
            output, positions = kernels.max_pool_forward(to_device(input, device), pooling)
            expected, where = reference.max_pool_forward(input, pooling)
            assert torch.equal(output.cpu(), expected) and torch.equal(positions.cpu(), where)
            grad_output = torch.randn(expected.shape).to(DTYPES[dtype])
            found = kernels.max_pool_backward(to_device(grad_output, device), positions, input.shape, pooling)
            truth = reference.max_pool_backward(grad_output.double(), where, input.shape, pooling)
            _compare(_named(found), _named(truth), EPS[dtype])

        yield f"max_pool {dtype} {label} {channels} channels", case


def _padding(device: str, dtype: str) -> Cases:
    for channels, padded in ((3, 4), (5, 24), (2, 3)):  # stores of 8 or 16 bytes, of 16, and of an element

        def case(channels: int = channels, padded: int = padded) -> None:
            input = torch.randn(2, channels, 9, 11).to(DTYPES[dtype])
            found = cuda_conv.padded(to_device(input, device), padded)
            assert torch.equal(found.cpu(), F.pad(input, (0, 0, 0, 0, 0, padded - channels)))

        yield f"pad_channels {dtype} {channels} to {padded}", case


def _convolutions() -> Iterator[tuple[str, Convolution, bool, ConvConfig]]:
    """(label, where {} is the dtype, convolution, training, configuration)."""
    for m, n in TILES:
        yield f"train {{}} {m}x{n}", CONV, True, ConvConfig(m, n, launches=1)
        yield f"eval {{}} {m}x{n}", CONV, False, ConvConfig(m, n)
    yield "train {} launches=2", CONV, True, ConvConfig(64, 64, launches=2)
    for launches in (1, 2):
        yield f"splits {{}} launches={launches}", FEW_PIXELS, False, ConvConfig(64, 64, 3, launches)
    for (label, conv), (mode, training) in itertools.product(SMALL.items(), (("eval", False), ("train", True))):
        yield f"{mode} {{}} {label}", conv, training, ConvConfig(64, 64)


def _sm90(kernels: Any, device: str, dtype: str) -> Cases:
    problems = (SM90 | {"stem": SM90_STEM}).items()
    for (label, conv), tile, (mode, options) in itertools.product(problems, kernels.TILES, SM90_MODES.items()):

        def case(
            conv: Convolution = conv, tile: int = tile, mode: str = mode, options: dict[str, Any] = options
        ) -> None:
            call = conv_bn_act_call(conv, DTYPES[dtype], layout="nhwc", **options)
            ours = call.map(lambda tensor: to_device(tensor.clone(), device))
            with sm90.use_tile(tile, SM90_BLOCKS):
                found = convolved(kernels, ours, overwrite_residual=mode == "eval in place")
            _compare(found, convolved(reference, call.truth()), EPS[dtype])

        yield f"conv {mode} {dtype} 128x{tile} {label}", case


def _conv(
    kernels: Any, device: str, dtype: str, conv: Convolution, training: bool, config: ConvConfig
) -> Callable[[], None]:
    def case() -> None:
        options: Any = {"layout": "nhwc", "residual_layout": "nhwc", "conv_bias": True, "training": training}
        call = conv_bn_act_call(conv, DTYPES[dtype], **options)
        with cuda_conv.use_config(config), fp32_precision("tf32" if dtype == "tf32" else "ieee"):
            found = convolved(kernels, call.map(lambda tensor: to_device(tensor, device)))
        _compare(found, convolved(reference, call.truth()), EPS[dtype])

    return case


@contextlib.contextmanager
def fp32_precision(value: str) -> Iterator[Any]:
    """Torch's switch for TF32, with a value of its `fp32_precision`; a test may set others."""
    switch: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, switch.fp32_precision = switch.fp32_precision, value
    try:
        yield switch
    finally:
        switch.fp32_precision = before


def _named(results: Tensor | tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    results = (results,) if isinstance(results, Tensor) else results
    return {f"result_{number}": tensor for number, tensor in enumerate(results)}


def _compare(found: Any, expected: Any, eps: float) -> None:
    for name, tensor in expected.items():
        other = found[name]
        assert (tensor is None) == (other is None), name
        if tensor is None or other is None:
            continue
        error = (other.cpu().double() - tensor).abs() / (tensor.abs() + tensor.abs().mean() + 1e-3)
        worst = error.max().item() if not error.isnan().any() else float("nan")
        assert worst <= 2 * eps, f"{name}: {worst:.2e} of {2 * eps:.2e}, {int((error > 2 * eps).sum())} elements"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 where a case failed, or none has the name; 2 where the backend does not run here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", nargs="?", default="cuda_emulator")
    parser.add_argument("dtype", nargs="*", default=["float32", "bfloat16", "float16"])
    parser.add_argument("-k", dest="match", default="", help="only cases with this in their name")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="of the emulator; 0 runs all in order")
    args = parser.parse_args(argv)
    reason = dispatch.backend(args.backend).unavailable_reason()
    if reason is not None:
        print(reason)
        return 2
    found = [(name, case) for name, case in cases(args.backend, args.dtype) if args.match in name]
    failed, start = 0, time.perf_counter()
    for seed, (name, case) in itertools.product(args.seed, found):
        try:
            with emulator.device(seed=seed) if args.backend.endswith("_emulator") else contextlib.nullcontext():
                case()
        except (AssertionError, RuntimeError) as error:
            failed += 1
            print(f"FAILED {name} (seed {seed}): {error}", flush=True)
    print(f"{len(args.seed) * len(found)} cases, {failed} failed, {time.perf_counter() - start:.1f} s")
    return int(failed > 0 or not found)


if __name__ == "__main__":
    sys.exit(main())
