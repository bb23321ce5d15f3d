"""The pieces of `make gpu`: commands that hang or fail, going on, the summary, and a rehearsal on the CPU."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from resfuse import cli
from tools import gpu_run
from tools.gpu_run import Command, Run

OPS = {"models", "conv_bn_act", "bn_act", "add_relu"}
ROOT = Path(__file__).resolve().parents[2]


def run(tmp_path: Path, limit: float = 300.0, **commands: list[Command]) -> Run:
    made = Run(tmp_path / "out", tmp_path / "work", "cpu", True, limit)
    made.pieces = {**commands, "report": []}
    return made


def script(tmp_path: Path, name: str, text: str, minutes: float = 1.0, **options: bool) -> Command:
    """A command that runs a module with this text."""
    (tmp_path / f"made_{name}.py").write_text(text)
    return Command(name, (f"made_{name}",), minutes, least=0.0, **options)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_a_command_that_fails_or_hangs_does_not_stop_the_others(tmp_path: Path) -> None:
    hanging = script(tmp_path, "hanging", "import time\nprint('asleep', flush=True)\ntime.sleep(600)", minutes=0.05)
    failing = script(tmp_path, "failing", "raise SystemExit('no GPU answers')")
    fine = script(tmp_path, "fine", "print('all well')")
    one = run(tmp_path, check=[hanging, failing], verify=[fine])
    begun = time.monotonic()
    one.do(["check", "verify"], again=False)
    assert time.monotonic() - begun < 60
    statuses = {name: entry["status"] for piece in one.state.values() for name, entry in piece.items()}
    assert statuses == {"hanging": "failed", "failing": "failed", "fine": "done"}
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "hanging: its time was over" in summary
    assert "failing: exit status 1: no GPU answers" in summary
    assert "verify    done" in summary


def test_a_call_goes_on_where_another_ended_on_another_machine(tmp_path: Path) -> None:
    text = f"open({str(tmp_path / 'work' / 'count.txt')!r}, 'a').write('x')"
    first, late = script(tmp_path, "first", text), script(tmp_path, "late", text)._replace(least=1e6)
    run(tmp_path, check=[first, late]).do(["check"], again=False)
    (tmp_path / "work").rename(tmp_path / "gone")
    late = late._replace(least=0.0)
    again = run(tmp_path, check=[first, late])
    again.do(["check"], again=False)
    assert (tmp_path / "work" / "count.txt").read_text() == "xx", "the archive has the first one's file; late ran once"
    assert {entry["status"] for entry in again.state["check"].values()} == {"done"}
    hurried = run(tmp_path / "hurried", limit=1.0, check=[first])
    hurried.do(["check"], again=False)
    assert hurried.state == {}
    assert "check     left" in "\n".join(hurried.summary())


def test_what_resumes_is_called_again(tmp_path: Path) -> None:
    asleep = script(tmp_path, "asleep", "import time\ntime.sleep(600)", minutes=0.02, resumes=True)
    one = run(tmp_path, models=[asleep])
    one.do(["models"], again=False)
    assert one.state["models"]["asleep"]["status"] == "unfinished"
    assert "models    unfinished" in "\n".join(one.summary())


def test_tests_are_repeated_where_the_sources_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fine = script(tmp_path, "fine", "")
    one = run(tmp_path, check=[fine], ops=[fine])
    one.do(["check", "ops"], again=False)
    assert set(run(tmp_path, check=[fine], ops=[fine]).state) == {"check", "ops"}
    monkeypatch.setattr(gpu_run, "sources", lambda: "others")
    assert set(run(tmp_path, check=[fine], ops=[fine]).state) == {"ops"}, "measurements stay"


def test_failed_tests_are_named(tmp_path: Path) -> None:
    (tmp_path / "test_made.py").write_text("def test_fine(): pass\ndef test_bad(): assert 1 == 2")
    command = gpu_run.tests("suite", [str(tmp_path / "test_made.py")], 1)._replace(least=0.0)
    arguments = [word for word in command.arguments if word not in ("-n", "worksteal", "--dist") and not word.isdigit()]
    one = run(tmp_path, suite=[command._replace(arguments=tuple(arguments))])
    one.do(["suite"], again=False)
    summary = "\n".join(one.summary())
    assert "exit status 1" in summary and "1 failed, 1 passed" in summary
    assert "test_bad" in summary and "test_fine" not in summary


@pytest.mark.parametrize(("device", "quick"), [("cuda", False), ("cpu", True)])
def test_commands_exist_and_can_be_parsed(device: str, quick: bool) -> None:
    for package in ("torchvision", "pandas"):
        pytest.importorskip(package)
    from benchmarks import harness

    found = gpu_run.pieces(device, quick)
    assert set(found) == {*gpu_run.NAMES, "report"}
    measured = set()
    for module, *arguments in (command.arguments for commands in found.values() for command in commands):
        if module == "pytest":
            assert all((ROOT / word).exists() for word in arguments if word.startswith("tests"))
        elif module == "resfuse":
            assert arguments[0] in cli.COMMANDS
        else:
            assert importlib.util.find_spec(module), module
        package, _, op = module.partition(".")
        if package == "benchmarks" and op in OPS:
            measured.add(op)
            filled = [word.format(work="w", limit="60", device=device) for word in arguments]
            assert harness._parse(op, filled).limit == 60
    assert device == "cpu" or measured == OPS
    first = gpu_run.pieces("cuda", False)["sanitize"][0]
    assert first.program[1:3] == ("--tool", "memcheck")


def test_a_first_run_has_every_hardware_test_once() -> None:
    """In the order of their worth; a piece that selects no test would pass unnoticed."""
    collected = []
    for piece in ("fragments", "eight_warps", "hardware", "reduce_overhead"):
        (command,) = gpu_run.pieces("cuda", False)[piece]
        chosen = command.arguments[-3:]
        assert chosen[1] == "-k"
        collect = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", *chosen]
        done = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True, timeout=120)
        collected.append({line for line in done.stdout.splitlines() if "::" in line})
    assert all(collected), [len(found) for found in collected]
    assert len(set.union(*collected)) == sum(map(len, collected))
    assert any("test_products_on_hopper_are_exact" in name for name in collected[0])


def test_verdicts_of_the_first_contact_go_on_to_another_machine(tmp_path: Path) -> None:
    text = "import os\nfrom pathlib import Path\nfolder = Path(os.environ['XDG_CACHE_HOME'])\n"
    writes = script(tmp_path, "writes", text + "folder.mkdir()\n(folder / 'verdict').touch()")
    reads = script(tmp_path, "reads", text + "assert (folder / 'verdict').exists()")
    run(tmp_path, first_contact=[writes]).do(["first_contact"], again=False)
    (tmp_path / "work").rename(tmp_path / "gone")
    again = run(tmp_path, first_contact=[reads])
    again.do(["first_contact"], again=False)
    assert again.state["first_contact"]["reads"]["status"] == "done"


def test_arguments_that_cannot_be_are_refused() -> None:
    for arguments in (["--device", "cpu"], ["--piece", "nothing"]):
        with pytest.raises(SystemExit) as ended:
            gpu_run.main(arguments)
        assert ended.value.code == 2


def test_a_summary_comes_back_where_resfuse_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "gpu_run.py").write_text((ROOT / "tools" / "gpu_run.py").read_text())
    (tmp_path / "resfuse").mkdir()
    (tmp_path / "resfuse" / "__init__.py").write_text("raise ImportError('broken')")
    arguments = ["--device", "cpu", "--quick", "--piece", "check", "--output", "out"]
    command = [sys.executable, "tools/gpu_run.py", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "ImportError: broken" in done.stdout
    assert json.loads((tmp_path / "out" / "state.json").read_text())["check"]["info"]["status"] == "failed"


@pytest.mark.slow
def test_a_rehearsal(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--quick", "--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    status = gpu_run.main(
        [*arguments, "--limit", "560", "--piece", "check", "hardware", "first_contact", "ops", "overhead"]
    )
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert status == 0, summary
    assert (tmp_path / "work" / "results" / "report.md").is_file()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"state.json", "summary.txt", "files.tar.gz"}
