"""Writes the demo's figures: a CSV with one value per line, and a plot."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from resfuse.cli import models, resnet50
from resfuse.cli.digits import BATCH, Training
from resfuse.cli.resnet50 import Timings

DIGITS = "digits"
COLORS = {models.EAGER: "#9aa0a6", models.EAGER_CHANNELS_LAST: "#5b8db8", models.FUSED: "#d9622b"}


def write_csv(
    path: Path,
    trainings: Sequence[Training],
    timings: Timings,
    threads: Mapping[str, int],
    conditions: Mapping[str, object],
) -> None:
    """One line per value: what was measured, on which version, on how many threads, and under which conditions."""
    rows: list[tuple[str, str, int, str, float]] = []
    for training in trainings:
        rows.append((DIGITS, training.name, BATCH, "test_accuracy", training.accuracy()))
        rows.append((DIGITS, training.name, BATCH, "training_seconds", training.seconds))
        rows.append((DIGITS, training.name, BATCH, "training_images_per_second", training.images_per_second))
    for batch, group in timings.items():
        for name, timing in group.items():
            rows.append((resnet50.NAME, name, batch, "inference_median_seconds", timing.median))
            rows.append((resnet50.NAME, name, batch, "inference_p20_seconds", timing.quantile(0.2)))
            rows.append((resnet50.NAME, name, batch, "inference_p80_seconds", timing.quantile(0.8)))
            rows.append((resnet50.NAME, name, batch, "inference_images_per_second", batch / timing.median))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("experiment", "version", "batch", "quantity", "value", "threads", *conditions))
        writer.writerows((*row[:4], f"{row[4]:.6g}", threads[row[0]], *conditions.values()) for row in rows)


def write_plot(
    path: Path,
    trainings: Sequence[Training],
    timings: Timings,
    threads: Mapping[str, int],
    conditions: Mapping[str, object],
) -> None:
    """Left the loss against training time, right the images per second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for training in trainings:
        times = [training.seconds * (index + 1) / len(training.losses) for index in range(len(training.losses))]
        left.plot(times, training.losses, label=training.name, color=COLORS[training.name], marker="o", markersize=3)
    left.set(
        title="Digits: a small ResNet, trained", xlabel="training time in seconds", ylabel="mean loss of the epoch"
    )
    left.set_yscale("log")
    left.set_xlim(left=0)
    for index, (batch, group) in enumerate(timings.items()):
        base = group[models.EAGER].median
        for offset, (name, timing) in enumerate(group.items()):
            bar = right.bar(index + (offset - 1) * 0.27, base / timing.median, 0.25, color=COLORS[name])
            right.bar_label(bar, [f"{base / timing.median:.2f}x\n{batch / timing.median:.1f}/s"], fontsize=8, padding=2)
    right.set_xticks(range(len(timings)), [f"batch {batch}" for batch in timings])
    right.set(title=f"{resnet50.NAME}: inference speed", ylabel="speed against eager")
    right.margins(y=0.2)
    figure.legend(loc="outside lower center", ncols=len(trainings), frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    used = ", ".join(f"threads for {experiment} {count}" for experiment, count in threads.items())
    listed = ", ".join(f"{name} {value}" for name, value in conditions.items())
    figure.suptitle(f"{listed}, {used}", fontsize=8, color="#666666")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
