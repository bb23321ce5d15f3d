"""Packages that a machine without a network lacks, brought along as wheels."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path


def install(wheels: Path, site: Path) -> None:
    """Unpack every wheel of a folder into another one, which then goes to PYTHONPATH.

    Raises:
        ValueError: the folder has no wheels, or pip can not install them; the message has what it said.
    """
    found = sorted(wheels.glob("*.whl")) if wheels.is_dir() else []
    if not found:
        raise ValueError(f"--wheels: {wheels} has no files *.whl")
    names = "\n".join(path.name for path in found)
    marker = site / "wheels.txt"
    if marker.is_file() and marker.read_text() == names:
        return
    shutil.rmtree(site, ignore_errors=True)
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", str(site)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, *map(str, found)], capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(f"--wheels: pip could not install those of {wheels}:\n{done.stderr.strip()[-1500:]}")
    marker.write_text(names)
