"""The test files that cannot even be imported here, for lack of a package that they, or modules they import, need.

A machine with a GPU may have torch and pytest and little else, and no network.  It is found by reading imports, so that
no list has to be kept.  Only what a module imports at its top counts: tests that import more skip themselves.
"""

from __future__ import annotations

import ast
import importlib.util
import os
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = ("PIL", "hypothesis", "matplotlib", "numpy", "onnx", "rich", "setuptools", "sklearn", "timm", "torchvision")


def left_out(folder: Path) -> dict[str, list[str]]:
    """{"nn/test_modules.py": ["timm", "torchvision"]}: the files that cannot be imported, and what they miss."""
    absent = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    if not absent:
        return {}
    tests = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("test_*.py"))}
    found = {name: sorted(needed(path).intersection(absent)) for name, path in tests.items()}
    return {name: missing for name, missing in found.items() if missing}


def needed(path: Path) -> set[str]:
    """Packages from outside this repository that importing a file imports."""
    seen, waiting, packages = set[Path](), [path], set[str]()
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        for name in imports(file):
            own = files(name)
            waiting += own
            if not own:
                packages.add(name.partition(".")[0])
    return packages


@cache
def imports(path: Path) -> tuple[str, ...]:
    """Dotted names that a file imports when it is imported; `from a import b` is `a.b`."""
    found = []
    waiting = list(ast.parse(path.read_text()).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(found)


@cache
def files(name: str) -> tuple[Path, ...]:
    """The files of this repository that importing a dotted name executes; its last part may be no module."""
    parts = name.split(".")
    stems = [ROOT.joinpath(*parts[:end]) for end in range(1, len(parts) + 1)]
    return tuple(path for stem in stems for path in (stem / "__init__.py", stem.with_suffix(".py")) if path.is_file())


def imported_again(module: ModuleType) -> ModuleType:
    """A second copy of a module, which reads the environment variables that it reads at import as they are now."""
    specification = importlib.util.spec_from_file_location(f"{module.__name__}_again", str(module.__file__))
    assert specification is not None and specification.loader is not None
    copy = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(copy)
    return copy


def python_path() -> str:
    """PYTHONPATH of a process that a test starts: this repository, then what it was, for it may lead to packages."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
