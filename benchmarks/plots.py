"""Plots of the results: speed ratios of models, the roofline of ops, and memory over the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import pandas as pd
from matplotlib import pyplot as plt

from benchmarks.report import BASELINES, OURS, VIEW, is_ours, label, ordered
from benchmarks.results import CEILING

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), told apart with any colour vision.
COLORS = {
    "eager_nchw": "#c9c9c9", "eager_channels_last": "#7d7d7d",
    "inductor": "#0072b2", "inductor_freezing": "#9fd3f2", "inductor_reduce_overhead": "#56b4e9",
    "inductor_max_autotune": "#004b75", "cudnn_aten": "#cc79a7", "cudnn_graph": "#8f4a70",
    "onnxruntime": "#009e73", "openvino": "#f0e442", "tensorrt": "#000000",
    "resfuse": "#d55e00", "resfuse_cuda": "#e69f00", "resfuse_triton": "#f3c06b",
}  # fmt: skip
OTHER = "#b48ccb"


def draw(rows: pd.DataFrame, folder: Path) -> list[str]:
    """Write every plot for which there are results; the names of the files."""
    names = []
    models = rows[rows["op"] == "models"]
    for mode in models["mode"].unique():
        names += _save(speed_ratios(models[models["mode"] == mode]), folder / f"model-{mode}.png")
    for op in ("conv_bn_act", "bn_act", "add_relu"):
        names += _save(roofline(rows, op), folder / f"{op}-roofline.png")
    for metric, what in (("saved_bytes", "memory"), ("peak_memory", "memory-peak"), ("time", "latency")):
        names += _save(over_batch(rows, metric), folder / f"{what}.png")
    return names


def speed_ratios(rows: pd.DataFrame) -> plt.Figure | None:
    """Bars per case: speed relative to eager, with lines from p20 to p80."""
    timed = rows[rows["metric"] == "time"]
    cases = list(timed.groupby(VIEW, sort=False))
    if not cases:
        return None
    providers = ordered(timed["provider"])
    figure, axis = plt.subplots(figsize=(max(7.0, 1.2 + 0.3 * len(providers) * len(cases)), 3.6))
    width = 0.8 / len(providers)
    for index, provider in enumerate(providers):
        at, height, below, above = [], [], [], []
        for place, (_, case) in enumerate(cases):
            by_name = case.set_index("provider")
            base = next((name for name in BASELINES if name in by_name.index), None)
            if base is None or provider not in by_name.index:
                continue
            eager, mine = by_name.loc[base, "p50"], by_name.loc[provider]
            at.append(place + (index - (len(providers) - 1) / 2) * width)
            height.append(eager / mine["p50"])
            below.append(height[-1] - eager / mine["p80"])
            above.append(eager / mine["p20"] - height[-1])
        axis.bar(at, height, width * 0.92, label=label(provider), color=COLORS.get(provider, OTHER))
        axis.errorbar(at, height, [below, above], fmt="none", ecolor="#444444", elinewidth=0.8)
    axis.axhline(1.0, color="#444444", linewidth=0.6)
    axis.set_xticks(range(len(cases)), [_title(key) for key, _ in cases], fontsize=8)
    axis.set_ylabel("speed relative to eager")
    axis.set_title(
        f"{', '.join(timed['mode'].unique())}; {', '.join(timed['device'].unique())}; lines: p20 to p80", fontsize=9
    )
    axis.set_ylim(top=1.25 * axis.get_ylim()[1])  # room for the legend
    axis.legend(fontsize=7, ncols=4, loc="upper left")
    return figure


def roofline(rows: pd.DataFrame, op: str) -> plt.Figure | None:
    """FLOP/s against FLOPs per byte, below the ceilings of the same run."""
    timed = rows[(rows["op"] == op) & (rows["metric"].isin(["time", "graph_time"])) & rows["flops"].notna()]
    if timed.empty:
        return None
    timed = timed.drop_duplicates([*VIEW, "provider"], keep="last")
    figure, axis = plt.subplots(figsize=(7.0, 4.2))
    for provider in ordered(timed["provider"]):
        mine = timed[timed["provider"] == provider]
        if provider in BASELINES or is_ours(provider):
            size, marker = (28, "o") if provider == OURS else (14, "x")
            at, rate = mine["flops"] / mine["bytes"], mine["flops"] / mine["p50"]
            axis.scatter(at, rate, size, COLORS.get(provider, OTHER), marker=marker, label=label(provider))
    for (_, dtype), run in timed.groupby(["date", "dtype"]):
        reached = rows[(rows["op"] == CEILING) & rows["date"].isin(run["date"])]
        bandwidth = reached[reached["metric"] == "bandwidth"]["p50"].max()
        rate = reached[(reached["metric"] == "rate") & (reached["dtype"] == dtype)]["p50"].max()
        intensity = run["flops"] / run["bytes"]
        ends = [intensity.min() / 2, rate / bandwidth, max(intensity.max() * 2, 2 * rate / bandwidth)]
        axis.plot(
            ends, [min(rate, bandwidth * end) for end in ends], color="#444444", linewidth=0.8, label=f"{dtype} roof"
        )
    axis.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="FLOP/s")
    axis.set_title(f"{op}; {', '.join(timed['device'].unique())}", fontsize=9)
    axis.legend(fontsize=7)
    return figure


def over_batch(rows: pd.DataFrame, metric: str) -> plt.Figure | None:
    """A quantity of models over the batch, where at least three batches were measured."""
    mine = rows[rows["op"].isin(["models", "memory"]) & (rows["metric"] == metric)]
    groups = [
        (key, case)
        for key, case in mine.groupby(["name", "mode", "dtype", "device"], sort=False)
        if case["x"].nunique() > 2
    ]
    if not groups:
        return None
    columns = min(4, len(groups))
    lines = -(-len(groups) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.2 * columns, 2.6 * lines), squeeze=False)
    scale, unit = (1e3, "ms") if metric == "time" else (1e-9, "GB")
    for axis, (key, case) in zip(axes.flat, groups, strict=False):
        for provider in ordered(case["provider"]):
            line = case[case["provider"] == provider].sort_values("x")
            axis.plot(
                line["x"],
                line["p50"] * scale,
                ".-",
                color=COLORS.get(provider, OTHER),
                label=label(provider),
                linewidth=1,
            )
        axis.set_title(", ".join(key[:3]), fontsize=8)
        axis.set_xlabel("batch", fontsize=7)
        axis.set_ylabel(unit, fontsize=7)
        axis.tick_params(labelsize=7)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    axes.flat[0].legend(fontsize=6)
    return figure


def _title(key: Any) -> str:
    case = dict(zip(VIEW, key, strict=True))
    return f"{case['name']}\n{case['dtype']}, batch {case['x']}"


def _save(figure: plt.Figure | None, path: Path) -> list[str]:
    if figure is None:
        return []
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return [path.name]
