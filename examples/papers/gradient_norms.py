"""Gradient norms through depth, before and after training: do they vanish? (arXiv:1512.03385, section 4.1)

python -m examples.papers.gradient_norms
python -m examples.papers.gradient_norms --cifar10 FOLDER --width 16 --epochs 20 --depths 20 56 110 --device cuda
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from examples.papers import experiment, training
from examples.papers.experiment import Value
from examples.papers.training import Run, train_all


def gradient_norms(model: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """The Euclidean norm of the loss's gradient by each 3x3 convolution's weight, from the first layer to the last."""
    weights = [
        module.weight for module in model.modules() if isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1
    ]
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model.train()(images), labels).backward()
    norms = [weight.grad.norm().item() for weight in weights if weight.grad is not None]
    model.zero_grad(set_to_none=True)
    return norms


def main(arguments: Sequence[str] | None = None) -> None:
    options = experiment.parser(__doc__ or "", epochs=3, seeds=1, depths=(20, 56, 110)).parse_args(arguments)
    console, images = Console(), experiment.load(options)
    runs = experiment.plain_and_residual(options, images)
    batch = training.sample(images, 256)
    values: list[Value] = []

    def measure(run: Run, model: nn.Module, quantity: str) -> None:
        for i, norm in enumerate(gradient_norms(model, *batch)):
            values.append(Value(run.network, run.seed, i + 1, quantity, norm))

    for run in runs:
        measure(run, run.make(images.train_images.device), "initial_gradient_norm")
    train_all(runs, images, options.epochs, options.learning_rate, console)
    experiment.show_results(runs, console)
    for run in runs:
        assert run.model is not None
        measure(run, run.model, "trained_gradient_norm")
    values += experiment.curves(runs)
    facts = experiment.conditions(options, images)
    experiment.write_csv(options.output / "gradient_norms.csv", values, facts)
    figure, axes = experiment.new_figure(2, facts)
    for panel, when in zip(axes, ("initial", "trained"), strict=True):
        for j, kind in enumerate(experiment.KINDS):
            for i, depth in enumerate(options.depths):
                name = f"{kind}-{depth}"
                style = {"color": experiment.COLORS[j], "linestyle": ("-", "--", ":")[i % 3], "label": name}
                experiment.plot_mean(panel, values, name, f"{when}_gradient_norm", **style)
        title = "before training" if when == "initial" else f"after {options.epochs} epochs"
        panel.set(title=title, xlabel="layer", ylabel="norm of the weight's gradient", yscale="log")
        panel.legend(frameon=False, fontsize=8)
    experiment.save_figure(figure, options.output / "gradient_norms.png")
    console.print(f"Wrote {options.output / 'gradient_norms.csv'} and .png")


if __name__ == "__main__":
    main()
