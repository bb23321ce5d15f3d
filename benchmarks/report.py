"""Tables, plots, report.md and the README's table, from the CSV files of the benchmarks."""

from __future__ import annotations

import argparse
import math
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.results import CASE, CEILING, RESULTS, ROOT, read

OURS = "resfuse"
BASELINES = ("eager_channels_last", "eager_nchw")
"""The base of ratios against eager: the first of them that took part."""
LABELS = {
    "eager_nchw": "eager NCHW",
    "eager_channels_last": "eager channels_last",
    "inductor": "torch.compile",
    "cudnn": "cuDNN",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "tensorrt": "TensorRT",
}
FAMILIES = (*LABELS, OURS)
"""Columns of the README's table: of a family that ran in several ways the fastest counts."""
WORDS = {"inference": "inference", "train": "training step"}
README_MODEL, README_SHAPE = "resnet50", r"(\d+)x3x224x224"
BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"
VIEW = [*CASE, "x", "device", "threads"]


def label(provider: str) -> str:
    """A provider's name in prose: torch.compile max autotune."""
    if provider in LABELS:
        return LABELS[provider]
    family, _, rest = provider.partition("_")
    return f"{LABELS.get(family, family)} {rest.replace('_', ' ')}".strip()


def is_ours(provider: str) -> bool:
    """True for resfuse in any layout, with any backend, compiled or not."""
    return provider.partition("_")[0] == OURS


def ordered(providers: Iterable[str]) -> list[str]:
    """Eager first, resfuse last, each once."""
    names = list(dict.fromkeys(providers))
    return sorted(names, key=lambda name: (not name.startswith("eager"), is_ours(name), names.index(name)))


def times(rows: pd.DataFrame, graphs: bool = False) -> pd.DataFrame:
    """Median seconds per call: a row per case, a column per provider.

    With `graphs`, the cases that were replayed from CUDA graphs; a provider that was not captured has the time of its
    calls, because it captures graphs itself or cannot be captured.
    """

    def pivot(metric: str) -> pd.DataFrame:
        frame = rows[rows["metric"] == metric].sort_values("date", kind="stable")
        return frame.pivot_table(index=VIEW, columns="provider", values="p50", aggfunc="last", sort=False)

    found = pivot("time")
    if graphs:
        replayed = pivot("graph_time")
        found = replayed.combine_first(found.loc[found.index.isin(replayed.index)])
    return found[ordered(name for name in rows["provider"] if name in found)]


def ratios(table: pd.DataFrame) -> pd.DataFrame:
    """Speed of resfuse relative to eager and to the fastest peer, of rows of `times`; more than 1 is faster."""
    eager = pd.Series(math.nan, index=table.index)
    for name in BASELINES:
        if name in table:
            eager = eager.fillna(table[name])
    peers = table[[name for name in table if not is_ours(name)]]
    ours = table.get(OURS, math.nan)
    return pd.DataFrame({"vs eager": eager / ours, "vs fastest peer": peers.min(axis=1) / ours})


def geometric_means(speeds: pd.DataFrame) -> list[str]:
    """The geometric mean of each column of ratios, in words."""
    return [ratio(math.exp(value)) for value in speeds.map(math.log).mean()]


def case_text(rows: Sequence[dict[str, Any]]) -> str:
    """One case's providers for a terminal: p50, spread, speed against eager, peak memory, error."""
    frame = pd.DataFrame(rows)
    timed = frame[frame["metric"].isin(["time", "graph_time"])] if len(frame) else frame
    if timed.empty:
        return "  no provider has a speed"
    base = next((name for name in BASELINES if name in set(timed["provider"])), None)
    lines = {}
    for (provider, metric), row in timed.set_index(["provider", "metric"])[["p20", "p50", "p80"]].iterrows():
        eager = timed[(timed["provider"] == base) & (timed["metric"] == metric)]["p50"].min()
        errors = frame[(frame["provider"] == provider) & frame["metric"].str.startswith("error_")]["p50"]
        peak = frame[(frame["provider"] == provider) & (frame["metric"] == "peak_memory")]["p50"].min()
        spread = (row["p80"] - row["p20"]) / row["p50"]
        lines[f"{provider}, {metric}"] = {
            "ms": row["p50"] * 1e3, "spread": spread, "vs eager": eager / row["p50"], "peak MB": peak / 1e6,
            "error": errors.max(),
        }  # fmt: skip
    return textwrap.indent(pd.DataFrame(lines).T.to_string(float_format="%.3g", na_rep="-"), "  ")


def markdown(frame: pd.DataFrame) -> str:
    """A Markdown table; the index is text, the columns are numbers or texts."""
    cells = [["", *map(str, frame.columns)], ["---", *["--:"] * len(frame.columns)]]
    cells += [[str(index), *map(str, row)] for index, row in zip(frame.index, frame.to_numpy(), strict=True)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def number(value: float, factor: float = 1.0, digits: int = 3) -> str:
    """Three digits, or all those before the point; a dash for NaN."""
    value *= factor
    return "-" if value != value else f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def ratio(value: float) -> str:
    """1.57x; a dash for NaN."""
    return "-" if value != value else f"{value:.2f}x"


def conditions(rows: pd.DataFrame) -> str:
    """Machine, versions, commits and days of rows of one machine."""
    first = rows.iloc[0]
    # "torch 2.11.0, resfuse 0.1.0 (cpu, reference)": a comma separates where a name and a number follow.
    versions = dict.fromkeys(part for text in rows["versions"].unique() for part in re.split(r", (?=\S+ v?\d)", text))
    days = sorted({date.partition("T")[0] for date in rows["date"]})
    return (
        f"{first['device']}, {_threads(first['threads'])}; {', '.join(versions)}; "
        f"commit {', '.join(rows['commit'].unique())}, {' to '.join(dict.fromkeys([days[0], days[-1]]))}"
    )


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def readme_table(rows: pd.DataFrame) -> str:
    """ResNet-50 on each machine: milliseconds by family, with the conditions below.

    Raises:
        ValueError: there are no results of ResNet-50.
    """
    wanted = rows[(rows["op"] == "models") & (rows["name"] == README_MODEL) & rows["shape"].str.fullmatch(README_SHAPE)]
    wanted = wanted[wanted["metric"].isin(["time", "graph_time"])]
    if wanted.empty:
        raise ValueError(f"no results of {README_MODEL} at 224x224")
    machines = wanted.groupby(["device", "threads"], sort=False)
    found = [(not device.startswith("NVIDIA"), _machine(device, one)) for (device, _), one in machines]
    return "\n\n".join(text for _, text in sorted(found, key=lambda pair: pair[0]))


def _machine(device: str, rows: pd.DataFrame) -> str:
    tables = [_by_family(times(rows, graphs)).assign(graphs=graphs).reset_index() for graphs in (False, True)]
    table = pd.concat(tables).assign(narrow=lambda frame: frame["dtype"] != "float32")
    table = table.sort_values(["mode", "x", "narrow", "graphs"], kind="stable").dropna(axis=1, how="all")
    milliseconds = table[[family for family in FAMILIES if family in table]] * 1e3
    speeds = ratios(milliseconds)
    text = milliseconds.map(lambda value: number(value, digits=3 if value < 20 else 2))
    text.columns = [f"**{OURS}**" if family == OURS else label(family) for family in text]
    text["vs fastest peer"] = speeds["vs fastest peer"].map(ratio)
    text.index = [
        f"{WORDS[case.mode]}, {case.dtype}, batch {case.x}{', CUDA graphs' * case.graphs}"
        for case in table.itertuples()
    ]
    said = [
        f"{words} {_range(mine['vs eager'])} eager channels_last's, "
        f"{_range(mine['vs fastest peer'])} the fastest peer's"
        for mode, words in WORDS.items()
        if len(mine := speeds[table["mode"] == mode])
    ]
    spread = ((rows["p80"] - rows["p20"]) / rows["p50"]).max()
    below = (
        f"Speed of resfuse: {'; '.join(said)}. Conditions: {conditions(rows)}. "
        f"p80 and p20 are at most {spread:.0%} of the median apart."
    )
    title = f"ResNet-50 at 224x224, {device}, median milliseconds per step:"
    return "\n\n".join([title, markdown(text), "\n".join(textwrap.wrap(below, 120))])


def _by_family(table: pd.DataFrame) -> pd.DataFrame:
    """The fastest of each family; of eager and of resfuse, which chooses itself, the very one."""
    alone = (OURS, *BASELINES)
    return pd.DataFrame({
        family: table[[name for name in table if name == family or (
            family not in alone and name.startswith(f"{family}_"))]].min(axis=1)
        for family in FAMILIES
    })  # fmt: skip


def _range(values: pd.Series) -> str:
    return " to ".join(dict.fromkeys([ratio(values.min()), ratio(values.max())]))


def replace(text: str, block: str) -> str:
    """The README with the block between its markers replaced.

    Raises:
        ValueError: it has not exactly one marker of each kind, in their order.
    """
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or END not in rest:
        raise ValueError(f"expected one line {BEGIN} and, below it, one line {END}")
    return f"{head}{BEGIN}\n{block}\n{END}{tail}"


def page(rows: pd.DataFrame, plots: Sequence[str]) -> str:
    """report.md: machines and their ceilings, tables by op, and the plots."""
    parts = ["# What the benchmarks say", "## Machines"]
    for _, mine in rows.groupby(["device", "threads"], sort=False):
        measured = mine[mine["op"] != CEILING]
        parts.append(f"{conditions(measured if len(measured) else mine)}.")
        reached = mine[mine["op"] == CEILING].groupby(["metric", "dtype"], sort=False)["p50"].max()
        if len(reached):
            texts = [
                f"{number(value, 1e-9 if dtype == '' else 1e-12)} {f'TFLOP/s {dtype}' if dtype else 'GB/s copied'}"
                for (_, dtype), value in reached.items()
            ]
            parts.append(f"Ceilings, the best of all runs: {', '.join(texts)}.")
    groups = ["op", "mode", "dtype", "device", "threads"]
    for graphs in (False, True):
        table = times(rows, graphs)
        for (op, mode, dtype, device, threads), part in table.groupby(groups, sort=False):
            shown = part.dropna(axis=1, how="all")
            where = f"{device}, {_threads(threads)}{', CUDA graphs' * graphs}"
            parts.append(f"## {op}, {mode}, {dtype}, {where}: milliseconds")
            speeds = ratios(shown)
            reached = _fraction(rows, shown.index, "graph_time" if graphs else "time")
            text = shown.map(lambda value: number(value, 1e3)).rename(columns=label)
            text = text.assign(**speeds.map(ratio), roofline=reached)
            text.index = [f"{key[VIEW.index('name')]} {key[VIEW.index('shape')]}" for key in shown.index]
            parts.append(markdown(text))
            eager, peer = geometric_means(speeds)
            parts.append(f"Geometric mean: {eager} eager's speed, {peer} the fastest peer's.")
    parts += _other_tables(rows)
    parts += [f"![{name}]({name})" for name in plots]
    return "\n\n".join(parts) + "\n"


def _fraction(rows: pd.DataFrame, index: pd.Index, metric: str) -> list[str]:
    mine = rows[(rows["provider"] == OURS) & (rows["metric"] == metric)].drop_duplicates(VIEW, keep="last")
    found = mine.set_index(VIEW)["roofline"].reindex(index)
    return [f"{value:.0%}" if value == value else "-" for value in found]


def _other_tables(rows: pd.DataFrame) -> list[str]:
    """Host time, and memory kept by a training step."""
    parts = []
    for title, metric, factor, op in (
        ("Host time per call, one thread: us", "host_time", 1e6, "overhead"),
        ("Bytes kept for backward: MB", "saved_bytes", 1e-6, "memory"),
    ):
        mine = rows[(rows["op"] == op) & (rows["metric"] == metric)]
        if mine.empty:
            continue
        table = mine.pivot_table(index=["name", "mode", "dtype", "x"], columns="provider", values="p50", sort=False)
        table = table[ordered(table.columns)]
        text = table.map(lambda value, factor=factor: number(value, factor)).rename(columns=label)
        base = next((name for name in BASELINES if name in table), None)
        if base and OURS in table:
            text["resfuse / eager"] = [number(value) for value in table[OURS] / table[base]]
        text.index = [", ".join(map(str, key)) for key in text.index]
        parts += [f"## {title}", markdown(text)]
    return parts


def main(argv: Sequence[str] | None = None) -> int:
    """Write plots and report.md beside the CSV files, and the README's table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS, help="of CSV files (default %(default)s)")
    parser.add_argument("--readme", type=Path, help="default: the README, where the folder is the default one")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if the README's table would change")
    parser.add_argument("--no-plots", action="store_true", help="tables only, where matplotlib is not installed")
    args = parser.parse_args(argv)
    readme = args.readme or (ROOT / "README.md" if args.folder == RESULTS else None)
    rows = read(*sorted(args.folder.glob("*.csv")))
    if rows.empty:
        print(f"{args.folder} has no results", file=sys.stderr)
        return 1
    if not args.check:
        names: list[str] = []
        if not args.no_plots:
            from benchmarks import plots

            names = plots.draw(rows, args.folder)
        (args.folder / "report.md").write_text(page(rows, names))
        print(f"Wrote {args.folder / 'report.md'}")
    if readme is None:
        return 0
    try:
        before = readme.read_text()
        after = replace(before, readme_table(rows))
    except ValueError as error:
        print(f"{readme} stays as it is: {error}", file=sys.stderr)
        return 1
    if args.check:
        return int(before != after)
    readme.write_text(after)
    print(f"Wrote the table of {readme}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
