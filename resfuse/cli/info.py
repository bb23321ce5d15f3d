"""`resfuse info`: versions, devices, backends, build settings, and why something is missing, for bug reports."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import textwrap
from collections.abc import Mapping
from typing import Any

import torch

import resfuse
from resfuse import _build, _extension
from resfuse.backends import dispatch, first_contact, measured
from resfuse.roofline import processor_name

PACKAGES = ("torchvision", "timm", "triton", "numpy")
VARIABLES = (
    "FORCE_CUDA", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "TORCH_CUDA_ARCH_LIST", "OMP_NUM_THREADS", "KMP_AFFINITY",
    "LD_PRELOAD", "MKL_NUM_THREADS", "TRITON_INTERPRET",
)  # fmt: skip
PREFIXES = ("RESFUSE_", "ONEDNN_", "DNNL_")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, to paste into a bug report")


def run(args: argparse.Namespace) -> int:
    facts = collect()
    print(json.dumps(facts, indent=2) if args.json else _text(facts))
    return 0


def collect() -> dict[str, Any]:
    """Everything a bug report needs, as JSON values; what is missing has a reason or is None."""
    return {
        "versions": _versions(),
        "machine": _machine(),
        "gpus": _gpus(),
        "backends": {name: reason or "available" for name, reason in dispatch.unavailable_reasons().items()},
        "exceptions": [_exception(entry) for entry in dispatch.RANKING],
        "tables": measured.listed(),
        "first contact": first_contact.stored(),
        "libraries": {name: _extension.load(name) or "loaded" for name in _build.LIBRARIES},
        "build": _extension.build_info(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name in VARIABLES or name.startswith(PREFIXES)
        },
    }  # fmt: skip


def _text(facts: dict[str, Any], width: int = 80) -> str:
    build = {name: value for name, value in facts["build"].items() if name != "skipped"}
    build |= {f"{name} skipped": reason for name, reason in facts["build"].get("skipped", {}).items()}
    sections: dict[str, Mapping[str, object]] = {
        "versions": {name: version or "not installed" for name, version in facts["versions"].items()},
        "machine": facts["machine"],
        "GPUs": {f"cuda:{index}": gpu for index, gpu in enumerate(facts["gpus"])}
        or {"none": "torch.cuda sees no device"},
        "backends, by preference": facts["backends"],
        "exceptions to that order": {str(number): text for number, text in enumerate(facts["exceptions"], 1)},
        "tables of measured times": {str(number): text for number, text in enumerate(facts["tables"], 1)}
        or {"none": "the order above, with its exceptions, is predicted"},
        "first contact with GPUs": facts["first contact"] or {"none": "no kernels have been checked on a GPU"},
        "compiled libraries": facts["libraries"],
        "build settings": build or {"none": "this copy was never built"},
        "environment variables": facts["environment"] or {"none": "none that resfuse reads"},
    }
    lines: list[str] = []
    for title, rows in sections.items():
        lines += ["", title] if lines else [title]
        for name, value in rows.items():
            first = f"  {name:<20}"
            lines += textwrap.wrap("unknown" if value is None else str(value), width, initial_indent=first,
                                   subsequent_indent=" " * len(first), break_on_hyphens=False)  # fmt: skip
    return "\n".join(lines)


def _exception(entry: dispatch.Ranking) -> str:
    majors = ", ".join(f"{major}.x" for major in entry.majors)
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in entry.dtypes)
    kernels = f"{' and '.join(entry.kernels)} on compute capability {majors} in {dtypes}"
    return f"{entry.preferred} before {entry.passed_over} for {kernels}: {entry}"


def _versions() -> dict[str, str | None]:
    onednn = re.search(r"(?:MKL-DNN|oneDNN) v([\d.]+)", torch.__config__.show())
    return {
        "resfuse": resfuse.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch CUDA": torch.version.cuda,
        "oneDNN": onednn[1] if onednn else None,
        **{name: _installed_version(name) for name in PACKAGES},
    }


def _installed_version(name: str) -> str | None:
    """A distribution's version, read without importing it; None if it is not installed."""
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
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        gpus.append(f"{properties.name}, compute {properties.major}.{properties.minor}, {memory:.0f} GiB")
    return gpus
