"""Rows such as the benchmarks write, made up: times follow from a few numbers, so that every ratio is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from benchmarks.records import CEILINGS, Conditions, Record, Roofline, Subject

GPU = Conditions("NVIDIA H200", 16, "torch 2.11.0+cu130, resfuse 0.1.0 (cuda, triton, reference)", "abc", "2026-11-22")
CPU = Conditions("a processor", 2, "torch 2.11.0, resfuse 0.1.0 (cpu, reference)", "abc", "2026-11-21")
BANDWIDTH, RATE = 4e12, 800e12
SPEEDS = {
    "eager_nchw": 0.5, "eager_channels_last": 1.0, "inductor": 1.4, "inductor_reduce_overhead": 1.5,
    "inductor_max_autotune": 1.6, "cudnn_fused": 1.3, "cudnn_graph": 1.8, "tensorrt": 2.5, "resfuse_triton": 1.7,
    "resfuse_cuda": 1.9, "resfuse": 2.0,
}  # fmt: skip
"""Against eager in channels_last."""


CPU_SPEEDS = {"eager_nchw": 0.8, "eager_channels_last": 1.0, "inductor": 1.5, "onnxruntime": 2.0, "resfuse": 1.6}


def row(
    provider: str, seconds: float, *, metric: str = "time", unit: str = "s", level: str = "model",
    name: str = "resnet50", mode: str = "inference", shape: str = "16x3x224x224", dtype: str = "float32",
    conditions: Conditions = CPU, cost: Roofline | None = None,
) -> Record:  # fmt: skip
    """One quantity, without spread."""
    subject = Subject(level, name, provider, mode, shape, dtype, "nchw" if "nchw" in provider else "channels_last")
    return subject.record(metric, [seconds], unit, conditions, cost)


def case(speeds: Mapping[str, float], seconds: float, **subject: object) -> list[Record]:
    """The times of providers that take `seconds` divided by their speed."""
    return [row(provider, seconds / speed, **subject) for provider, speed in speeds.items()]  # type: ignore[arg-type]


def ceilings(conditions: Conditions = GPU, dtype: str = "bfloat16") -> list[Record]:
    """What the machine reached in that run."""
    kwargs = {"level": CEILINGS, "mode": "", "shape": "", "conditions": conditions}
    return [
        row("device", BANDWIDTH, metric="bandwidth", unit="B/s", name="copy", **kwargs),  # type: ignore[arg-type]
        row("device", RATE, metric="rate", unit="FLOP/s", name="matmul", dtype=dtype, **kwargs),  # type: ignore[arg-type]
    ]


def layers(count: int = 12) -> list[Record]:
    """Layers on a GPU, of rising intensity; on every third resfuse is only 0.8 times as fast as its best peer."""
    rows = ceilings()
    for index in range(count):
        flops, size = int(1e9 * 1.7**index), int(2e7 * 1.2**index)
        cost = Roofline(size, flops, max(flops / RATE, size / BANDWIDTH))
        speeds = SPEEDS | {"resfuse": 2.0 if index % 3 == 0 else 3.0}
        rows += case(
            speeds, 4 * cost.seconds, level="layer", name=f"resnet50 layer{index}", shape="128x64x56x56",
            dtype="bfloat16", conditions=GPU, cost=cost,
        )  # fmt: skip
    return rows


def sweep() -> list[Record]:
    """Inference and training of a model on a GPU over batches, with memory."""
    rows = ceilings()
    for batch in (1, 8, 32, 128, 256):
        for mode in ("inference", "train"):
            subject = {"mode": mode, "shape": f"{batch}x3x224x224", "dtype": "bfloat16", "conditions": GPU}
            rows += case(SPEEDS, 2e-4 + 5e-5 * batch * (1 if mode == "inference" else 3), **subject)
            if mode == "train":
                for provider, part in {"eager_channels_last": 1.0, "inductor": 0.8, "resfuse": 0.75}.items():
                    peak = (0.5 + 0.09 * batch) * part * 2**30
                    rows.append(row(provider, peak, metric="peak_memory", unit="B", **subject))  # type: ignore[arg-type]
                    rows.append(row(provider, peak * 0.95, metric="predicted_peak", unit="B", **subject))  # type: ignore[arg-type]
    return rows


def graphs(rows: list[Record], faster: float) -> list[Record]:
    """The same rows as CUDA graphs."""

    def times(row: Record) -> dict[str, float]:
        return {name: value / faster for name, value in row.quantiles._asdict().items()}

    return [dataclasses.replace(row, metric="graph_time", **times(row)) for row in rows]
