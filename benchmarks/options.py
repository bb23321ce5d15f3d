"""What the scripts' command lines have in common."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RESULTS = Path("benchmarks/results")


def summary(doc: str | None) -> str:
    """The first line of a script's docstring."""
    return (doc or "").partition("\n")[0]


def positive(text: str) -> int:
    """A whole number above 0, for `type=`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def add_common(parser: argparse.ArgumentParser) -> None:
    """Where to measure, and where to write."""
    parser.add_argument("--device", type=torch.device, help="default: cuda where there is one, else cpu")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory (default %(default)s)")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with a device."""
    args = parser.parse_args(argv)
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return args
