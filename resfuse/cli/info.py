"""Show what resfuse found on this machine: versions, devices, backends and why some are missing (for bug reports)."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import resfuse
from resfuse import _build, _extension
from resfuse.backends import dispatch as registry
from resfuse.processor import processor_name

PACKAGES = ("torchvision", "timm", "triton", "numpy")
VARIABLES = (
    "FORCE_CUDA", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "TORCH_CUDA_ARCH_LIST", "OMP_NUM_THREADS", "KMP_AFFINITY",
    "LD_PRELOAD", "MKL_NUM_THREADS", "TRITON_INTERPRET",
)  # fmt: skip
PREFIXES = ("RESFUSE_", "ONEDNN_", "DNNL_")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON, to paste into a bug report")


def run(args: argparse.Namespace) -> int:
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        show(facts, Console(highlight=False))
    return 0


def collect() -> dict[str, Any]:
    """Everything a bug report needs, as plain JSON values; what is missing has a reason or is None."""
    reasons = registry.unavailable_reasons()
    return {
        "versions": _versions(),
        "machine": _machine(),
        "gpus": _gpus(),
        "backends": {name: reason or "available" for name, reason in reasons.items()},
        "exceptions": [_condition(entry) for entry in ranking.TABLE],
        "libraries": {name: _extension.load(name) or "loaded" for name in _build.LIBRARIES},
        "build": _extension.build_info(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name in VARIABLES or name.startswith(PREFIXES)
        },
    }  # fmt: skip


def show(facts: dict[str, Any], console: Console) -> None:
    """Print what `collect` returned."""
    _print_section(console, "versions", facts["versions"], missing="not installed")
    _print_section(console, "machine", facts["machine"], missing="unknown")
    gpus = {f"cuda:{index}": gpu for index, gpu in enumerate(facts["gpus"])}
    _print_section(console, "GPUs", gpus or {"none": "torch.cuda sees no device"})
    _print_section(console, "backends, best first", facts["backends"], good="available")
    exceptions = {str(number): text for number, text in enumerate(facts["exceptions"], 1)}
    _print_section(console, "exceptions to that order", exceptions)
    _print_section(console, "compiled libraries", facts["libraries"], good="loaded")
    _print_section(console, "build settings", _flatten(facts["build"]) or {"none": "this copy was never built"})
    _print_section(console, "environment variables", facts["environment"] or {"none": "nothing that resfuse reads"})


def _print_section(
    console: Console, title: str, rows: dict[str, str | None], missing: str = "none", good: str | None = None
) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 2))
    table.add_column(min_width=18, no_wrap=True, style="cyan")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        text = escape(str(value)) if value is not None else f"[dim]{missing}[/]"
        if good is not None:
            text = f"[green]{text}[/]" if value == good else f"[yellow]{text}[/]"
        table.add_row(name, text)
    console.print(table)
    console.print()


def _condition(entry: ranking.Entry) -> str:
    majors = ", ".join(f"{major}.x" for major in entry.majors)
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in entry.dtypes)
    where = f"{' and '.join(entry.verbs)} on compute capability {majors} in {dtypes}"
    return f"{entry.preferred} before {entry.passed_over} for {where}: {entry}"


def _versions() -> dict[str, str | None]:
    installed = {name: package_version(name) for name in PACKAGES}
    onednn = re.search(r"MKL-DNN v([\d.]+)|oneDNN v([\d.]+)", torch.__config__.show())
    return {
        "resfuse": resfuse.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch CUDA": torch.version.cuda,
        "oneDNN": next(filter(None, onednn.groups())) if onednn else None,
        **installed,
    }


def package_version(name: str) -> str | None:
    """A distribution's version without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, str | None]:
    return {
        "platform": platform.platform(),
        "processor": processor_name(),
        "cores": f"{os.cpu_count()} ({_build.usable_cores()} usable by this process)",
        "torch threads": f"{torch.get_num_threads()} (inter-op {torch.get_num_interop_threads()})",
        "torch's kernels": torch.backends.cpu.get_cpu_capability(),
        "resfuse's kernels": _instruction_set(),
    }


def _instruction_set() -> str | None:
    from resfuse.backends import cpu

    return cpu.instruction_set() if cpu.unavailable_reason() is None else None


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        gpus.append(f"{properties.name}, compute {properties.major}.{properties.minor}, {memory:.0f} GiB")
    return gpus


def _flatten(build: dict[str, Any]) -> dict[str, str | None]:
    """Build settings with one row per library that was left out."""
    rows = {name: None if value is None else str(value) for name, value in build.items() if name != "skipped"}
    return rows | {f"{name} left out": reason for name, reason in build.get("skipped", {}).items()}
