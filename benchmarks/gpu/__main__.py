"""Everything that a machine with a GPU can tell, in pieces: tests, benchmarks, tables, a report (docs/gpu.md)."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import summary, wheels
from benchmarks.gpu.pieces import GROUPS, PIECES, named
from benchmarks.gpu.runner import FAILED, Runner
from benchmarks.gpu.store import Store


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, also where time was too short for all; 1 where a step failed; 2 for arguments that can not be."""
    args = _parse(argv)
    # Where a shell started this in the background, Ctrl-C's signal is ignored, and so it would be by all started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        pieces = named(args.piece, args.group)
        if args.list:
            print("\n".join(f"{piece.name:<10} {piece.group:<7} {piece.minutes} min: {piece.what}" for piece in pieces))
            return 0
        store = Store(args.output, args.work)
        site = store.work / "scratch" / "site" if args.wheels else None
        if site is not None:
            wheels.install(args.wheels, site)
    except (ValueError, OSError) as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    runner = Runner(store, args.device, args.quick, args.limit, site)
    try:
        runner.do(pieces, again=args.again)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on")
    if site is not None:
        sys.path.insert(0, str(site))
    text = "\n".join(summary.lines(store.pieces, store.work))
    store.save(text)
    print(f"\n{text}\nin {store.output}: {', '.join(sorted(path.name for path in store.output.iterdir()))}")
    return 1 if any(summary.state(piece, store.pieces) == FAILED for piece in pieces) else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    add = parser.add_argument
    add("--output", type=Path, default=Path("out/gpu"), metavar="OUT", help="what is kept (default %(default)s)")
    add("--work", type=Path, default=Path("build/gpu"), metavar="DIR", help="where pieces work (default %(default)s)")
    add("--piece", nargs="+", metavar="NAME", help=f"of {', '.join(piece.name for piece in PIECES)}; default: all")
    add("--group", nargs="+", choices=GROUPS, help="all pieces of these groups")
    add("--limit", type=float, default=480.0, metavar="SECONDS", help="for this call (default %(default)g)")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="default %(default)s")
    add("--quick", action="store_true", help="a rehearsal: the smallest arguments that run the same code")
    add("--wheels", type=Path, metavar="DIR", help="packages to unpack that this machine lacks (`make gpu-wheels`)")
    add("--again", action="store_true", help="repeat what is done")
    add("--list", action="store_true", help="say which pieces there are")
    args = parser.parse_args(argv)
    if args.limit <= 0:
        parser.error(f"argument --limit: expected seconds above 0, got {args.limit:g}")
    if args.device == "cpu" and not args.quick:
        parser.error("argument --device: cpu is for rehearsals, with --quick")
    return args


if __name__ == "__main__":
    sys.exit(main())
