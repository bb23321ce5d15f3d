"""The pages in docs/ and the README: examples run, links and names are right, and the site builds."""

from __future__ import annotations

import doctest
import importlib
import linecache
import logging
import os
import pydoc
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import resfuse
from resfuse import cli
from tests import needs
from tests.needs import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]

WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "resfuse").rglob("*.py"))
    if ">>> " in path.read_text()
]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)
each_linked_page = pytest.mark.parametrize("page", LINKED, ids=name_of)


class Block(NamedTuple):
    """A fenced block of a page."""

    line: int
    language: str
    title: str
    source: str


def blocks(page: Path) -> list[Block]:
    """Also holds that each is closed, and has a language and a title at most."""
    text = page.read_text()
    found = re.finditer(r'^```(\w*)(?: title="([^"]*)")?\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)
    result = [Block(text[: match.start()].count("\n") + 1, match[1], match[2] or "", match[3]) for match in found]
    assert 2 * len(result) == len(re.findall("^```", text, re.MULTILINE)), f"{name_of(page)}: an unknown kind of block"
    return result


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def names_in(text: str) -> set[str]:
    """The names in backticks."""
    return set(re.findall(r"`([^`\n]+)`", text))


# Examples


@pytest.fixture
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Examples run on one thread, and leave no files, log level or random state behind."""
    monkeypatch.chdir(tmp_path)
    level, random, threads = logging.getLogger("resfuse").level, torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch.set_num_threads(threads)
    logging.getLogger("resfuse").setLevel(level)
    torch.set_rng_state(random)


@each_page
@pytest.mark.usefixtures("clean")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch.export and torch.onnx
def test_examples_run(page: Path) -> None:
    """Blocks marked `python` run one after the other, in one namespace; those with a title are scripts (below)."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python" and not block.title:
            code = "\n" * block.line + block.source  # so that a traceback has the line of the page
            lines = code.splitlines(keepends=True)
            linecache.cache[name_of(page)] = (len(code), None, lines, name_of(page))  # as a notebook does
            try:
                exec(compile(code, name_of(page), "exec"), namespace)
            except ModuleNotFoundError as error:
                if error.name not in (*needs.OPTIONAL, "onnxscript"):
                    raise
                pytest.skip(str(error))


SCRIPTS = [page for page in PAGES if any(block.title for block in blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", SCRIPTS, ids=name_of)
def test_script_runs_on_two_processes(page: Path, tmp_path: Path) -> None:
    """The blocks with a title are one script; the first title is its name and the command that starts it."""
    pytest.importorskip("torchvision")
    parts = [block for block in blocks(page) if block.title]
    script, _, command = parts[0].title.partition(": ")
    assert command == f"torchrun --nproc-per-node=2 {script}"
    assert all(block.language == "python" and block.title.startswith(script) for block in parts)
    (tmp_path / script).write_text("\n".join(block.source for block in parts))
    # gloo's first connection can time out on a busy machine.
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    environment = {**os.environ, "PYTHONPATH": needs.python_path(), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*run, script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    torch.manual_seed(0)
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


def test_every_public_function_has_an_example() -> None:
    finder = doctest.DocTestFinder(recurse=False)
    for name in resfuse.__all__:
        function = getattr(resfuse, name)
        if isinstance(function, types.ModuleType):
            continue
        assert any(test.examples for test in finder.find(function)), function


# Links and names


def anchors(page: Path) -> set[str]:
    """Those that headings get, on GitHub and by mkdocs alike."""
    found = set()
    for heading in re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        found.add(re.sub(r"[ ]", "-", re.sub(r"[^\w\- ]", "", text.strip().lower())))
    return found


@each_linked_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target}: no such file"
        if page in DOCS:
            assert linked.is_relative_to(ROOT / "docs"), f"{target}: the built pages cannot reach it"
        if anchor:
            assert anchor in anchors(linked), f"{target}: no such heading"


@each_linked_page
def test_names_exist(page: Path) -> None:
    """Every `resfuse.name`, also in examples, and what a page imports from resfuse."""
    for name in set(re.findall(r"(?<![\w/.-])resfuse(?:\.\w+)+", page.read_text())):
        if not name.endswith((".py", ".h")):
            assert pydoc.locate(name) is not None, name


@each_linked_page
def test_paths_exist(page: Path) -> None:
    for name in names_in(prose(page)):
        if re.fullmatch(r"(benchmarks|csrc|docs|examples|requirements|resfuse|tests)/[\w./-]*", name):
            assert (ROOT / name).exists() or (page.parent / name).exists(), name


@each_page
def test_commands_exist(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"python -m resfuse (\w+)", text):
        assert name in cli.COMMANDS, name
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for name in re.findall(r"`make ([\w-]+)|^make ([\w-]+)", text, re.MULTILINE):
        assert "".join(name) in targets, name


def test_environment_variables_are_the_ones_that_are_read() -> None:
    read = re.compile(r"RESFUSE_[A-Z0-9_]*[A-Z0-9]")
    sources = [*(ROOT / "resfuse").rglob("*.py"), ROOT / "setup.py"]
    used = {name for path in sources for name in read.findall(path.read_text())}
    native = [path.read_text() for path in (ROOT / "csrc").rglob("*.cpp")]
    used |= {name for text in native for name in re.findall(r'"(RESFUSE_[A-Z0-9_]+)"', text)}
    assert set(read.findall((ROOT / "docs" / "backends.md").read_text())) == used
    for page in PAGES:
        assert set(read.findall(page.read_text())) <= used


# The site


def test_build(tmp_path: Path) -> None:
    """`mkdocs build` in strict mode: a page that is not listed, or a link without a target, is an error."""
    pytest.importorskip("material", reason="needs mkdocs-material: pip install 'resfuse[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    built = tmp_path / "site" / "index.html"
    assert "resfuse" in built.read_text()
    for page in DOCS:
        html = (tmp_path / "site" / page.with_suffix(".html").name).read_text()
        outside = re.findall(r"""<(?:script|link|img)[^>]*(?:src|href)=["']?(https?://[^"'\s>]+)""", html)
        assert not outside, f"{page.name} loads {outside}"
