"""About how long a run takes, from what it would do; to be told before it begins, not to be relied upon."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from benchmarks import presets
from benchmarks.cases import make_cases
from benchmarks.providers import PROVIDERS, Setting
from benchmarks.providers.base import Level, Mode

# Seconds, roughly: on a CPU of few cores, and on a GPU of a server, where compilers try more.
PREPARING: dict[str, dict[Level, float]] = {
    "cpu": {"op": 2, "layer": 2, "block": 5, "model": 20},
    "cuda": {"op": 3, "layer": 3, "block": 8, "model": 40},
}
"""Until a provider is ready: export, compilation."""
CALLING: dict[str, dict[Level, float]] = {
    "cpu": {"op": 0.02, "layer": 0.02, "block": 0.1, "model": 1.0},
    "cuda": {"op": 0.001, "layer": 0.001, "block": 0.002, "model": 0.03},
}
"""Of a call."""
WARM = 5
"""Calls, until the time is stable."""


class Extent(NamedTuple):
    """How much a run does."""

    cases: int
    entries: int
    """Of each case: the providers that can run here, in each dtype."""
    minutes: float


def extent(
    level: Level,
    mode: Mode,
    device: torch.device,
    *,
    models: Sequence[str] = (),
    batches: Sequence[int] = (),
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    providers: Sequence[str] = (),
    quick: bool = False,
) -> Extent:
    """Of `python -m benchmarks.run` with these options; what is empty is what the machine's preset says.

    Raises:
        ValueError: a network or a provider that does not exist, or a batch below 1.
    """
    unknown = [name for name in providers if name not in PROVIDERS]
    if unknown:
        raise ValueError(f"provider: expected some of {', '.join(PROVIDERS)}, got {', '.join(unknown)}")
    preset = presets.choose(quick, device.type)
    names = list(models) or (preset.models if level == "model" else preset.parts_of)
    cases = 0
    for name in names if level == "model" else [""]:
        for batch in batches or presets.batches(preset, level, mode, name):
            cases += len(make_cases(level, [name] if name else names, batch, preset.size))
    if quick:
        cases = min(cases, presets.QUICK_CASES)
    settings = [Setting(mode, dtype, device, torch.get_num_threads(), level=level) for dtype in dtypes]
    able = [
        name
        for name in providers or presets.providers(preset, level)
        for setting in settings
        if PROVIDERS[name].unavailable_reason(setting) is None
    ]
    turn = max(preset.turn if level == "model" else preset.part_turn, CALLING[device.type][level])
    warming = min(preset.warmup, WARM * turn)
    each = PREPARING[device.type][level] * (0.1 if quick else 1.0) + warming + preset.rounds * turn
    return Extent(cases, len(able), cases * len(able) * each / 60)
