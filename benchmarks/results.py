"""The one tidy CSV layout of all benchmarks: a row per quantity.  README.md explains the columns."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import resfuse
from benchmarks.case import Case, Setting, dtype_name
from benchmarks.worker import ROOT
from resfuse.roofline import processor_name

RESULTS = ROOT / "benchmarks" / "results"
CASE = ["op", "name", "mode", "dtype", "shape"]
RUN = ["device", "threads", "versions", "commit", "date"]
COLUMNS = [
    *CASE, "provider", "x", "metric", "unit", "p20", "p50", "p80", "samples", "bytes", "flops", "roofline", *RUN,
]  # fmt: skip
CEILING = "ceiling"
"""The op of the rows with what the machine reached in a run."""


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 of at least one value, interpolated, and how many values there are."""
    found = pd.Series(values, dtype="float64").quantile([0.2, 0.5, 0.8])
    return {"p20": found[0.2], "p50": found[0.5], "p80": found[0.8], "samples": len(values)}


def row(case: Case, setting: Setting, provider: str, metric: str, unit: str, values: Sequence[float]) -> dict[str, Any]:
    """A quantity of a provider in a case; `x` is the batch."""
    return {
        "op": case.op, "name": case.name, "mode": setting.mode, "dtype": dtype_name(setting.dtype), "shape": case.shape,
        "provider": provider, "x": case.shapes[0][0], "metric": metric, "unit": unit, **quantiles(values),
    }  # fmt: skip


def conditions(device: str, threads: int, packages: Iterable[str] = ()) -> dict[str, Any]:
    """The columns that tell a run: machine, versions, commit and the time of its beginning."""
    versions = {
        "torch": torch.__version__, "resfuse": f"{resfuse.__version__} ({', '.join(resfuse.available_backends())})",
    }  # fmt: skip
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.setdefault(name, importlib.metadata.version(name))
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else processor_name()
    return {
        "device": name, "threads": threads, "versions": ", ".join(f"{key} {value}" for key, value in versions.items()),
        "commit": commit(), "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def commit() -> str:
    """The short commit, with a plus where files differ from it; BENCH_COMMIT names it where there is no git."""
    if "BENCH_COMMIT" in os.environ:
        return os.environ["BENCH_COMMIT"]
    git = ("git", "-C", str(ROOT))
    changed = (*git, "status", "--porcelain", "--", ".", ":!benchmarks/results")
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run(changed, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + "+" * bool(status.stdout)


def read(*paths: Path) -> pd.DataFrame:
    """The rows of files; those that do not exist are empty.

    Raises:
        ValueError: a file lacks columns.
    """
    frames = []
    for path in paths:
        if not path.exists():
            continue
        frame = pd.read_csv(
            path, keep_default_na=False, na_values={name: [""] for name in ("bytes", "flops", "roofline")}
        )
        if missing := [name for name in COLUMNS if name not in frame]:
            raise ValueError(f"{path} lacks the columns {', '.join(missing)}")
        frames.append(frame[COLUMNS])
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=COLUMNS)


def update(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows into a file in place of those of the same cases, so that a case's rows come from one run.

    Ceilings stay as long as a row of their run does.  The file is replaced at once: a stopped run leaves it whole.
    """
    new, old = pd.DataFrame(rows).reindex(columns=COLUMNS), read(path)
    key = [*CASE, "device", "threads"]
    replaced = pd.MultiIndex.from_frame(old[key]).isin(pd.MultiIndex.from_frame(new[key]))
    kept = old[~replaced | (old["op"] == CEILING)]
    frame = pd.concat([kept, new], ignore_index=True) if len(kept) else new
    measured = set(frame.loc[frame["op"] != CEILING, "date"])
    frame = frame[(frame["op"] != CEILING) | frame["date"].isin(measured)].drop_duplicates(
        [*key, "provider", "metric", "date"]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    frame.to_csv(partial, index=False, float_format="%.6g", lineterminator="\n")
    os.replace(partial, path)
