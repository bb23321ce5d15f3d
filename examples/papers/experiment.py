"""The course of an experiment: options, training, measurements, a tidy CSV, a plot, and a table of results."""

from __future__ import annotations

import argparse
import functools
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import resfuse
from examples.papers import data
from examples.papers.training import Run, sample, train_all

Build = Callable[..., nn.Module]
Measure = Callable[[nn.Module, Tensor, Tensor], list[float]]
Row = tuple[str, int, int, str, float]
"""Network, seed, epoch or layer (from 1), quantity and value: a line of the CSV."""
COLORS = ("#1b6ca8", "#d9622b", "#6aa84f", "#8e63b0", "#b58900", "#7f7f7f")


class Panel(NamedTuple):
    """One of the diagrams of a figure."""

    title: str
    quantity: str
    xlabel: str = "epoch"
    ylabel: str = ""
    yscale: str = "log"
    only: str = ""
    """The beginning of the names of the networks that are shown."""
    top: float | None = None
    """Upper end of the y axis."""


class Experiment(NamedTuple):
    """Networks that are trained and compared; the numbers are defaults of the options."""

    description: str
    networks: Callable[[int], dict[str, Build]]
    """By name, of one depth; `in_channels` and `width` are their arguments."""
    panels: Sequence[Panel]
    epochs: int
    seeds: int
    depths: Sequence[int]
    width: int = 8
    before: Mapping[str, Measure] = {}
    """Measurements of the untrained networks: quantity -> a value for each layer."""
    after: Mapping[str, Measure] = {}
    """Measurements of the trained networks."""

    def run(self, options: argparse.Namespace) -> None:
        """Train all networks, print the results, and write the CSV and the plot."""
        console, path = Console(), options.output / options.experiment
        images = data.load(options.cifar10, torch.device(options.device)).limited(options.images)
        runs = [
            Run(name, seed, functools.partial(build, in_channels=images.channels, width=options.width))
            for depth in options.depths
            for name, build in self.networks(depth).items()
            for seed in range(options.seeds)
        ]
        rows = self._measured(self.before, runs, images)
        train_all(runs, images, options.epochs, options.learning_rate, console)
        show_results(runs, console)
        rows += curves(runs) + self._measured(self.after, runs, images)
        facts = {
            "data": images.name, "epochs": options.epochs, "width": options.width,
            "learning_rate": options.learning_rate, "device": options.device,
            "torch": torch.__version__, "resfuse": resfuse.__version__,
        }  # fmt: skip
        values = pd.DataFrame(rows, columns=["network", "seed", "position", "quantity", "value"])
        path.parent.mkdir(parents=True, exist_ok=True)
        table = values.assign(**facts)
        table.to_csv(path.with_suffix(".csv"), index=False, float_format="%.6g", na_rep="nan")
        plot(path.with_suffix(".png"), values, facts, self.panels)
        console.print(f"Wrote {path}.csv and .png")

    @staticmethod
    def _measured(measures: Mapping[str, Measure], runs: Sequence[Run], images: data.Images) -> list[Row]:
        return [
            (run.network, run.seed, i, quantity, value)
            for run in runs
            for quantity, measure in measures.items()
            for i, value in enumerate(measure(run.model or run.make(images.device), *sample(images, 512)), 1)
        ]


def parser(description: str, experiments: Mapping[str, Experiment]) -> argparse.ArgumentParser:
    """The command line: an experiment and its options."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = found.add_subparsers(dest="experiment", required=True)
    for name, experiment in experiments.items():
        add = commands.add_parser(name, help=experiment.description, description=experiment.description).add_argument
        add("--cifar10", type=Path, help="folder of CIFAR-10's binary version; without it, digits")
        add("--epochs", type=int, default=experiment.epochs)
        add("--seeds", type=int, default=experiment.seeds, help="trainings of each network")
        add("--depths", type=int, nargs="+", default=experiment.depths, help="layers of the networks")
        add("--width", type=int, default=experiment.width, help="channels of the first stage (the paper: 16)")
        add("--learning-rate", type=float, default=0.1)
        add("--images", type=int, metavar="N", help="train and test with only N images")
        add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        add("--output", type=Path, default=Path("out"), help="folder for the CSV and the plot")
    return found


def curves(runs: Iterable[Run]) -> list[Row]:
    """Loss and errors of every epoch."""
    return [
        (run.network, run.seed, index, quantity, value)
        for run in runs
        for index, epoch in enumerate(run.epochs, 1)
        for quantity, value in epoch._asdict().items()
    ]


def plot(path: Path, values: pd.DataFrame, facts: Mapping[str, object], panels: Sequence[Panel]) -> None:
    """The diagrams side by side, and the conditions below: the means over seeds, in the range that they span.

    Each kind of network has its color, each depth its line style.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    networks = list(dict.fromkeys(values["network"]))
    kinds, depths = (list(dict.fromkeys(re.sub(part, "", name) for name in networks)) for part in (r"\d+", r"\D+"))
    size = {"figsize": (5.2 * len(panels), 4.2), "layout": "constrained"}
    same_scale = len({panel.ylabel or panel.title for panel in panels}) == 1
    figure, axes = pyplot.subplots(1, len(panels), squeeze=False, sharey=same_scale, **size)
    for panel, one in zip(panels, axes[0], strict=True):
        one.spines[["top", "right"]].set_visible(False)
        for name in (name for name in networks if name.startswith(panel.only)):
            kind, depth = kinds.index(re.sub(r"\d+", "", name)), depths.index(re.sub(r"\D+", "", name))
            color = COLORS[kind % len(COLORS)]
            found = values[(values["network"] == name) & (values["quantity"] == panel.quantity)]
            seeds = found.groupby("position")["value"].agg(["mean", "min", "max"])
            one.plot(seeds.index, seeds["mean"], label=name, color=color, linestyle=("-", "--", ":")[depth % 3])
            one.fill_between(seeds.index, seeds["min"], seeds["max"], color=color, alpha=0.15, linewidth=0)
        one.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel, yscale=panel.yscale)
        if panel.top is not None:
            one.set_ylim(0, panel.top)
        one.legend(frameon=False, fontsize=8)
    figure.supxlabel(", ".join(f"{name} {value}" for name, value in facts.items()), fontsize=7, color="#777777")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


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
