"""Host time of a fused call on tiny tensors, against the eager calls that it replaces; one thread.

The target is at most 1.1 times eager's time.  It is stated in the table, and asserted nowhere.

`--stubbed cuda sm90 triton` measures, without a GPU, what a module in inference takes up to the launch: on CPU tensors,
through the bindings as the emulator compiles them, with kernels that do not run.  CUDA's own part of a launch, a few
microseconds, is missing.
"""

from __future__ import annotations

import argparse
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

import resfuse

TARGET = 1.1
MODES = ("inference", "full")
"""Forward with running statistics and no gradients; forward with batch statistics and backward."""


class Tiny(NamedTuple):
    """A call so small that it costs what its surroundings cost."""

    op: str
    shape: tuple[int, ...]
    kernel: int = 0
    residual: bool = False


TINY = {
    # Batches for which eager's convolution on the CPU takes oneDNN as large ones do: with one thread 2, and 16 for 1x1.
    "conv_bn_act 1x1": Tiny("conv_bn_act", (16, 32, 2, 2), kernel=1),
    "conv_bn_act 3x3": Tiny("conv_bn_act", (2, 32, 7, 7), kernel=3),
    "conv_bn_act 3x3 + residual": Tiny("conv_bn_act", (2, 32, 7, 7), kernel=3, residual=True),
    "bn_act": Tiny("bn_act", (2, 32, 7, 7)),
    "bn_act + residual": Tiny("bn_act", (2, 32, 7, 7), residual=True),
    "add_relu": Tiny("add_relu", (2, 32, 7, 7), residual=True),
}
Call = Callable[[], Any]


def eager(
    op: str, input: Tensor, conv_weight: Tensor | None = None, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None, *,
    residual: Tensor | None = None, padding: int = 0, training: bool = False,
) -> Tensor:  # fmt: skip
    """The calls that `getattr(resfuse, op)` replaces, in place wherever torchvision's blocks are."""
    if op == "add_relu":
        return F.relu(input + residual, inplace=True)  # type: ignore[operator]
    output = input if conv_weight is None else F.conv2d(input, conv_weight, None, 1, padding)
    output = F.batch_norm(output, running_mean, running_var, weight, bias, training, 0.1, 1e-5)
    if residual is not None:
        output += residual
    return F.relu(output, inplace=True)


def calls(tiny: Tiny, mode: str, dtype: torch.dtype, device: str) -> tuple[Call, Call]:
    """The fused call and the eager one, on tensors of their own with the same values."""

    def make(function: Callable[..., Tensor]) -> Call:
        torch.manual_seed(0)
        channels = tiny.shape[1]

        def images(*shape: int) -> Tensor:
            return torch.randn(shape).to(device, dtype).contiguous(memory_format=torch.channels_last)

        leaves = {"input": images(*tiny.shape)}
        options: dict[str, Any] = {}
        if tiny.kernel:
            leaves["conv_weight"] = images(channels, channels, tiny.kernel, tiny.kernel) * channels**-0.5 / tiny.kernel
            options["padding"] = tiny.kernel // 2
        if tiny.residual:
            leaves["residual"] = images(*tiny.shape)
        if tiny.op != "add_relu":
            leaves |= {name: (torch.rand(channels) + 0.5).to(device) for name in ("weight", "bias")}
            options |= {name: (torch.rand(channels) + 0.5).to(device) for name in ("running_mean", "running_var")}
            options["training"] = mode == "full"
        if mode == "inference":
            return torch.no_grad()(lambda: function(**leaves, **options))
        differentiated = [tensor.requires_grad_() for tensor in leaves.values()]
        grad_output = torch.ones_like(leaves["input"])
        return lambda: torch.autograd.grad(function(**leaves, **options), differentiated, grad_output)

    return make(getattr(resfuse, tiny.op)), make(lambda **arguments: eager(tiny.op, **arguments))


def check(fused: Call, plain: Call) -> None:
    """Compare both sides before they are timed.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    pairs = zip(*(one if isinstance(one, tuple) else (one,) for one in (fused(), plain())), strict=True)
    for result, expected in pairs:
        torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)


def host_seconds(call: Call, number: int, device: torch.device) -> float:
    """Seconds per call of the calling thread, from a loop of `number` calls; on a GPU the time to enqueue them."""
    if device.type == "cpu":
        return float(Timer("call()", globals={"call": call}, num_threads=1).timeit(number).mean)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(number):
        call()
    elapsed = time.perf_counter() - started
    torch.cuda.synchronize()
    return elapsed / number


BACKENDS = ("cuda", "sm90", "triton")
STUBBED_TARGET = 10.0
"""Microseconds."""


@contextmanager
def stubbed(name: str) -> Iterator[Any]:
    """The kernels of a backend for GPUs, on CPU tensors and with launches that do nothing."""
    from resfuse.backends import cuda, sm90, triton
    from tests.emulator import backend as emulator

    if name != "triton":
        assert (reason := emulator.unavailable_reason()) is None, reason
        with emulator.device(resident_blocks=0):
            yield {"cuda": cuda, "sm90": sm90}[name]
        return
    assert not triton.INTERPRETED, "TRITON_INTERPRET is set: Triton's interpreter is not what launches on a GPU"
    from resfuse.backends.triton import conv_bn_act, launch
    from resfuse.backends.triton.config import H100

    def always(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    class Kernel:
        """Compiled at the first launch, launched directly at all others."""

        __name__, fn = "conv_bn_act_kernel", None

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return always(types.SimpleNamespace(run=always(None), function=None, packed_metadata=None))

    active = types.SimpleNamespace(get_current_stream=always(0))
    with (
        mock.patch.object(conv_bn_act, "conv_bn_act_kernel", Kernel()),
        mock.patch.object(conv_bn_act, "properties", always(H100)),
        mock.patch.object(launch, "driver", types.SimpleNamespace(active=active)),
        mock.patch.object(launch, "takes_direct_calls", always(True)),
        mock.patch.object(torch.cuda, "current_device", always(-1)),  # as get_device() of a CPU tensor
    ):
        yield triton


def stubbed_times(names: Sequence[str], number: int, rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds of processor time per call: of the module, of the module with a residual, of the backend alone."""
    from resfuse.backends import dispatch
    from resfuse.nn import ConvBNAct2d
    from resfuse.types import BatchNorm, Convolution

    def microseconds(call: Call) -> float:
        found = []
        for _ in range(rounds + 1):  # the first fills caches
            started = time.process_time()
            for _ in range(number):
                call()
            found.append((time.process_time() - started) / number * 1e6)
        return min(found[1:])

    def images() -> Tensor:
        return torch.randn(1, 64, 7, 7, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)

    layer = ConvBNAct2d(64, 64, 1).eval().bfloat16().to(memory_format=torch.channels_last)
    x, residual, settings = images(), images(), Convolution((1, 1), (0, 0), (1, 1), 1)
    state = BatchNorm(layer.bn.running_mean, layer.bn.running_var, layer.bn.weight, layer.bn.bias, False, 0.0, 1e-5)
    table = {}
    for name in names:
        with torch.no_grad(), stubbed(name) as kernels:
            stand_in = types.SimpleNamespace(
                KERNELS=("conv_bn_act_forward",), unavailable_reason=lambda: None, unsupported_reasons=lambda _: [],
                conv_bn_act_forward=kernels.conv_bn_act_forward,
            )  # fmt: skip
            if hasattr(kernels, "inference_route"):
                stand_in.inference_route = kernels.inference_route
            dispatch.register(f"{name}_stubbed", stand_in)
            with resfuse.use_backend(f"{name}_stubbed"):
                table[name] = {
                    "module": microseconds(lambda: layer(x)),
                    "with residual": microseconds(lambda: layer(x, residual)),
                    "backend alone": microseconds(
                        lambda: kernels.conv_bn_act_forward(x, layer.conv.weight, None, settings, state, None, True)
                    ),
                }
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and write overhead.csv."""
    import pandas as pd

    from benchmarks import results
    from benchmarks.case import DTYPES, Case, Setting
    from benchmarks.harness import order

    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="default %(default)s")
    parser.add_argument("--device", default="cuda" if gpu else "cpu", help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=50, help="blocks of calls of each side (default %(default)s)")
    parser.add_argument("--calls", type=int, default=100, help="calls per block (default %(default)s)")
    parser.add_argument("--output", type=Path, default=results.RESULTS, metavar="DIR", help="default %(default)s")
    parser.add_argument("--quick", action="store_true", help="few and short blocks: a trial, not a measurement")
    parser.add_argument("--stubbed", nargs="+", choices=BACKENDS, metavar="NAME", help=f"of {', '.join(BACKENDS)}")
    args = parser.parse_args(argv)
    rounds, number = (2, 2) if args.quick else (args.rounds, args.calls)
    if args.stubbed:
        print(f"Host time up to the launch in us, bfloat16; the target is at most {STUBBED_TARGET:g} with the module")
        print(pd.DataFrame(stubbed_times(args.stubbed, number, rounds)).T.to_string(float_format="%.1f"))
        return 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    conditions, rows, table = results.conditions(args.device, 1), [], {}
    try:
        for name, tiny in TINY.items():
            for mode in MODES:
                fused, plain = calls(tiny, mode, DTYPES[args.dtype], args.device)
                sides = {"resfuse": fused, "eager_channels_last": plain}
                check(*sides.values())
                seconds: dict[str, list[float]] = {side: [] for side in sides}
                for index in range(-3, rounds):  # three rounds of warm-up
                    for side in order(list(sides), index):
                        block = host_seconds(sides[side], number, torch.device(args.device))
                        if index >= 0:
                            seconds[side].append(block)
                case = Case("overhead", name, (), (tiny.shape,))
                setting = Setting(mode, DTYPES[args.dtype], args.device, 1)
                rows += [results.row(case, setting, side, "host_time", "s", found) for side, found in seconds.items()]
                ours, eagers = (results.quantiles(found)["p50"] * 1e6 for found in seconds.values())
                table[f"{name}, {mode}"] = {"resfuse": ours, "eager": eagers, "ratio": ours / eagers}
    finally:
        torch.set_num_threads(threads)
    results.update(args.output / "overhead.csv", [row | conditions for row in rows])
    print(f"Host time per call in us, one thread, {args.dtype}; the target is a ratio of at most {TARGET}")
    print(pd.DataFrame(table).T.to_string(float_format="%.2f"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
