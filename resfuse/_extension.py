"""Loads the compiled libraries. A missing one yields a reason, never an ImportError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from resfuse import _build

_HERE = Path(__file__).resolve().parent
_outcome: dict[str, str | None] = {}


def load(name: str) -> str | None:
    """Load one of `_build.LIBRARIES` once per process, which registers its operators with torch.

    Returns:
        None when the library is loaded, else the reason why it is not, as a sentence for the user.
    """
    if name not in _outcome:
        _outcome[name] = _load(name)
    return _outcome[name]


def mark_loaded(name: str) -> None:
    """Record that `resfuse.jit` has built this library and loaded it into the process."""
    _outcome[name] = None


def build_info() -> dict[str, Any]:
    """The settings this installation was built with; empty when it was never built (a bare checkout)."""
    try:
        info: dict[str, Any] = json.loads((_HERE / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}
    return info


def _load(name: str) -> str | None:
    # The record takes precedence over the file: a checkout may still contain a library of an earlier build.
    recorded = build_info().get("skipped", {}).get(name)
    if recorded:
        return f"not built: {recorded}"
    path = _HERE / f"{name}.abi3.so"
    if not path.is_file():
        return (
            f"not built: {path.name} is not beside resfuse; run `pip install --no-build-isolation -e .` in a checkout, "
            "or call resfuse.jit.load()"
        )
    if name != "_cpu" and torch.version.cuda is None:
        return f"built, but torch {torch.__version__} is a CPU-only build"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"built, but torch {torch.__version__} cannot load it: {error}"
    return None


def summary() -> str:
    """One line per library, for the end of a build."""
    return "\n".join(f"resfuse.{name}: {load(name) or 'loaded'}" for name in _build.LIBRARIES)


if __name__ == "__main__":
    print(summary())
