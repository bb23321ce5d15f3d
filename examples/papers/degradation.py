"""Degradation: plain networks train worse when they are deeper, residual ones do not (arXiv:1512.03385, figure 6).

python -m examples.papers.degradation                         # scikit-learn's digits, minutes
python -m examples.papers.degradation --cifar10 FOLDER --width 16 --epochs 160 --device cuda
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from examples.papers import experiment
from examples.papers.training import Run, train_all
from resfuse.models import cifar_plain, cifar_resnet

KINDS = {"plain": cifar_plain, "resnet": cifar_resnet}


def main(arguments: Sequence[str] | None = None) -> None:
    options = experiment.parser(__doc__ or "", epochs=15, seeds=2, depths=(20, 56)).parse_args(arguments)
    console, images = Console(), experiment.load(options)
    runs = [
        Run(f"{kind}-{depth}", seed, lambda b=build, d=depth: b(d, in_channels=images.channels, width=options.width))
        for kind, build in KINDS.items()
        for depth in options.depths
        for seed in range(options.seeds)
    ]
    train_all(runs, images, options.epochs, options.learning_rate, console)
    experiment.show_results(runs, console)
    values, facts = experiment.curves(runs), experiment.conditions(options, images)
    experiment.write_csv(options.output / "degradation.csv", values, facts)
    figure, axes = experiment.new_figure(2, facts)
    for panel, kind in zip(axes, KINDS, strict=True):
        for color, depth in zip(experiment.COLORS, options.depths, strict=False):
            name = f"{kind}-{depth}"
            experiment.plot_mean(panel, values, name, "train_loss", color=color, label=f"{name}, training loss")
        panel.set(title=f"{kind} networks", xlabel="epoch", ylabel="training loss", yscale="log")
        panel.sharey(axes[0])
        panel.legend(frameon=False, fontsize=8)
    experiment.save_figure(figure, options.output / "degradation.png")
    console.print(f"Wrote {options.output / 'degradation.csv'} and .png")


if __name__ == "__main__":
    main()
