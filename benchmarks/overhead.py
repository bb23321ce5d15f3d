"""Host time of a fused call on tiny tensors, against the eager calls that it replaces; one thread.

The target is at most 1.1 times eager's time.  It is stated in the table, and asserted nowhere.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    args = parser.parse_args(argv)
    rounds, number = (2, 2) if args.quick else (args.rounds, args.calls)
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
