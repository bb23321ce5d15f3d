"""Names, figures and conditions as tables, plots and pages write them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from benchmarks.records import Conditions, Record
from benchmarks.roofs import Ceilings
from benchmarks.speeds import is_ours

LABELS = {
    "eager_nchw": "eager NCHW",
    "eager_channels_last": "eager channels_last",
    "inductor": "torch.compile",
    "cudnn": "cuDNN",
    "cudnn_aten": "cuDNN by ATen",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "tensorrt": "TensorRT",
}
UNITS = ((1e3, "ms"), (1e6, "us"))
"""Of times; the first in which the median of the times has a digit before the point."""


def label(provider: str) -> str:
    """As prose has it: torch.compile max autotune."""
    if provider in LABELS:
        return LABELS[provider]
    family, _, rest = provider.partition("_")
    return f"{LABELS.get(family, family)} {rest.replace('_', ' ')}".strip()


def ordered(providers: Iterable[str]) -> list[str]:
    """Eager first, resfuse last, each once."""
    names = list(dict.fromkeys(providers))
    return sorted(names, key=lambda name: (not name.startswith("eager"), is_ours(name), names.index(name)))


def number_text(value: float) -> str:
    """Three digits, or all those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratio_text(value: float | None) -> str:
    """1.57x; a dash where it is unknown."""
    return "-" if value is None else f"{value:.2f}x"


def time_unit(seconds: Iterable[float]) -> tuple[float, str]:
    """A factor and a unit in which times of that size are easily read."""
    ascending = sorted(seconds)
    median = ascending[len(ascending) // 2]
    return next((unit for unit in UNITS if median * unit[0] >= 1), UNITS[-1])


def ceilings_text(found: Ceilings) -> str:
    """4300 GB/s; bfloat16 790 TFLOP/s; empty where nothing was measured."""
    rates = [f"{dtype} {number_text(rate / 1e12)} TFLOP/s" for dtype, rate in found.rates.items()]
    return "; ".join([f"{number_text(found.bandwidth / 1e9)} GB/s", *rates] if found.bandwidth else rates)


def threads_text(count: int) -> str:
    """2 threads."""
    return f"{count} thread{'s' * (count > 1)}"


def conditions_text(rows: Iterable[Record]) -> str:
    """Machines, versions, commits and days of the rows; what several runs have in common is told once."""
    machines: dict[tuple[str, int], list[Conditions]] = {}
    for row in rows:
        machines.setdefault((row.conditions.device, row.conditions.threads), []).append(row.conditions)
    parts = []
    for (device, threads), runs in machines.items():
        machine = f"{device}, {threads_text(threads)}"
        parts.append(f"{machine}; {_versions(runs)}; commit {_commits(runs)}, {_days(runs)}")
    return ". ".join(parts)


def _versions(runs: Sequence[Conditions]) -> str:
    # "torch 2.11.0, resfuse 0.1.0 (cpu, reference)": a comma separates where a name and a number follow.
    return ", ".join(dict.fromkeys(part for run in runs for part in re.split(r", (?=\S+ v?\d)", run.versions)))


def _commits(runs: Sequence[Conditions]) -> str:
    return ", ".join(dict.fromkeys(run.commit or "unknown" for run in runs))


def _days(runs: Sequence[Conditions]) -> str:
    days = sorted({run.date.partition("T")[0] for run in runs})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
