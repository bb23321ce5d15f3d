"""Layer responses: how much the output of each 3x3 layer varies, residual against plain (arXiv:1512.03385, figure 7).

    python -m examples.papers.layer_responses
    python -m examples.papers.layer_responses --cifar10 FOLDER --width 16 --epochs 160 --depths 20 56 110 --device cuda

The response is the output of a layer's batch norm, before the addition and the ReLU.  A fused layer never writes it; a
forward hook on the batch norm makes the layer run its parts one by one, and shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from examples.papers import experiment, training
from examples.papers.experiment import Value
from examples.papers.training import train_all


@torch.no_grad()
def responses(model: nn.Module, images: Tensor) -> list[float]:
    """The standard deviation of every 3x3 layer's output after batch norm, from the first layer to the last."""
    found: list[float] = []
    norms = [
        norm for name, norm in model.named_modules() if isinstance(norm, nn.BatchNorm2d) and "downsample" not in name
    ]
    hooks = [
        norm.register_forward_hook(lambda _norm, _args, output: found.append(output.std().item())) for norm in norms
    ]
    model.eval()(images)
    for hook in hooks:
        hook.remove()
    assert len(found) == len(norms)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = experiment.parser(__doc__ or "", epochs=8, seeds=1, depths=(20, 56)).parse_args(arguments)
    console, images = Console(), experiment.load(options)
    runs = experiment.plain_and_residual(options, images)
    train_all(runs, images, options.epochs, options.learning_rate, console)
    experiment.show_results(runs, console)
    values = experiment.curves(runs)
    for run in runs:
        assert run.model is not None
        measured = responses(run.model, training.sample(images, 512)[0])
        values += [Value(run.network, run.seed, i + 1, "response_std", std) for i, std in enumerate(measured)]
        ordered = sorted(measured, reverse=True)
        values += [Value(run.network, run.seed, i + 1, "sorted_response_std", std) for i, std in enumerate(ordered)]
    facts = experiment.conditions(options, images)
    experiment.write_csv(options.output / "layer_responses.csv", values, facts)
    plot(values, options.depths, facts, options.output / "layer_responses.png")
    console.print(f"Wrote {options.output / 'layer_responses.csv'} and .png")


def plot(values: Sequence[Value], depths: Sequence[int], facts: dict[str, object], path: Path) -> None:
    """The responses: left by layer, right sorted by size."""
    figure, axes = experiment.new_figure(2, facts, sharey=True)
    for panel, quantity, title in zip(
        axes, ("response_std", "sorted_response_std"), ("by layer", "sorted by size"), strict=True
    ):
        for j, kind in enumerate(experiment.KINDS):
            for i, depth in enumerate(depths):
                name = f"{kind}-{depth}"
                style = {"color": experiment.COLORS[j], "linestyle": ("-", "--", ":")[i % 3], "label": name}
                experiment.plot_mean(panel, values, name, quantity, **style)
        panel.set(title=f"layer responses {title}", xlabel="layer", yscale="log")
        panel.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("standard deviation")
    experiment.save_figure(figure, path)


if __name__ == "__main__":
    main()
