"""Compare this tree, as it is, with another commit: time of models' steps, of single operators and on the host.

Exits with 1 where results are wrong or, with --fail-over, something is slower, with 2 where BASE can not be had.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import records
from benchmarks.compare import contest, jobs, report, trees
from benchmarks.compare.contest import BASE, CONTROL, NOW, Comparison
from benchmarks.compare.side import SideError, SideProcess
from benchmarks.compare.tasks import Task
from benchmarks.compare.trees import ROOT, Tree
from benchmarks.options import DTYPES, positive, summary

MODES = ("inference", "train")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        with _terminated_as_by_ctrl_c():
            comparisons, labels, conditions = _compare(args)
    except (trees.TreeError, SideError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the worktree is removed", file=sys.stderr)
        return 130
    report.show(comparisons)
    if args.csv is not None:
        report.write(args.csv, comparisons, labels, conditions)
        print(f"Wrote {args.csv}")
    return int(any(comparison.fails(args.fail_over) for comparison in comparisons))


def planned(args: argparse.Namespace) -> list[Task]:
    """What the arguments ask for."""
    dtypes, device = [DTYPES[name] for name in args.dtype], args.device.type
    found = list(jobs.model_tasks(args.model, args.mode, args.batch, dtypes, device, args.size))
    return found + (list(jobs.micro_tasks(args.mode, dtypes, device)) if args.micro else [])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; --device is one that is there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=summary(__doc__))
    add = parser.add_argument
    add("base", metavar="BASE", help="a commit, or a folder with another checkout")
    add("--model", nargs="*", default=["resnet50"], metavar="NAME", help="of torchvision (default resnet50)")
    add("--mode", nargs="+", choices=MODES, default=["inference"], help="default inference")
    add("--batch", nargs="+", type=positive, default=[], metavar="N", help="images (default: by device and mode)")
    add("--size", type=positive, default=224, help="height and width of images (default %(default)s)")
    add("--dtype", nargs="+", choices=tuple(DTYPES), default=["float32"], help="default float32")
    add("--micro", action="store_true", help="single operators too: on large tensors, and host time on tiny ones")
    add("--rounds", type=positive, default=20, help="turns of each side; an interval needs 8 (default %(default)s)")
    add("--no-control", action="store_true", help="no second process of BASE, whose difference from the first is noise")
    add("--warm-up", type=float, default=20.0, metavar="SECONDS", help="at most, per side (default %(default)s)")
    add("--threads", type=positive, default=torch.get_num_threads(), help="of the CPU (default %(default)s)")
    add("--device", type=torch.device, help="default: cuda where there is one, else cpu")
    add("--fail-over", type=part, metavar="5%", help="exit with 1 where something is slower by more than this")
    add("--csv", type=Path, metavar="PATH", help="write the results there")
    args = parser.parse_args(argv)
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if str(args.device) not in ("cpu", "cuda"):
        parser.error(f"--device: expected cpu or cuda (which GPU, CUDA_VISIBLE_DEVICES says), got {args.device}")
    return args


def part(text: str) -> float:
    """0.05 of "5%", or of "0.05".

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected a part such as 5% or 0.05, got {text!r}")
    return value


def _compare(args: argparse.Namespace) -> tuple[list[Comparison], tuple[str, str], records.Conditions]:
    conditions = records.current_conditions(args.device, args.threads)
    tasks = planned(args)
    stale = trees.stale_reason(ROOT)
    if stale:
        _say(f"Careful: {stale}")
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(trees.checked_out(args.base, _say, cuda=args.device.type == "cuda"))
        here = Tree(ROOT, conditions.commit or "this tree")
        chosen = {BASE: base, NOW: here} | ({} if args.no_control else {CONTROL: base})
        sides = {name: stack.enter_context(SideProcess(tree, args.threads)) for name, tree in chosen.items()}
        _describe(conditions, sides)
        total = len(tasks) * args.rounds * len(sides)
        turn = iter(range(1, total + 1))
        found = contest.compare(
            tasks, sides, args.rounds, args.warm_up, args.threads, advance=lambda: _progress(next(turn), total)
        )
        return list(found), (base.label, here.label), conditions


def _describe(conditions: records.Conditions, sides: dict[str, SideProcess]) -> None:
    """What is compared, and a warning where the sides have not the same backends."""
    found = {name: side.describe() for name, side in sides.items()}
    _say(f"{conditions.device}, {conditions.threads} threads, {conditions.versions}")
    for name in (BASE, NOW):
        _say(f"{name}: {sides[name].tree.label}, backends {found[name]['backends']}")
    if found[BASE]["backends"] != found[NOW]["backends"]:
        _say("Careful: the backends differ, so that the ratio may be that of a library which was not built")


def _progress(turn: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\rturn {turn} of {total}", end="\n" if turn == total else "", file=sys.stderr, flush=True)


def _say(text: str) -> None:
    print(text, flush=True)


@contextlib.contextmanager
def _terminated_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM is a KeyboardInterrupt inside, so that the worktree is removed."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
