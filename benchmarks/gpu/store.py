"""What one call leaves for the next, and for whoever reads it: few files, since few may come back from such a machine.

The folder OUT has `state.json` (what is done), `summary.txt` and `files.tar.gz` (everything that the pieces wrote).
They are renewed while pieces run, so that a machine that disappears takes no more than a minute's work along.  The
pieces themselves work in another folder, which is filled from OUT where it is not there.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STATE, SUMMARY, ARCHIVE = "state.json", "summary.txt", "files.tar.gz"
EVERY = 45.0
"""Seconds between two archives while a piece runs."""
LARGEST = 4 << 20
"""Bytes of a file of which no more than its end goes into the archive; only logs are larger."""


class Store:
    """OUT and the folder in which the pieces work."""

    def __init__(self, output: Path, work: Path) -> None:
        """Go on with what is in OUT, if anything is.

        Raises:
            ValueError: OUT holds something else, or was written by another version of this program.
            OSError: a folder can not be written to.
        """
        self.output, self.work = output.resolve(), work.resolve()
        self.output.mkdir(parents=True, exist_ok=True)
        self.state = self._read()
        self._packed: float = 0.0
        marker = self.work / "run"
        if not (marker.is_file() and marker.read_text() == self.state["run"]):
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir(parents=True)
            archive = self.output / ARCHIVE
            if self.state["pieces"] and not archive.is_file():
                raise ValueError(f"{archive} is missing, though {STATE} beside it says that pieces are done")
            if archive.is_file():
                with tarfile.open(archive) as packed:
                    packed.extractall(self.work, filter="data")
            marker.write_text(self.state["run"])

    @property
    def pieces(self) -> dict[str, dict[str, Any]]:
        """What is known of each piece, by its name; `save` writes what is changed."""
        found: dict[str, dict[str, Any]] = self.state["pieces"]
        return found

    def save(self, summary: str = "") -> None:
        """Write the state, the summary and the archive."""
        _write(self.output / STATE, json.dumps(self.state, indent=1) + "\n")
        if summary:
            _write(self.output / SUMMARY, summary + "\n")
        self._pack()

    def beat(self) -> None:
        """Renew the archive from time to time."""
        if time.monotonic() - self._packed > EVERY:
            self._pack()

    def _read(self) -> dict[str, Any]:
        path = self.output / STATE
        if not path.exists():
            return {"version": 1, "run": uuid.uuid4().hex, "pieces": {}}
        try:
            state: dict[str, Any] = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}): take another folder, or remove it") from error
        if state.get("version") != 1:
            raise ValueError(f"{path} is of another version of this program: take another folder, or remove it")
        return state

    def _pack(self) -> None:
        partial = self.output / f"{ARCHIVE}.tmp"
        with tarfile.open(partial, "w:gz", compresslevel=6) as packed:
            for path in sorted(_files(self.work)):
                _add(packed, path, path.relative_to(self.work))
        os.replace(partial, self.output / ARCHIVE)
        self._packed = time.monotonic()


def _files(folder: Path) -> Iterator[Path]:
    skipped = folder / "scratch"  # what is of use on this machine only
    yield from (path for path in folder.rglob("*") if path.is_file() and skipped not in path.parents)


def _add(packed: tarfile.TarFile, path: Path, name: Path) -> None:
    """A file, which may grow while it is read: as many bytes as are announced."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST and path.suffix == ".log":
            file.seek(size - LARGEST)
            size = LARGEST
        entry = tarfile.TarInfo(str(name))
        entry.size, entry.mtime = size, int(path.stat().st_mtime)
        packed.addfile(entry, file)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_text(text)
    partial.replace(path)
