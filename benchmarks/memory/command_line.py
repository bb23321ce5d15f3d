"""The arguments of `python -m benchmarks.memory`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from benchmarks import options
from benchmarks.memory import networks
from benchmarks.memory.account import EAGER, PROVIDER_NAMES

UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
FITTED = ("resnet50",)
"""Whose largest batch is looked for, and whose compiled step is measured, on a GPU where none is chosen."""
TRIES = (16, 2)
"""Batches that the search may run; the second where each is compiled anew."""


def parse(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    """The arguments, with defaults for the machine."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=description)
    parser.add_argument("--level", nargs="+", choices=["model", "block"], default=["model", "block"])
    parser.add_argument("--model", nargs="+", help=f"networks (default {' '.join(networks.NAMES)})")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["bfloat16", "float32"])
    parser.add_argument("--provider", nargs="+", choices=PROVIDER_NAMES, default=list(PROVIDER_NAMES))
    parser.add_argument("--batch", nargs="+", type=_positive, default=[32, 64, 128, 256], help="of models")
    parser.add_argument("--block-batch", type=_positive, default=8, help="of blocks (default %(default)s)")
    parser.add_argument("--size", type=_positive, help="height and width of the images (default: the networks' own)")
    parser.add_argument(
        "--fit", type=_size, metavar="16GiB", help="look for the largest batch that fits into this (default on a GPU)"
    )
    parser.add_argument(
        "--measure", action=argparse.BooleanOptionalAction,
        help="run steps of these batches, too; default on a GPU only (on a CPU live tensors are counted, slowly)",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="leave out what the file has of the same commit")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds; what is left is said")
    options.add_common(parser)
    args = options.parse(parser, argv)
    args.chosen = args.model is not None
    # The network that all aims are about comes first, should time not suffice for all.
    args.model = args.model or sorted(networks.NAMES, key=lambda name: name not in FITTED)
    if args.measure is None:
        args.measure = args.device.type == "cuda"
    if args.fit is None and args.device.type == "cuda":
        args.fit = 16 << 30
    if EAGER not in args.provider:
        print(f"without {EAGER} there are no ratios")
    return args


def parse_size(text: str) -> int:
    """Bytes of "16GiB", "80 GB" or "1000".

    Raises:
        ValueError: it is none of that.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(\w*)\s*", text)
    if found is None or found[2] not in UNITS or float(found[1]) <= 0:
        raise ValueError(f"a size: expected a number with one of {', '.join(filter(None, UNITS))}, got {text!r}")
    return int(float(found[1]) * UNITS[found[2]])


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
