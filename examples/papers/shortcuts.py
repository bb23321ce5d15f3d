"""Shortcut options A, B and C: does it matter what happens where the shape changes? (arXiv:1512.03385, table 3)

python -m examples.papers.shortcuts
python -m examples.papers.shortcuts --cifar10 FOLDER --width 16 --epochs 160 --device cuda
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from examples.papers import experiment
from examples.papers.training import Run, train_all
from resfuse.models import cifar_plain, cifar_resnet


def main(arguments: Sequence[str] | None = None) -> None:
    options = experiment.parser(__doc__ or "", epochs=12, seeds=3, depths=(20,)).parse_args(arguments)
    console, images = Console(), experiment.load(options)
    runs = []
    for depth in options.depths:
        sizes = {"in_channels": images.channels, "width": options.width}
        for seed in range(options.seeds):
            runs.append(Run(f"plain-{depth}", seed, lambda d=depth, s=sizes: cifar_plain(d, **s)))
            for shortcut in "ABC":
                runs.append(
                    Run(
                        f"resnet-{depth} {shortcut}",
                        seed,
                        lambda d=depth, s=sizes, o=shortcut: cifar_resnet(d, shortcut=o, **s),
                    )
                )
    train_all(runs, images, options.epochs, options.learning_rate, console)
    experiment.show_results(runs, console)
    values, facts = experiment.curves(runs), experiment.conditions(options, images)
    experiment.write_csv(options.output / "shortcuts.csv", values, facts)
    figure, axes = experiment.new_figure(2, facts)
    for panel, quantity, title in zip(axes, ("train_loss", "test_error"), ("training loss", "test error"), strict=True):
        for color, network in zip(experiment.COLORS, dict.fromkeys(run.network for run in runs), strict=False):
            experiment.plot_mean(panel, values, network, quantity, color=color, label=network)
        panel.set(title=title, xlabel="epoch", yscale="log" if quantity == "train_loss" else "linear")
        panel.legend(frameon=False, fontsize=8)
    axes[1].set_ylim(0, 0.3)
    experiment.save_figure(figure, options.output / "shortcuts.png")
    console.print(f"Wrote {options.output / 'shortcuts.csv'} and .png")


if __name__ == "__main__":
    main()
