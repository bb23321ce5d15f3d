"""Degradation: plain networks train worse when they are deeper, residual ones do not (arXiv:1512.03385, figure 6).

python -m examples.papers.degradation                         # scikit-learn's digits, minutes
python -m examples.papers.degradation --cifar10 FOLDER --width 16 --epochs 160 --device cuda
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from examples.papers import experiment
from examples.papers.experiment import Value
from examples.papers.training import train_all


def main(arguments: Sequence[str] | None = None) -> None:
    options = experiment.parser(__doc__ or "", epochs=15, seeds=2, depths=(20, 56)).parse_args(arguments)
    console, images = Console(), experiment.load(options)
    runs = experiment.plain_and_residual(options, images)
    train_all(runs, images, options.epochs, options.learning_rate, console)
    experiment.show_results(runs, console)
    values, facts = experiment.curves(runs), experiment.conditions(options, images)
    experiment.write_csv(options.output / "degradation.csv", values, facts)
    plot(values, options.depths, facts, options.output / "degradation.png")
    console.print(f"Wrote {options.output / 'degradation.csv'} and .png")


def plot(values: Sequence[Value], depths: Sequence[int], facts: dict[str, object], path: Path) -> None:
    """The training loss by epoch: left the plain networks, right the residual ones."""
    figure, axes = experiment.new_figure(2, facts, sharey=True)
    for panel, kind in zip(axes, experiment.KINDS, strict=True):
        for color, depth in zip(experiment.COLORS, depths, strict=False):
            name = f"{kind}-{depth}"
            experiment.plot_mean(panel, values, name, "train_loss", color=color, label=name)
        panel.set(title=f"{kind} networks", xlabel="epoch", yscale="log")
        panel.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("training loss")
    experiment.save_figure(figure, path)


if __name__ == "__main__":
    main()
