"""Build the extension libraries in place, for this machine's GPU only: `python -m benchmarks.gpu.build --keep DIR`.

A library that the same sources gave before, on a machine like this one, is taken from DIR; without a GPU one that is
there and loads is taken as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.options import summary

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "resfuse"
BUILT = ("_cpu.abi3.so", "_cuda.abi3.so", "_build_info.json")
KEY = "key.json"
SETUPTOOLS = 77
"""The first version that reads this project's pyproject.toml."""


def arch_list(capability: tuple[int, int]) -> str:
    """TORCH_CUDA_ARCH_LIST of one GPU: Hopper's own instructions where it is one."""
    major, minor = capability
    return "9.0a" if capability == (9, 0) else f"{major}.{minor}+PTX"


def key(arch: str, torch_version: str) -> dict[str, str]:
    """What decides about the libraries, for a comparison."""
    digest = hashlib.sha256()
    for path in sorted(_sources()):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return {"sources": digest.hexdigest(), "arch": arch, "torch": torch_version, "python": sys.implementation.name}


def objections(device: str, environment: Mapping[str, str]) -> list[str]:
    """Why nothing can be compiled here."""
    found = []
    if importlib.util.find_spec("setuptools") is None:
        found.append("setuptools is not installed, with which torch compiles extensions")
    else:
        from setuptools import __version__ as version

        if int(version.split(".")[0]) < SETUPTOOLS:
            found.append(f"setuptools {version} is too old, {SETUPTOOLS} is needed: bring a wheel of it (docs/gpu.md)")
    if device == "cuda":
        import torch

        from resfuse import _build

        settings = _build.decide(environment, torch=torch.__version__, torch_cuda=torch.version.cuda)
        found += [f"{name}: {reason}" for name, reason in settings.skipped.items()]
    if shutil.which("ninja", path=environment.get("PATH")) is None and importlib.util.find_spec("ninja") is None:
        print("ninja is not installed: one file is compiled at a time, for many minutes")
    return found


def restore(keep: Path, wanted: Mapping[str, str], package: Path = PACKAGE) -> bool:
    """Take the libraries that were kept, if they are those that are wanted."""
    try:
        known = json.loads((keep / KEY).read_text())
    except (OSError, ValueError):
        return False
    if known != wanted:
        return False
    for name in BUILT:
        partial = package / f"{name}.tmp"
        shutil.copyfile(keep / name, partial)
        partial.replace(package / name)  # a process that has the old one open keeps it
    return True


def preserve(keep: Path, made: Mapping[str, str], package: Path = PACKAGE) -> None:
    """Keep the libraries, and what they were made of."""
    keep.mkdir(parents=True, exist_ok=True)
    for name in BUILT:
        shutil.copyfile(package / name, keep / name)
    (keep / KEY).write_text(json.dumps(made) + "\n")


def loaded() -> tuple[bool, str]:
    """Whether both libraries load, in a process of its own, and what it says."""
    done = subprocess.run([sys.executable, "-m", "resfuse._extension"], cwd=ROOT, capture_output=True, text=True)
    text = (done.stdout + done.stderr).strip()
    return done.returncode == 0 and text.count(": loaded") == 2, text


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if both libraries are there and load."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.build", description=summary(__doc__))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: take what is there")
    parser.add_argument("--keep", type=Path, required=True, metavar="DIR", help="where built libraries are kept")
    args = parser.parse_args(argv)
    if args.device == "cpu":
        fine, text = loaded()
        print(text)
        return 0 if fine or ": loaded" in text else 1

    import torch

    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no GPU", file=sys.stderr)
        return 1
    arch = arch_list(torch.cuda.get_device_capability())
    wanted = key(arch, torch.__version__)
    if restore(args.keep, wanted) and loaded()[0]:
        print(f"taken from {args.keep}: the sources are the same")
        return 0
    environment = {**os.environ, "FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": arch}
    if reasons := objections(args.device, environment):
        print("\n".join(reasons), file=sys.stderr)
        return 1
    done = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=environment)
    fine, text = loaded()
    print(text)
    if done.returncode or not fine:
        return done.returncode or 1
    preserve(args.keep, wanted)
    return 0


def _sources() -> Iterator[Path]:
    yield from (path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    yield from (ROOT / "setup.py", PACKAGE / "_build.py")


if __name__ == "__main__":
    sys.exit(main())
