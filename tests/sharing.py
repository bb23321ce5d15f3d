"""A pytest plugin: several processes, and several runs, share one suite.

    python -m pytest -p tests.sharing --share=out/suite --share-name=a

Each process collects everything and claims a few tests at a time, so that none waits for another; those of the GPU come
first, slow ones last.  Every outcome is a line of JSON in `<share>/<name>.jsonl` as soon as it is known.  What has an
outcome there is not run again: a run that was cut short, or whose process died, is continued by the same command.  The
caller (`benchmarks.gpu.suite`) removes the claims of those that are gone.  (Mind the `=`: pytest looks for its settings
before it knows these options, and would take their values for tests.)
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import pytest

TOGETHER = 12
"""Quick tests of one file that are claimed together: they share its fixtures and what was compiled for them."""
LONGEST = 40_000
"""Bytes of a line at most."""
COLLECTED = "collected.json"
"""The names of all tests that this run is about."""
LOST_DEVICE = 70
"""Exit status of a process whose CUDA context a test has destroyed: all that came after would fail as well."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sharing one suite between processes")
    group.addoption("--share", type=Path, metavar="DIR", help="where claims and outcomes are")
    group.addoption("--share-name", default=f"pid{os.getpid()}", metavar="NAME", help="of this process")
    group.addoption("--share-until", type=float, metavar="SECONDS", help="claim nothing after this time of the epoch")


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--share")
    if folder is not None:
        # The caller turns off what plugins there may be beside; processes that tests start get the default again.
        os.environ.pop("PYTEST_DISABLE_PLUGIN_AUTOLOAD", None)
        name, until = config.getoption("--share-name"), config.getoption("--share-until")
        config.pluginmanager.register(Sharing(folder, name, until), "sharing")


def urgency(nodeid: str, slow: bool) -> int:
    """0: claimed first.  What runs on a GPU comes before what does not, and what is quick before all that is slow."""
    words = nodeid.lower().replace("cuda_emulator", "")
    on_gpu = any(word in words for word in ("cuda", "triton", "gpu"))
    return (0 if on_gpu else 1) + (2 if slow else 0)


def chunks(tests: Sequence[tuple[str, bool]]) -> list[list[str]]:
    """What is claimed together, in the order in which it is claimed, of (name, whether it is slow)."""
    ranked = sorted(tests, key=lambda test: urgency(*test))  # stable: files stay together
    found = []
    for (_, rank), group in itertools.groupby(ranked, key=lambda test: (test[0].partition("::")[0], urgency(*test))):
        names, size = [name for name, _ in group], 1 if rank >= 2 else TOGETHER
        found += [names[start : start + size] for start in range(0, len(names), size)]
    return found


def outcomes(folder: Path) -> dict[str, dict[str, Any]]:
    """The latest outcome of every test that has one: {name: {"test", "outcome", "seconds", "reason", "report"}}."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        for record in records(path):
            if "outcome" in record:
                found[record["test"]] = record
    return found


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a file to which a process may be writing: what is not complete is left out."""
    found = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def last_record(path: Path) -> dict[str, Any]:
    """The last line of such a file; empty where there is none yet."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LONGEST))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            record: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        return record
    return {}


class Sharing:
    """One of the processes."""

    def __init__(self, folder: Path, name: str, until: float | None) -> None:
        self._folder, self._name, self._until = folder, name, until
        self._reports: list[pytest.TestReport] = []
        (folder / "claims").mkdir(parents=True, exist_ok=True)
        self._log: TextIO = (folder / f"{name}.jsonl").open("a")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run what this process can claim."""
        if session.testsfailed:
            raise session.Interrupted(f"{session.testsfailed} errors during collection")
        items = {item.nodeid: item for item in session.items}
        self._list(items)
        if session.config.option.collectonly:
            return True
        claimed = self._claimed(items)
        item = next(claimed, None)
        while item is not None:
            following = next(claimed, None)  # pytest takes down the fixtures that the next test does not need
            self._run(item, following)
            item = following
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the reports of set-up, call and take-down until the test is over."""
        self._reports.append(report)

    def _claimed(self, items: dict[str, pytest.Item]) -> Iterator[pytest.Item]:
        tests = [(name, item.get_closest_marker("slow") is not None) for name, item in items.items()]
        for names in chunks(tests):
            if self._until is not None and time.time() > self._until:
                return
            claim = self._folder / "claims" / hashlib.sha256("\n".join(names).encode()).hexdigest()[:24]
            try:
                with claim.open("x") as file:
                    file.write(self._name)
            except FileExistsError:
                continue
            known = outcomes(self._folder)
            yield from (items[name] for name in names if name not in known)

    def _run(self, item: pytest.Item, following: pytest.Item | None) -> None:
        self._reports, begin = [], time.time()
        self._write(started=item.nodeid, at=begin, slow=item.get_closest_marker("slow") is not None)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        error = device_error()
        self._write(test=item.nodeid, seconds=round(time.time() - begin, 3), **summary(self._reports, error))
        if error is not None:
            os._exit(LOST_DEVICE)

    def _list(self, names: Collection[str]) -> None:
        """What there is to be run; the processes all find the same."""
        path = self._folder / f"{self._name}.tmp"
        path.write_text(json.dumps(sorted(names)))
        path.replace(self._folder / COLLECTED)

    def _write(self, **record: object) -> None:
        self._log.write(json.dumps(record) + "\n")
        self._log.flush()


def device_error() -> str | None:
    """Why the GPU can no longer be used by this process, None if it can."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except Exception as error:  # torch.AcceleratorError, RuntimeError: by version
        return str(error).partition("\n")[0]
    return None


def summary(reports: Sequence[pytest.TestReport], error: str | None = None) -> dict[str, str]:
    """Outcome, reason in one line, and report of a test: the first of its phases that did not pass decides."""
    if error is not None:
        return {"outcome": "failed", "reason": f"the GPU is lost after it: {error}", "report": _texts(reports)}
    for report in reports:
        if report.failed:
            outcome = "failed" if report.when == "call" else "error"
            return {"outcome": outcome, "reason": first_line(report), "report": _texts(reports)}
    for report in reports:
        if report.skipped:
            outcome = "xfailed" if hasattr(report, "wasxfail") else "skipped"
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            return {"outcome": outcome, "reason": reason.removeprefix("Skipped: ")[:200]}
    return {"outcome": "passed", "reason": ""}


def first_line(report: pytest.TestReport) -> str:
    """What went wrong: the message of the exception."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash is not None else str(report.longrepr)).strip().partition("\n")[0][:300]


def _texts(reports: Sequence[pytest.TestReport]) -> str:
    return "\n".join(report.longreprtext for report in reports if report.failed)[-6000:]
