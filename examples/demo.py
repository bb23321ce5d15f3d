"""Train a small ResNet and run ResNet-50, eager and fused, on real images: about a minute on two cores.

    python examples/demo.py            # also writes out/demo.png and out/demo.csv

Needs torchvision, scikit-learn and matplotlib: `pip install 'resfuse[demo]'`.
"""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor, nn

import resfuse
from resfuse import contract
from resfuse.backends import dispatch
from resfuse.roofline import processor_name
from resfuse.types import Convolution, Problem

EAGER, CHANNELS_LAST, FUSED = "eager", "eager, channels_last", "fused"
COLORS = {EAGER: "#9aa0a6", CHANNELS_LAST: "#5b8db8", FUSED: "#d9622b"}
KERNELS = ("conv_bn_act_forward", "bn_act_forward", "bn_act_backward", "conv_backward", "add_relu_forward")
PACKAGES = {"torchvision": "torchvision", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}
MODEL = "resnet50"
BATCH = 64
"""Images in a training step."""
THREADS = torch.get_num_threads()
BUDGET = 20.0
"""Seconds per batch size after which no further round of timing begins."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder for the plot and CSV (default out)")
    parser.add_argument("--threads", type=int, help="threads on the CPU (default: all or one, whichever is faster)")
    parser.add_argument("--quick", action="store_true", help="fewer epochs and rounds, smaller images; no benchmark")
    options = parser.parse_args(argv)
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        parser.error(f"the demo needs {', '.join(missing)}: pip install 'resfuse[demo]'")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads: expected at least 1, got {options.threads}")
    console, started = Console(highlight=False), time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        device, conditions = show_conditions(console)
        trainings, rows = train(device, options, console)
        timings, more_rows = infer(device, options, console)
    finally:
        torch.set_num_threads(THREADS)
    with (options.output / "demo.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("experiment", "version", "batch", "quantity", "value", "threads", *conditions))
        writer.writerows((*row, *conditions.values()) for row in rows + more_rows)
    threads = {"threads for the digits": rows[0][-1], f"threads for {MODEL}": more_rows[0][-1]}
    facts = ", ".join(f"{key} {value}" for key, value in (conditions | threads).items())
    plot(options.output / "demo.png", trainings, timings, facts)
    written = f"{options.output / 'demo.png'} and {options.output / 'demo.csv'}"
    console.print(f"Wrote {written} in {time.perf_counter() - started:.0f} s.")
    console.print("Comparisons with torch.compile and other systems are in benchmarks/.")
    return 0


def show_conditions(console: Console) -> tuple[torch.device, dict[str, str]]:
    """Print which backend runs each kernel, and why; return the device and what belongs to every figure."""
    on_gpu = torch.cuda.is_available() and {"cuda", "triton"}.intersection(resfuse.available_backends())
    device = torch.device("cuda" if on_gpu else "cpu")
    name = torch.cuda.get_device_name(device) if on_gpu else processor_name()
    conditions = {"device": f"{device.type} ({name})", "torch": torch.__version__, "resfuse": resfuse.__version__}
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    found = "a GPU, but no backend for it" if torch.cuda.is_available() else "no GPU"
    table.add_row("device", escape(conditions["device"] + ("" if on_gpu else f"; torch sees {found}")))
    table.add_row("torch", torch.__version__)
    table.add_row("resfuse", resfuse.__version__)
    by_choice: dict[str, list[str]] = {}
    for kernel in KERNELS:  # for a 3x3 convolution of ResNet-50's first stage
        problem = Problem(kernel, device, torch.float32, torch.Size((16, 64, 56, 56)))
        if "conv" in kernel:
            weight_shape, convolution = torch.Size((64, 64, 3, 3)), Convolution((1, 1), (1, 1), (1, 1), 1)
            problem = problem._replace(weight_shape=weight_shape, convolution=convolution)
        chosen, rejected = dispatch.explain_choice(problem, dispatch.requested_backend())
        why = "".join(f"; not {other}: {'; '.join(reasons)}" for other, reasons in rejected.items())
        by_choice.setdefault(f"{chosen} backend{why}", []).append(kernel)
    for choice, kernels in by_choice.items():
        table.add_row("operations", escape(", ".join(kernels)))
        table.add_row("  run on", escape(choice))
    console.rule("[bold]What runs where[/]", align="left")
    console.print(table)
    return device, conditions


# What both parts share


def versions(model: nn.Module, console: Console) -> dict[str, nn.Module]:
    """The model as it is, and copies of it with channels_last weights and fused."""
    channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    fused = copy.deepcopy(channels_last)
    console.print(resfuse.fuse_(fused))
    return {EAGER: model, CHANNELS_LAST: channels_last, FUSED: fused}


def layout_for(version: str, images: Tensor) -> Tensor:
    """The images in the memory format that suits a version: channels_last for all but plain eager."""
    return images if version == EAGER else images.contiguous(memory_format=torch.channels_last)


def interleave(calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call, which take turns, so that a disturbance hits all of them; the first round is a warm-up.

    At least three rounds are timed, and none begins after `BUDGET`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    begun = time.perf_counter()
    for turn in range(rounds + 1):
        if turn > 3 and time.perf_counter() - begun > BUDGET:
            break
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            synchronize(device)
            seconds[name] += [time.perf_counter() - started] * (turn > 0)
    return seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def set_threads(requested: int | None, step: Callable[[], object], device: torch.device, console: Console) -> int:
    """Let torch use the requested threads; by default all or one, whichever runs a step of eager faster.

    Threads wait for each other at the end of every operation: with small layers, or on a busy machine, one thread can
    be many times as fast as two.
    """
    if requested is not None or device.type != "cpu":
        torch.set_num_threads(requested or THREADS)
        return requested or THREADS
    times = {}
    for count in sorted({1, THREADS}, reverse=True):
        torch.set_num_threads(count)
        times[count] = statistics.median(interleave({"": step}, 5, device)[""])
    fastest = sorted(times, key=times.__getitem__)
    listed = ", ".join(f"{times[count] * 1e3:.1f} ms on {count}" for count in fastest)
    console.print(f"Threads: {fastest[0]} (one step of eager: {listed}; --threads sets the number)")
    torch.set_num_threads(fastest[0])
    return fastest[0]


def table_of(*columns: str, **options: Any) -> Table:
    """An empty table of numbers, but for the column "version"."""
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", caption_justify="left", **options)
    for heading in columns:
        if heading == "version":
            table.add_column(heading, style="cyan", no_wrap=True)
        else:
            table.add_column(heading, justify="right")
    return table


# 1. Training


def load_digits(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(training images, their classes, test images, their classes): scikit-learn's 1797 digits, a quarter for the test.

    Enlarged from 8x8 to 16x16 pixels, so that three stages have something to shrink; images are (N, 1, 16, 16).
    """
    from sklearn import datasets

    data = datasets.load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1)
    images = F.interpolate(images, size=16, mode="bilinear", align_corners=False)
    images = ((images - images.mean()) / images.std()).to(device)
    labels = torch.from_numpy(data.target).long().to(device)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(device)
    test, train = order[: len(order) // 4], order[len(order) // 4 :]
    return images[train], labels[train], images[test], labels[test]


def network(blocks: int) -> nn.Sequential:
    """A CIFAR ResNet of 6 blocks + 2 layers (He et al. 2016, section 4.2) made of torchvision's blocks."""
    from torchvision.models.resnet import BasicBlock

    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    channels = 16
    for width in (16, 32, 64):
        for _ in range(blocks):
            shortcut = None
            if channels != width:
                shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride=2, bias=False), nn.BatchNorm2d(width))
            layers.append(BasicBlock(channels, width, stride=1 if shortcut is None else 2, downsample=shortcut))
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class Training:
    """The training of one version of the network."""

    def __init__(self, name: str, model: nn.Module, total_steps: int) -> None:
        self.name, self.model = name, model.train()
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=0.2, total_steps=total_steps)
        self.seconds, self.images = 0.0, 0
        self.losses: list[float] = []
        """The mean loss of each epoch."""

    def step(self, images: Tensor, labels: Tensor) -> float:
        """The loss of a batch."""
        started = time.perf_counter()
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        synchronize(images.device)
        self.seconds += time.perf_counter() - started
        self.images += len(labels)
        return loss.item()


def train(device: torch.device, options: argparse.Namespace, console: Console) -> tuple[list[Training], list[Any]]:
    """Part 1: train the same network in all versions, from the same weights on the same batches, in turns."""
    epochs, blocks = (3, 1) if options.quick else (8, 2)
    console.rule(f"[bold]1. Training[/]: ResNet-{6 * blocks + 2} on scikit-learn's handwritten digits", align="left")
    trial, noise = network(blocks).to(device), torch.rand(BATCH, 1, 16, 16, device=device)
    threads = set_threads(options.threads, lambda: trial(noise).square().mean().backward(), device, console)
    images, labels, test_images, test_labels = load_digits(device)
    count = len(labels) // BATCH  # a smaller last batch is left out: its statistics would be unlike all others
    torch.manual_seed(0)
    models = versions(network(blocks).to(device), console)
    trainings = [Training(name, model, epochs * count) for name, model in models.items()]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("epoch {task.fields[epoch]:2d}  loss {task.fields[loss]:.4f}  {task.fields[speed]:5.0f} images/s"),
    )
    with Progress(*columns, console=console, expand=True) as progress:
        fields: dict[str, Any] = {"epoch": 0, "loss": math.nan, "speed": 0.0}
        tasks = [progress.add_task(training.name, total=epochs * count, **fields) for training in trainings]
        for epoch in range(epochs):
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch)).to(device)
            for task, training in zip(tasks, trainings, strict=True):
                total = 0.0
                for index, batch in enumerate(order[: count * BATCH].split(BATCH), 1):
                    total += training.step(images[batch], labels[batch])
                    speed = training.images / training.seconds
                    progress.update(task, advance=1, epoch=epoch + 1, loss=total / index, speed=speed)
                training.losses.append(total / count)
    table = table_of(
        "version", "test\naccuracy", "same class\nas eager", "training\ntime", "images/s", "against\neager"
    )
    rows: list[Any] = []
    with torch.no_grad():
        classes = [training.model.eval()(test_images).argmax(1) for training in trainings]
    for training, found in zip(trainings, classes, strict=True):
        accuracy = (found == test_labels).float().mean().item()
        same = f"{int((found == classes[0]).sum())} of {len(found)}"
        seconds, speed = training.seconds, training.images / training.seconds
        ratio = f"{trainings[0].seconds / seconds:.2f}x"
        table.add_row(training.name, f"{accuracy:.1%}", same, f"{seconds:.1f} s", f"{speed:.0f}", ratio)
        values = {"test_accuracy": accuracy, "training_seconds": seconds, "training_images_per_second": speed}
        rows += [("digits", training.name, BATCH, name, f"{value:.6g}", threads) for name, value in values.items()]
    console.print(table)
    return trainings, rows


# 2. Inference

Timings = dict[int, dict[str, list[float]]]
"""Seconds per forward pass, by batch size and version of the model."""


def photographs(count: int, size: int) -> Tensor:
    """Crops, (count, 3, size, size), normalised for ImageNet, of the two photographs in scikit-learn."""
    from sklearn.datasets import load_sample_images

    generator, crops = torch.Generator().manual_seed(0), []
    pictures = [torch.from_numpy(picture.copy()).float() / 255 for picture in load_sample_images().images]
    for index in range(count):
        picture = pictures[index % len(pictures)]
        top, left = (int(torch.randint(extent - size + 1, (), generator=generator)) for extent in picture.shape[:2])
        crops.append(picture[top : top + size, left : left + size].permute(2, 0, 1))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (torch.stack(crops) - mean) / std


@torch.no_grad()
def calibrated(images: Tensor) -> nn.Module:
    """The model with random weights, and batch norms with the statistics of the images and random affine parameters.

    The 0 and 1 of fresh batch norms would hide mistakes.
    """
    from torchvision.models import get_model

    torch.manual_seed(0)
    norm_layer = functools.partial(nn.BatchNorm2d, momentum=None)  # the mean over all batches seen, here one
    model = get_model(MODEL, weights=None, norm_layer=norm_layer).to(images.device)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    model.train()(images)
    return model.eval()


@torch.no_grad()
def infer(device: torch.device, options: argparse.Namespace, console: Console) -> tuple[Timings, list[Any]]:
    """Part 2: compare what all versions of the model compute, and time them at two batch sizes."""
    size, rounds = (64, {1: 3, 16: 2}) if options.quick else (224, {1: 30, 16: 7})
    console.rule(f"[bold]2. Inference[/]: torchvision's {MODEL}, random weights", align="left")
    images = photographs(4, size).to(device)
    model = calibrated(images)
    threads = set_threads(options.threads, lambda: model(images), device, console)
    models = versions(model, console)
    outputs = {name: version(layout_for(name, images)) for name, version in models.items()}
    console.print(comparison_table(outputs, copy.deepcopy(model).double()(images.double())))
    timings: Timings = {}
    with torch.inference_mode():
        for batch, count in rounds.items():
            inputs = photographs(batch, size).to(device)
            calls = {name: functools.partial(version, layout_for(name, inputs)) for name, version in models.items()}
            with console.status(f"timing, batch {batch}"):
                timings[batch] = interleave(calls, count, device)
    counts = ", ".join(f"{len(group[EAGER])} at batch {batch}" for batch, group in timings.items())
    table = table_of(
        "batch", "version", "ms", "p20-p80", "images/s", "against\neager", "against\nch._last",
        title=f"{MODEL}: inference at {size}x{size}, float32",
        caption=f"Medians; the versions took turns, rounds: {counts}.",
        padding=(0, 1, 0, 0), pad_edge=False,
    )  # fmt: skip
    rows: list[Any] = []
    for batch, group in timings.items():
        medians = {name: statistics.median(seconds) for name, seconds in group.items()}
        for name, seconds in group.items():
            median, speed = medians[name], batch / medians[name]
            low, *_, high = statistics.quantiles(seconds, n=5, method="inclusive")
            table.add_row(
                str(batch) if name == EAGER else "", name, f"{median * 1e3:.1f}", f"{low * 1e3:.0f}-{high * 1e3:.0f}",
                f"{speed:.1f}", *(f"{medians[base] / median:.2f}x" for base in (EAGER, CHANNELS_LAST)),
            )  # fmt: skip
            values = {"median_seconds": median, "p20_seconds": low, "p80_seconds": high, "images_per_second": speed}
            rows += [(MODEL, name, batch, f"inference_{key}", f"{value:.6g}", threads) for key, value in values.items()]
        table.add_section()
    console.print(table)
    return timings, rows


def comparison_table(outputs: Mapping[str, Tensor], exact: Tensor) -> Table:
    """The error of every version against float64, and its difference from eager."""
    table = table_of(
        "version", "error against\nfloat64", "largest diff.\nfrom eager", "relative to\nlargest out", "same\nclass",
        title=f"{MODEL}: outputs for {len(exact)} photographs",
    )  # fmt: skip
    eager = outputs[EAGER].double()
    for name, output in outputs.items():
        error, difference = contract.relative_error(output, exact), (output.double() - eager).abs().max().item()
        relative = difference / eager.abs().max().item()
        same = f"{int((output.argmax(1) == eager.argmax(1)).sum())} of {len(output)}"
        table.add_row(name, f"{error:.1e}", f"{difference:.1e}", f"{relative:.1e}", same)
    return table


def plot(path: Path, trainings: Sequence[Training], timings: Timings, conditions: str) -> None:
    """The loss against training time on the left, speeds against eager on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for training in trainings:
        times = [training.seconds * (i + 1) / len(training.losses) for i in range(len(training.losses))]
        left.plot(times, training.losses, label=training.name, color=COLORS[training.name], marker="o", markersize=3)
    left.set(
        title="Digits: a small ResNet, trained", xlabel="training time in seconds", ylabel="mean loss of the epoch"
    )
    left.set_yscale("log")
    left.set_xlim(left=0)
    for index, (batch, group) in enumerate(timings.items()):
        base = statistics.median(group[EAGER])
        for offset, (name, seconds) in enumerate(group.items()):
            median = statistics.median(seconds)
            bar = right.bar(index + (offset - 1) * 0.27, base / median, 0.25, color=COLORS[name])
            right.bar_label(bar, [f"{base / median:.2f}x\n{batch / median:.1f}/s"], fontsize=8, padding=2)
    right.set_xticks(range(len(timings)), [f"batch {batch}" for batch in timings])
    right.set(title=f"{MODEL}: inference speed", ylabel="speed against eager")
    right.margins(y=0.2)
    figure.legend(loc="outside lower center", ncols=len(trainings), frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(conditions, fontsize=8, color="#666666")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
