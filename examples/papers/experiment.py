"""Shared by the experiments: options, networks, a tidy CSV, plots of one style, and a table of results."""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import resfuse
from examples.papers import data
from examples.papers.training import Run
from resfuse.models import cifar_plain, cifar_resnet

KINDS = {"plain": cifar_plain, "resnet": cifar_resnet}
COLORS = ("#1b6ca8", "#d9622b", "#6aa84f", "#8e63b0", "#b58900", "#7f7f7f")


class Value(NamedTuple):
    """One line of the CSV."""

    network: str
    seed: int
    position: int
    """The epoch, or the layer."""
    quantity: str
    value: float


def parser(description: str, *, epochs: int, seeds: int, depths: Sequence[int]) -> argparse.ArgumentParser:
    """The options of all experiments."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--cifar10", type=Path, help="folder of CIFAR-10's binary version; without it, digits")
    options.add_argument("--epochs", type=int, default=epochs)
    options.add_argument("--seeds", type=int, default=seeds, help="trainings of each network")
    options.add_argument("--depths", type=int, nargs="+", default=list(depths), help="layers of the networks")
    options.add_argument("--width", type=int, default=8, help="channels of the first stage (the paper: 16)")
    options.add_argument("--learning-rate", type=float, default=0.1)
    options.add_argument("--images", type=int, metavar="N", help="train and test with only N images")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--output", type=Path, default=Path("out"), help="folder for the CSV and the plot")
    return options


def load(arguments: argparse.Namespace) -> data.Images:
    """The images that the options select."""
    return data.load(arguments.cifar10, torch.device(arguments.device)).limited(arguments.images)


def plain_and_residual(options: argparse.Namespace, images: data.Images) -> list[Run]:
    """Networks of both kinds, of all depths, from all seeds."""
    return [
        Run(f"{kind}-{depth}", seed, lambda b=build, d=depth: b(d, in_channels=images.channels, width=options.width))
        for kind, build in KINDS.items()
        for depth in options.depths
        for seed in range(options.seeds)
    ]


def conditions(arguments: argparse.Namespace, images: data.Images) -> dict[str, object]:
    """Conditions of the figures, for the CSV and the plot."""
    return {
        "data": images.name,
        "epochs": arguments.epochs,
        "width": arguments.width,
        "learning_rate": arguments.learning_rate,
        "device": arguments.device,
        "torch": torch.__version__,
        "resfuse": resfuse.__version__,
    }


def curves(runs: Iterable[Run]) -> list[Value]:
    """Loss and errors of every epoch."""
    values = []
    for run in runs:
        for index, epoch in enumerate(run.epochs):
            for quantity in ("train_loss", "train_error", "test_error"):
                values.append(Value(run.network, run.seed, index + 1, quantity, getattr(epoch, quantity)))
    return values


def write_csv(path: Path, values: Iterable[Value], facts: dict[str, object]) -> None:
    """One line per value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*Value._fields, *facts))
        writer.writerows((*value[:-1], f"{value.value:.6g}", *facts.values()) for value in values)


def new_figure(columns: int, facts: dict[str, object], *, sharey: bool = False) -> tuple[Any, Any]:
    """A figure with several axes side by side, and its conditions below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = {"figsize": (5.2 * columns, 4.2), "layout": "constrained"}
    figure, axes = pyplot.subplots(1, columns, squeeze=False, sharey=sharey, **size)
    for one in axes[0]:
        one.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(", ".join(f"{name} {value}" for name, value in facts.items()), fontsize=7, color="#777777")
    return figure, axes[0]


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure and close it."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_mean(axes: Any, values: Iterable[Value], network: str, quantity: str, **style: Any) -> None:
    """A line through the means over seeds, in the middle of the range that the seeds span."""
    by_position: dict[int, list[float]] = {}
    for value in values:
        if value.network == network and value.quantity == quantity:
            by_position.setdefault(value.position, []).append(value.value)
    positions = sorted(by_position)
    means = [statistics.fmean(by_position[position]) for position in positions]
    axes.plot(positions, means, **style)
    if any(len(group) > 1 for group in by_position.values()):
        low, high = ([pick(by_position[position]) for position in positions] for pick in (min, max))
        axes.fill_between(positions, low, high, color=style.get("color"), alpha=0.15, linewidth=0)


def show_results(runs: Sequence[Run], console: Console) -> None:
    """The last epoch of every network: the mean over seeds, and the range."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("network", style="cyan", no_wrap=True)
    for heading in ("parameters", "training loss", "training error", "test error"):
        table.add_column(heading, justify="right")
    for network in dict.fromkeys(run.network for run in runs):
        group = [run for run in runs if run.network == network]
        model = group[0].model
        count = 0 if model is None else sum(parameter.numel() for parameter in model.parameters())
        cells = [f"{count:,}"]
        for quantity, form in (("train_loss", "{:.4f}"), ("train_error", "{:.1%}"), ("test_error", "{:.1%}")):
            found = [getattr(run.epochs[-1], quantity) for run in group]
            text = form.format(math.nan if not found else statistics.fmean(found))
            spread = f" ({form.format(min(found))} to {form.format(max(found))})" if len(found) > 1 else ""
            cells.append(text + spread)
        table.add_row(network, *cells)
    console.print(table)
