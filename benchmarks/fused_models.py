"""Writes docs/models.md: what `fuse_` fuses in the models of torchvision and timm, and what it leaves, and why."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

import resfuse
from resfuse.cli import catalogue
from resfuse.cli.catalogue import Entry
from resfuse.nn.batch_norm import batch_norm_kind
from resfuse.surgery import FuseReport

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
COMMAND = "python -m benchmarks.fused_models"
PACKAGES = ("torchvision", "timm")

INTRODUCTION = """\
# Models

What `resfuse.fuse_(model)` does to the residual networks of torchvision and timm. Written by `{command}`
with {versions}; `tests/test_fused_models.py` checks that it is up to date.

- **conv**: 2-D convolutions with a batch norm that run in one fused call, of all 2-D convolutions. Those that are not
  counted have no batch norm behind them (feature pyramids, heads, attention), or stand in the last column.
- **norm**: batch norms that are part of a fused call, of all batch norms.
- **calls**: fused calls in a forward pass: convolution + batch norm (+ residual) (+ ReLU), batch norm + ReLU, and
  residual + ReLU.
- **left**: what is called as it is, how often, and why.

Forward, every gradient and all running statistics of each of these models, in training and in inference, are held to
the [numerical contract](numerics.md#the-contract) by `python -m resfuse verify --models`.
"""


def page() -> str:
    """The whole page."""
    text = INTRODUCTION.format(command=COMMAND, versions=" and ".join(f"{name} {version(name)}" for name in PACKAGES))
    lines = [text]
    family = ""
    for entry in catalogue.entries():
        if entry.family != family:
            family = entry.family
            lines += [f"\n## {family}\n", "| model | conv | norm | calls | left |", "|---|--:|--:|--:|---|"]
        model = skeleton(entry)
        lines.append(row(entry, model, resfuse.fuse_(model)))
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def skeleton(entry: Entry) -> nn.Module:
    """The model without memory for its weights, where it can be built so."""
    try:
        with torch.device("meta"):
            return entry.build()
    except NotImplementedError:  # it computes with tensors while it is built
        return entry.build()


def row(entry: Entry, model: nn.Module, report: FuseReport) -> str:
    """One line of the table."""
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in model.modules() if batch_norm_kind(module) is not None]
    convs, batch_norms = fused_children(model, report)
    cells = (
        entry.name,
        f"{convs} of {len(convolutions)}",
        f"{batch_norms} of {len(norms)}" if norms else "none",
        str(report.fused_ops),
        "<br>".join(left(report)) or "nothing",
    )
    return f"| {' | '.join(cells)} |"


def fused_children(model: nn.Module, report: FuseReport) -> tuple[int, int]:
    """How many convolutions and how many batch norms the fused calls stand for."""
    convs, norms = set(), set()
    for fused in report.fused:
        parent = model.get_submodule(fused.name)
        for call in fused.ops:
            for name in call.split(" + "):
                module = None if name == "add" else parent.get_submodule(name)
                if isinstance(module, nn.Conv2d):
                    convs.add(module)
                elif module is not None and batch_norm_kind(module) is not None:
                    norms.add(module)
    return len(convs), len(norms)


def left(report: FuseReport) -> list[str]:
    """What is left, each kind with its number."""
    counts = Counter(shorten(module.reason) for module in report.left)
    return [f"{count} x {reason}" if count > 1 else reason for reason, count in counts.items()]


def shorten(reason: str) -> str:
    """A reason without the names of the calls that it speaks of, and without repetition."""
    parts = [re.sub(r"^[\w.]+( \+ [\w.]+)*: ", "", part) for part in reason.split("; ")]
    return ", ".join(dict.fromkeys(parts)).replace("|", "\\|")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--output", type=Path, default=PAGE)
    path = parser.parse_args(argv).output
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page())
    print(f"Wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
