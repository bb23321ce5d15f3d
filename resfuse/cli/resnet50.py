"""The demo's second half: torchvision's ResNet-50 compared with its fused copy, and both timed."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor, nn

from resfuse import contract
from resfuse.cli import models
from resfuse.cli.timing import Timing, interleave

NAME = "resnet50"
BUDGET = 20.0
"""Seconds per batch size after which no further round of timing begins."""
Timings = dict[int, dict[str, Timing]]
"""Seconds per forward pass, by batch size and version of the model."""


def comparison_table(outputs: Mapping[str, Tensor], exact: Tensor) -> Table:
    """How far every version's output is from float64, and from eager's."""
    title = f"{NAME}: outputs for {len(exact)} photographs"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("version", style="cyan", no_wrap=True)
    for heading in ("error against\nfloat64", "largest diff.\nfrom eager", "relative to\nlargest out", "same\nclass"):
        table.add_column(heading, justify="right")
    eager = outputs[models.EAGER].double()
    for name, output in outputs.items():
        difference = (output.double() - eager).abs().max().item()
        same = int((output.argmax(1) == eager.argmax(1)).sum())
        table.add_row(
            name,
            f"{contract.relative_error(output, exact):.1e}",
            f"{difference:.1e}",
            f"{difference / eager.abs().max().item():.1e}",
            f"{same} of {len(output)}",
        )
    return table


def measure(
    versions: Mapping[str, nn.Module], device: torch.device, size: int, rounds: Mapping[int, int], console: Console
) -> Timings:
    """Time all versions at each batch size of `rounds`, which says how often at most."""
    timings: Timings = {}
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn())
    with Progress(*columns, console=console, expand=True) as progress, torch.inference_mode():
        for batch, count in rounds.items():
            images = models.photographs(batch, size).to(device)
            calls = {
                name: functools.partial(model, models.layout_for(name, images)) for name, model in versions.items()
            }
            task = progress.add_task(f"timing, batch {batch:2d}", total=len(calls) * (count + 1))
            advance = functools.partial(progress.advance, task)
            timings[batch] = interleave(calls, count, device, budget=BUDGET, after_call=advance)
            progress.update(task, total=progress.tasks[task].completed)
    return timings


def timing_table(timings: Timings, size: int) -> Table:
    """Medians and ratios."""
    table = Table(title=f"{NAME}: inference at {size}x{size}, float32", title_justify="left", title_style="bold")
    table.box, table.padding, table.pad_edge = box.SIMPLE_HEAD, (0, 1, 0, 0), False
    rounds = ", ".join(f"{len(group[models.EAGER].seconds)} at batch {batch}" for batch, group in timings.items())
    table.caption, table.caption_justify = f"Medians; the versions took turns, rounds: {rounds}.", "left"
    table.add_column("batch", justify="right", no_wrap=True)
    table.add_column("version", style="cyan", no_wrap=True)
    for heading in ("ms", "p20-p80", "images/s", "against\neager", "against\nch._last"):
        table.add_column(heading, justify="right", no_wrap=True)
    for batch, group in timings.items():
        for name, timing in group.items():
            table.add_row(
                str(batch) if name == models.EAGER else "",
                name,
                f"{timing.median * 1e3:.1f}" if timing.median < 1 else f"{timing.median * 1e3:.0f}",
                f"{timing.quantile(0.2) * 1e3:.0f}-{timing.quantile(0.8) * 1e3:.0f}",
                f"{batch / timing.median:.1f}",
                _ratio(group[models.EAGER], timing),
                _ratio(group[models.EAGER_CHANNELS_LAST], timing),
            )
        table.add_section()
    return table


def _ratio(base: Timing, timing: Timing) -> str:
    return f"{base.median / timing.median:.2f}x"
