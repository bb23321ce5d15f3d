"""What a run does where its command line does not say otherwise."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.providers import BASELINE, BASELINE_CHANNELS_LAST, DEFAULT, Level, Mode


class Preset(NamedTuple):
    """Of one kind of machine."""

    batch: dict[tuple[Level, Mode], list[int]]
    part_batch: int
    """Of operators, layers and blocks."""
    models: list[str]
    parts_of: list[str]
    """The networks whose layers and blocks are taken."""
    rounds: int
    warmup: float
    """Seconds, at the most, for each provider."""
    turn: float
    """Seconds that a provider's turn lasts, at least, with a model; short calls are repeated."""
    part_turn: float
    ceilings: float
    """Seconds for each of the machine's ceilings."""
    size: int | None = None
    """Height and width of the images; None: those that the networks are made for."""
    providers: tuple[str, ...] = DEFAULT
    left_out_of_parts: tuple[str, ...] = ()
    """Providers that do not take part with operators, layers and blocks, which are many, unless they are named."""


ALL = [
    "resnet18", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "cifar_resnet20", "cifar_resnet110",
]  # fmt: skip
CIFAR_BATCH = [128]
"""As the paper trains them."""

CPU = Preset(
    {("model", "inference"): [1, 16], ("model", "train"): [8]}, 8, ["resnet50", "resnet18"], ["resnet18", "resnet50"],
    rounds=20, warmup=10.0, turn=0.25, part_turn=0.03, ceilings=0.5,
)  # fmt: skip
GPU = Preset(
    {("model", "inference"): [1, 128], ("model", "train"): [256]}, 128, ALL, ["resnet18", "resnet50"],
    rounds=20, warmup=5.0, turn=0.1, part_turn=0.02, ceilings=0.5, left_out_of_parts=("inductor_max_autotune",),
)  # fmt: skip
QUICK = Preset(
    {}, 2, ["resnet18", "cifar_resnet20"], ["resnet18"],
    rounds=2, warmup=0.1, turn=0.0, part_turn=0.0, ceilings=0.01, size=32,
    providers=(BASELINE, BASELINE_CHANNELS_LAST, "resfuse"),
)  # fmt: skip
QUICK_CASES = 2
"""Of each level in a trial: the first and the last."""


def choose(quick: bool, device_type: str) -> Preset:
    """The preset for a machine."""
    return QUICK if quick else GPU if device_type == "cuda" else CPU


def batches(preset: Preset, level: Level, mode: Mode, model: str) -> list[int]:
    """Batch sizes of a level, which for whole models depend on the model."""
    if level == "model" and model.startswith("cifar") and preset is not QUICK:
        return CIFAR_BATCH
    return preset.batch.get((level, mode), [preset.part_batch])


def providers(preset: Preset, level: Level) -> list[str]:
    """Who takes part at a level."""
    return [name for name in preset.providers if level == "model" or name not in preset.left_out_of_parts]
