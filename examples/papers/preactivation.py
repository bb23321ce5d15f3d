"""Pre- against post-activation in deep networks: does a clean identity path train better? (arXiv:1603.05027, figure 6)

    python -m examples.papers.preactivation
    python -m examples.papers.preactivation --cifar10 FOLDER --width 16 --epochs 160 --depths 110 1202 --device cuda

Basic blocks on both sides and the same shortcuts (option A), so that only the place of BN and ReLU differs.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from examples.papers import experiment
from examples.papers.training import Run, train_all
from resfuse.models import cifar_preact_resnet, cifar_resnet


def main(arguments: Sequence[str] | None = None) -> None:
    parser = experiment.parser(__doc__ or "", epochs=6, seeds=1, depths=(110, 164))
    parser.set_defaults(width=4)  # minutes rather than a quarter of an hour
    options = parser.parse_args(arguments)
    console, images = Console(), experiment.load(options)
    runs = []
    for depth in options.depths:
        sizes = {"in_channels": images.channels, "width": options.width, "shortcut": "A"}
        for seed in range(options.seeds):
            runs.append(Run(f"post-activation {depth}", seed, lambda d=depth, s=sizes: cifar_resnet(d, **s)))
            runs.append(
                Run(f"pre-activation {depth}", seed, lambda d=depth, s=sizes: cifar_preact_resnet(d, "basic", **s))
            )
    train_all(runs, images, options.epochs, options.learning_rate, console)
    experiment.show_results(runs, console)
    values, facts = experiment.curves(runs), experiment.conditions(options, images)
    experiment.write_csv(options.output / "preactivation.csv", values, facts)
    figure, axes = experiment.new_figure(2, facts)
    for panel, quantity, title in zip(axes, ("train_loss", "test_error"), ("training loss", "test error"), strict=True):
        for i, network in enumerate(dict.fromkeys(run.network for run in runs)):
            style = {"color": experiment.COLORS[i % 2], "linestyle": ("-", "--", ":")[i // 2 % 3], "label": network}
            experiment.plot_mean(panel, values, network, quantity, **style)
        panel.set(title=title, xlabel="epoch", yscale="log" if quantity == "train_loss" else "linear")
        panel.legend(frameon=False, fontsize=8)
    experiment.save_figure(figure, options.output / "preactivation.png")
    console.print(f"Wrote {options.output / 'preactivation.csv'} and .png")


if __name__ == "__main__":
    main()
