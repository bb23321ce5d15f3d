"""Train a small ResNet and time ResNet-50, eager and fused, on real images; about a minute on two cores."""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import resfuse
from resfuse.backends import dispatch as registry
from resfuse.types import Problem
from resfuse.cli import digits, models, report, resnet50, timing
from resfuse.processor import processor_name

VERBS = ("conv_bn_act_forward", "bn_act_forward", "bn_act_backward", "conv_backward", "add_relu_forward")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("out"), help="directory for the plot and CSV (default out)")
    parser.add_argument("--threads", type=int, help="threads on the CPU (default: all or one, whichever is faster)")
    parser.add_argument(
        "--quick", action="store_true", help="fewer epochs and rounds, smaller images; times mean little"
    )


def run(args: argparse.Namespace) -> int:
    console = Console(highlight=False)
    missing = models.missing_packages()
    if importlib.util.find_spec("matplotlib") is None:
        missing.append("matplotlib")
    if missing:
        console.print(f"The demo needs {', '.join(missing)}: pip install 'resfuse[demo]'", markup=False, soft_wrap=True)
        return 1
    if args.threads is not None and args.threads < 1:
        console.print(f"--threads: expected at least 1, got {args.threads}")
        return 1
    _run(args.output, args.threads, args.quick, console)
    return 0


def _run(folder: Path, threads: int | None, quick: bool, console: Console) -> None:
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    device, reason = _choose_device()
    conditions = _conditions(device)
    _show_conditions(conditions, device, reason, console)
    trainings, training_threads = _train(device, threads, quick, console)
    timings, inference_threads = _infer(device, threads, quick, console)
    used = {report.DIGITS: training_threads, resnet50.NAME: inference_threads}
    report.write_csv(folder / "demo.csv", trainings, timings, used, conditions)
    report.write_plot(folder / "demo.png", trainings, timings, used, conditions)
    console.print(f"Wrote {folder / 'demo.png'} and {folder / 'demo.csv'} in {time.perf_counter() - started:.0f} s.")
    console.print("Comparisons with torch.compile and other systems are in benchmarks/.")


def _train(
    device: torch.device, threads: int | None, quick: bool, console: Console
) -> tuple[list[digits.Training], int]:
    """Part 1; also says on how many threads it ran."""
    epochs, blocks = (3, 1) if quick else (8, 2)
    console.rule(f"[bold]1. Training[/]: ResNet-{6 * blocks + 2} on scikit-learn's handwritten digits", align="left")
    threads = threads or _choose_threads(digits.training_step(device, blocks), device, console)
    with timing.threads(threads):
        trainings = digits.train(device, epochs, blocks, console)
        console.print(_training_table(trainings))
    return trainings, threads


def _infer(device: torch.device, threads: int | None, quick: bool, console: Console) -> tuple[resnet50.Timings, int]:
    """Part 2; also says on how many threads it ran."""
    size, rounds = (64, {1: 3, 16: 2}) if quick else (224, {1: 30, 16: 7})
    console.rule(f"[bold]2. Inference[/]: torchvision's {resnet50.NAME}, random weights", align="left")
    pictures = models.photographs(4, size).to(device)
    model = models.calibrated(resnet50.NAME, pictures)
    threads = threads or _choose_threads(lambda: models.outputs({models.EAGER: model}, pictures), device, console)
    with timing.threads(threads):
        versions, fused = models.versions(model)
        console.print(fused)
        outputs, exact = models.outputs(versions, pictures), models.exact_output(model, pictures)
        console.print(resnet50.comparison_table(outputs, exact))
        timings = resnet50.measure(versions, device, size, rounds, console)
        console.print(resnet50.timing_table(timings, size))
    return timings, threads


def _choose_threads(step: Callable[[], object], device: torch.device, console: Console) -> int:
    """All threads of torch or one, whichever is faster for eager PyTorch, and says so."""
    if device.type != "cpu" or torch.get_num_threads() == 1:
        return torch.get_num_threads()
    times = timing.time_thread_counts(step)
    listed = ", ".join(f"{time.median * 1e3:.1f} ms on {count}" for count, time in times.items())
    best = next(iter(times))
    console.print(f"Threads: {best} (one step of eager: {listed}; --threads sets the number)")
    return best


def _choose_device() -> tuple[torch.device, str]:
    """The GPU where a backend other than `reference` runs convolutions there, else the CPU; and why."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), "torch sees no GPU"
    chosen, rejected = registry.explain_choice(_problem("conv_bn_act_forward", torch.device("cuda")))
    if chosen != "reference":
        return torch.device("cuda"), f"{chosen} runs convolutions there"
    reasons = "; ".join(reason for reasons in rejected.values() for reason in reasons)
    return torch.device("cpu"), f"there is a GPU, but no fused convolution for it yet: {reasons}"


def _problem(verb: str, device: torch.device) -> Problem:
    """A 3x3 convolution of ResNet-50's first stage, as an example of what a verb works on."""
    conv = (torch.Size((64, 64, 3, 3)), (1, 1), (1, 1), (1, 1), 1) if "conv" in verb else None
    return Problem(verb, device, torch.float32, torch.Size((16, 64, 56, 56)), conv)


def _conditions(device: torch.device) -> dict[str, object]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {
        "device": f"{device.type} ({name})",
        "torch": torch.__version__,
        "resfuse": resfuse.__version__,
    }


def _show_conditions(conditions: dict[str, object], device: torch.device, reason: str, console: Console) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in conditions.items():
        table.add_row(name, escape(f"{value}; {reason}" if name == "device" else str(value)))
    verbs_by_choice: dict[str, list[str]] = {}
    for verb in VERBS:
        chosen, rejected = registry.explain_choice(_problem(verb, device), registry.requested_backend())
        why = "".join(f"; not {name}: {'; '.join(reasons)}" for name, reasons in rejected.items())
        verbs_by_choice.setdefault(f"{chosen} backend{why}", []).append(verb)
    for choice, verbs in verbs_by_choice.items():
        table.add_row("operations", escape(", ".join(verbs)))
        table.add_row("  run on", escape(choice))
    console.rule("[bold]What runs where[/]", align="left")
    console.print(table)


def _training_table(trainings: Sequence[digits.Training]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("version", style="cyan", no_wrap=True)
    for heading in ("test\naccuracy", "same class\nas eager", "training\ntime", "images/s", "against\neager"):
        table.add_column(heading, justify="right")
    expected = trainings[0].predictions()
    for training in trainings:
        same = int((training.predictions() == expected).sum())
        table.add_row(
            training.name,
            f"{training.accuracy():.1%}",
            f"{same} of {len(expected)}",
            f"{training.seconds:.1f} s",
            f"{training.images_per_second:.0f}",
            f"{trainings[0].seconds / training.seconds:.2f}x",
        )
    return table
