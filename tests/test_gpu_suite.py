"""`make gpu`: commands that end in time, and a suite that survives what its tests do."""

from __future__ import annotations

import importlib
import importlib.util
import json
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.gpu import outcomes, process, suite
from tests import needs, sharing

ROOT = Path(__file__).resolve().parent.parent


# --- processes --------------------------------------------------------------------------------------------------------


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_command_is_logged_and_its_status_returned(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "one.log"
    first = process.run(python("print('first'); raise SystemExit(3)"), log=log, limit=60)
    second = process.run(python("print('second')"), log=log, limit=60)
    assert (first.status, second.status) == (3, 0)
    assert (first.tail.strip(), second.tail.strip()) == ("first", "second")
    assert log.read_text().split() == ["first", "second"]


def test_a_limit_ends_the_whole_family(tmp_path: Path) -> None:
    child = "import subprocess; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    beats: list[float] = []
    done = process.run(python(child), log=tmp_path / "log", limit=1.5, beat=lambda: beats.append(time.time()), grace=1)
    assert done.status is None
    assert done.seconds < 30
    assert beats
    pid = int(done.tail.split()[0])
    deadline = time.time() + 20
    while Path(f"/proc/{pid}/stat").exists() and time.time() < deadline:
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return  # dead, and not yet collected by whoever adopts orphans here
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()


def test_who_stops_in_good_order_has_time_to(tmp_path: Path) -> None:
    code = "import time\ntry:\n time.sleep(600)\nexcept KeyboardInterrupt:\n print('written')"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it, and its children
    try:
        done = process.run(python(code), log=tmp_path / "log", limit=3, grace=20)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.status, done.tail.strip()) == (None, "written")


# --- the suite --------------------------------------------------------------------------------------------------------

SAMPLE = """
import os, time
import pytest

@pytest.mark.parametrize("number", range(15))
def test_many(number):
    assert number != 7, "seven is wrong"

def test_crash():
    os.abort()

def test_hang():
    time.sleep(600)

def test_skipped():
    pytest.skip("no reason")

@pytest.mark.slow
def test_after_all():
    pass
"""


def test_the_suite_survives_crashes_and_hangs_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    share = tmp_path / "share"
    command = ["--share", str(share), "--device", "cpu", "--workers", "2", "--per-test", "4", "--limit", "120", "--"]
    assert suite.main([*command, str(tmp_path / "test_sample.py")]) == 1
    printed = capsys.readouterr().out
    assert "3 failed, 15 passed, 1 skipped" in printed
    for expected in ("test_crash: crashed: signal SIGABRT", "test_hang: hung", "seven is wrong", "no reason"):
        assert expected in printed
    report = json.loads((share / outcomes.MERGED).read_text())
    assert (report["left"], len(report["failures"])) == (0, 3)
    records = [record for path in share.glob("*.jsonl") for record in sharing.records(path) if "outcome" in record]
    assert max(Counter(record["test"] for record in records).values()) == 1, "a test ran twice"
    assert suite.main([*command, str(tmp_path / "test_sample.py")]) == 1, "outcomes are kept"
    assert "3 failed, 15 passed, 1 skipped" in capsys.readouterr().out
    assert sum(1 for path in share.glob("*.jsonl") for record in sharing.records(path) if "started" in record) == 19


def test_a_suite_that_can_not_be_collected_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_broken.py").write_text("import no_such_package_at_all")
    command = ["--share", str(tmp_path / "share"), "--device", "cpu", "--workers", "1", "--limit", "60", "--"]
    assert suite.main([*command, str(tmp_path / "test_broken.py")]) == 2
    printed = capsys.readouterr().out
    assert "no_such_package_at_all" in printed
    assert "no test was run" in printed


def test_what_runs_on_the_gpu_is_claimed_first() -> None:
    tests = [("a.py::plain", False), ("a.py::slow[cuda]", True), ("b.py::x[cuda-cuda]", False)]
    tests += [("a.py::y[cuda_emulator]", False), ("a.py::slow", True)]
    assert sharing.chunks(tests) == [
        ["b.py::x[cuda-cuda]"], ["a.py::plain", "a.py::y[cuda_emulator]"], ["a.py::slow[cuda]"], ["a.py::slow"],
    ]  # fmt: skip
    many = sharing.chunks([(f"a.py::t{number}", False) for number in range(30)])
    assert [len(chunk) for chunk in many] == [12, 12, 6]


def test_lines_that_are_being_written_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text('{"started": "a", "at": 1}\n{"test": "a", "outco')
    assert sharing.records(path) == [{"started": "a", "at": 1}]
    assert sharing.last_record(path) == {"started": "a", "at": 1}
    assert sharing.last_record(tmp_path / "none") == {}


def test_files_are_left_out_for_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    assert "timm" in needs.needed(ROOT / "tests" / "test_surgery_timm.py")
    assert "rich" in needs.needed(ROOT / "tests" / "test_triton_tune.py"), "through resfuse.cli.tune"
    monkeypatch.setattr(needs.importlib.util, "find_spec", lambda name: None if name == "timm" else find(name))
    found = needs.left_out(ROOT / "tests")
    assert found["test_surgery_timm.py"] == ["timm"]
    assert "test_bn_act.py" not in found
