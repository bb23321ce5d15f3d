"""Host time per call on tiny tensors: a fused operator against the eager operators that it replaces."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence

import torch

from benchmarks import ops, options, records
from benchmarks.measure import block_seconds
from benchmarks.ops import MODES, TINY, OpCall
from benchmarks.options import DTYPES
from benchmarks.records import Conditions, Record, Subject
from benchmarks.terminal import Terminal

WARMUP = 3
"""Blocks that do not count."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    terminal = Terminal()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        conditions = records.current_conditions(args.device, 1)
        terminal.conditions(conditions)
        rows: list[Record] = []
        combinations = list(itertools.product(TINY, MODES, args.dtype))
        with terminal.progress() as progress:
            progress.begin("measuring", len(combinations))
            for case, mode, dtype in combinations:
                if case.op != "add_relu" or mode != "train_forward":
                    rows += _rows(OpCall(case, mode, DTYPES[dtype], args.device), args, conditions)
                progress.advance()
    finally:
        torch.set_num_threads(threads)
    for dtype in args.dtype:
        title = f"Host time per call, 1 thread, {dtype}"
        terminal.pairs(title, [row for row in rows if row.dtype == dtype], "us", 1e6)
    path = args.output / "overhead.csv"
    records.update(path, rows)
    terminal.say(f"Wrote {path}")
    return 0


def _rows(call: OpCall, args: argparse.Namespace, conditions: Conditions) -> list[Record]:
    """What a call costs either way."""
    with call.context():
        ops.check(call)
        found = _interleave({"eager_channels_last": call.eager(), "resfuse": call.fused()}, args)
    shape, dtype = records.shape_text(call.case.shape), records.dtype_text(call.dtype)
    return [
        Subject("op", ops.title(call.case), provider, call.mode, shape, dtype, call.layout)
        .record("host_time", seconds, "s", conditions)
        for provider, seconds in found.items()
    ]  # fmt: skip


def _interleave(calls: dict[str, Callable[[], object]], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per call, of blocks of calls in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(WARMUP + args.rounds):
        for name, call in calls.items():
            block = block_seconds(call, args.calls, args.device)
            if turn >= WARMUP:
                seconds[name].append(block)
    return seconds


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=options.summary(__doc__))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32"])
    parser.add_argument("--rounds", type=int, help="blocks of each side that count (default 50)")
    parser.add_argument("--calls", type=int, help="calls per block (default 100)")
    parser.add_argument("--quick", action="store_true", help="few and short blocks: a trial, not a measurement")
    options.add_common(parser)
    args = options.parse(parser, argv)
    rounds, calls = (2, 5) if args.quick else (50, 100)
    args.rounds, args.calls = args.rounds or rounds, args.calls or calls
    return args


if __name__ == "__main__":
    raise SystemExit(main())
