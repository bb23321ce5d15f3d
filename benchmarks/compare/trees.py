"""Source trees to compare: this one as it is, and another commit in a worktree, with its libraries."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = ROOT / "build" / "compare"
NATIVE = ("csrc", "resfuse/_build.py", "setup.py")
"""What the libraries are made from, and how."""
BUILT = ("resfuse/*.so", "resfuse/_build_info.json")


class TreeError(RuntimeError):
    """There is no such commit, or it can not be built."""


class Tree(NamedTuple):
    """A folder that has a `resfuse` to import."""

    path: Path
    label: str
    """A short commit, with a plus where files were changed."""


@contextlib.contextmanager
def checked_out(base: str, say: Callable[[str], None], *, cuda: bool) -> Iterator[Tree]:
    """The tree of a commit, in a temporary worktree that is removed whatever happens; or a folder, which is left alone.

    Args:
        base: what git calls a commit, or a folder with another checkout.
        say: told what takes long.
        cuda: whether the CUDA library is wanted too.

    Raises:
        TreeError: there is neither, or building failed.
    """
    if Path(base, "resfuse", "__init__.py").is_file():
        folder = Path(base).resolve()
        provide_libraries(folder, say, cuda=cuda)
        yield Tree(folder, folder.name)
        return
    expected = f"BASE: expected a commit or a folder with a checkout, got {base!r}"
    commit = _git("rev-parse", "--verify", "--short", f"{base}^{{commit}}", what=expected)
    scratch = Path(tempfile.mkdtemp(prefix="resfuse-compare-"))
    folder = scratch / commit
    try:
        _git("worktree", "add", "--detach", str(folder), commit, what=f"no worktree of {commit}")
        provide_libraries(folder, say, cuda=cuda)
        yield Tree(folder, commit)
    finally:
        with contextlib.suppress(TreeError):  # it may not have come into being
            _git("worktree", "remove", "--force", str(folder), what="")
        shutil.rmtree(scratch, ignore_errors=True)


def provide_libraries(folder: Path, say: Callable[[str], None], *, cuda: bool) -> None:
    """Give a tree what this one has been built: the same files where the sources are the same, else a build in place.

    Raises:
        TreeError: the build failed.
    """
    ours = _built(ROOT)
    if not ours or _built(folder):
        return  # compared as Python alone, as this tree is; or built by whoever made the folder
    digest = native_digest(folder)
    if digest == native_digest(ROOT):
        _copy(ours, ROOT, folder)
        return
    store = CACHE / f"{digest}{'-cuda' if cuda else ''}"
    if not store.is_dir():
        say("The C++ and CUDA sources differ: building BASE (minutes; the next time it is there)")
        _build(folder, cuda=cuda)
        with tempfile.TemporaryDirectory(dir=_made(CACHE)) as scratch:
            _copy(_built(folder), folder, Path(scratch, "built"))
            with contextlib.suppress(OSError):  # another process may have been first
                Path(scratch, "built").rename(store)
        return
    _copy(_built(store), store, folder)


def native_digest(folder: Path) -> str:
    """Of everything that a library depends on: the same for trees whose libraries are the same."""
    digest = hashlib.sha256(f"{torch.__version__} {sys.version_info[:2]}".encode())
    for name in NATIVE:
        start = folder / name
        for path in sorted(start.rglob("*")) if start.is_dir() else [start]:
            if path.is_file():
                digest.update(f"\0{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def stale_reason(folder: Path) -> str | None:
    """Why the libraries of a tree may be older than its sources, or None."""
    libraries = [path for path in _built(folder) if path.suffix == ".so"]
    sources = [path for path in (folder / "csrc").rglob("*") if path.is_file()]
    if not libraries or not sources:
        return None
    newest, oldest = max(sources, key=_modified), min(libraries, key=_modified)
    if _modified(newest) <= _modified(oldest):
        return None
    return f"{oldest.name} is older than {newest.relative_to(folder)}: is it built?"


def _build(folder: Path, *, cuda: bool) -> None:
    environment = os.environ | ({} if cuda else {"RESFUSE_SKIP_CUDA_BUILD": "1", "FORCE_CUDA": "0"})
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != 0 or not _built(folder):
        raise TreeError(f"BASE can not be built: {' '.join(command)}\n{(done.stdout + done.stderr)[-4000:]}")


def _built(folder: Path) -> list[Path]:
    found = [path for pattern in BUILT for path in sorted(folder.glob(pattern))]
    return found if any(path.suffix == ".so" for path in found) else []


def _copy(files: list[Path], source: Path, target: Path) -> None:
    for path in files:
        destination = target / path.relative_to(source)
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, destination)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def _git(*arguments: str, what: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError as error:
        raise TreeError(f"{what}: git does not run ({error})") from error
    if done.returncode != 0:
        raise TreeError(f"{what}: {done.stderr.strip()}")
    return done.stdout.strip()
