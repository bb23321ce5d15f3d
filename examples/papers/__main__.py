"""The experiments of the ResNet papers, on scikit-learn's digits in minutes, or on CIFAR-10.

    python -m examples.papers degradation          # or shortcuts, layer_responses, gradient_norms, preactivation
    python -m examples.papers degradation --cifar10 FOLDER --width 16 --epochs 160 --device cuda
    python -m examples.papers preactivation --cifar10 FOLDER --width 16 --epochs 160 --depths 110 1202 --device cuda

Each writes its figures to out/NAME.csv and out/NAME.png.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.papers.experiment import Build, Experiment, Panel, parser
from resfuse.models import cifar_plain, cifar_preact_resnet, cifar_resnet


def plain_and_residual(depth: int) -> dict[str, Build]:
    return {
        f"plain-{depth}": lambda **sizes: cifar_plain(depth, **sizes),
        f"resnet-{depth}": lambda **sizes: cifar_resnet(depth, **sizes),
    }


def shortcut_options(depth: int) -> dict[str, Build]:
    networks: dict[str, Build] = {f"plain-{depth}": lambda **sizes: cifar_plain(depth, **sizes)}
    for option in "ABC":
        networks[f"resnet-{depth} {option}"] = lambda o=option, **sizes: cifar_resnet(depth, shortcut=o, **sizes)
    return networks


def pre_and_post_activation(depth: int) -> dict[str, Build]:
    """Basic blocks on both sides and the same shortcuts, so that only the place of BN and ReLU differs."""
    return {
        f"post-activation {depth}": lambda **sizes: cifar_resnet(depth, shortcut="A", **sizes),
        f"pre-activation {depth}": lambda **sizes: cifar_preact_resnet(depth, "basic", shortcut="A", **sizes),
    }


@torch.no_grad()
def responses(model: nn.Module, images: Tensor, labels: Tensor | None = None) -> list[float]:
    """The standard deviation of every 3x3 layer's output after batch norm, from the first layer to the last.

    That is before the addition and the ReLU.  A fused layer never writes it; a forward hook on the batch norm makes the
    layer run its parts one by one, and shows it.
    """
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


def sorted_responses(model: nn.Module, images: Tensor, labels: Tensor | None = None) -> list[float]:
    return sorted(responses(model, images), reverse=True)


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


LOSS, ERROR = Panel("training loss", "train_loss"), Panel("test error", "test_error", yscale="linear")
EXPERIMENTS = {
    "degradation": Experiment(
        "Plain networks train worse when they are deeper, residual ones do not (arXiv:1512.03385, figure 6).",
        plain_and_residual,
        [LOSS._replace(title=f"{kind} networks", only=kind, ylabel="training loss") for kind in ("plain", "resnet")],
        epochs=15, seeds=2, depths=(20, 56),
    ),
    "shortcuts": Experiment(
        "Options A, B and C: does it matter what happens where the shape changes? (arXiv:1512.03385, table 3)",
        shortcut_options, [LOSS, ERROR._replace(top=0.3)], epochs=12, seeds=3, depths=(20,),
    ),
    "layer_responses": Experiment(
        "How much does each 3x3 layer's output vary, residual against plain? (arXiv:1512.03385, figure 7)",
        plain_and_residual,
        [
            Panel("layer responses by layer", "response_std", xlabel="layer", ylabel="standard deviation"),
            Panel("sorted by size", "sorted_response_std", xlabel="layer", ylabel="standard deviation"),
        ],
        epochs=8, seeds=1, depths=(20, 56), after={"response_std": responses, "sorted_response_std": sorted_responses},
    ),
    "gradient_norms": Experiment(
        "Gradient norms through depth, before and after training: do they vanish? (arXiv:1512.03385, section 4.1)",
        plain_and_residual,
        [
            Panel(f"{when} training", f"{name}_gradient_norm", xlabel="layer", ylabel="norm of the weight's gradient")
            for when, name in (("before", "initial"), ("after", "trained"))
        ],
        epochs=3, seeds=1, depths=(20, 56, 110),
        before={"initial_gradient_norm": gradient_norms}, after={"trained_gradient_norm": gradient_norms},
    ),
    "preactivation": Experiment(
        "Pre- against post-activation: does a clean identity path train better? (arXiv:1603.05027, figure 6)",
        pre_and_post_activation, [LOSS, ERROR],
        epochs=6, seeds=1, depths=(110, 164), width=4,  # minutes rather than a quarter of an hour
    ),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__ or "", EXPERIMENTS).parse_args(arguments)
    EXPERIMENTS[options.experiment].run(options)


if __name__ == "__main__":
    main()
