"""`make gpu`: the build for one GPU, packages that are brought along, compute-sanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu import build, process, sanitize, wheels

ROOT = Path(__file__).resolve().parent.parent


def test_libraries_are_taken_only_if_all_is_the_same(tmp_path: Path) -> None:
    package, keep = tmp_path / "package", tmp_path / "keep"
    package.mkdir()
    for name in build.BUILT:
        (package / name).write_text(f"new {name}")
    wanted = build.key("9.0a", "2.11.0")
    build.preserve(keep, wanted, package)
    for name in build.BUILT:
        (package / name).write_text("old")
    assert not build.restore(keep, build.key("8.0+PTX", "2.11.0"), package)
    assert not build.restore(tmp_path / "none", wanted, package)
    assert (package / build.BUILT[0]).read_text() == "old"
    assert build.restore(keep, wanted, package)
    assert [(package / name).read_text() for name in build.BUILT] == [f"new {name}" for name in build.BUILT]


def test_only_the_gpu_that_is_there_is_built_for() -> None:
    assert [build.arch_list(one) for one in ((9, 0), (8, 6), (10, 0))] == ["9.0a", "8.6+PTX", "10.0+PTX"]


def test_an_old_setuptools_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    setuptools = pytest.importorskip("setuptools")
    assert not [reason for reason in build.objections("cpu", os.environ) if "setuptools" in reason]
    monkeypatch.setattr(setuptools, "__version__", "70.1")
    assert any("setuptools 70.1 is too old" in reason for reason in build.objections("cpu", os.environ))


def test_wheels_are_unpacked_without_a_network(tmp_path: Path) -> None:
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip("pip is not installed")
    folder, site = tmp_path / "wheels", tmp_path / "site"
    with pytest.raises(ValueError, match="has no files"):
        wheels.install(folder, site)
    folder.mkdir()
    info = "brought_along-1.0.dist-info"
    with zipfile.ZipFile(folder / "brought_along-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("brought_along.py", "there = True\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: brought-along\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    wheels.install(folder, site)
    assert (site / "brought_along.py").is_file()
    (folder / "broken-1.0-py3-none-any.whl").write_text("no wheel")
    with pytest.raises(ValueError, match="pip could not install"):
        wheels.install(folder, site)


def test_verdicts_of_the_sanitizer() -> None:
    def of(code: int | None, text: str) -> object:
        return sanitize.verdict(process.Finished(code, 2.0, text))["status"]

    assert of(0, "1.0\n113 problems\n========= ERROR SUMMARY: 0 errors\n") == "passed"
    assert of(0, "nothing ran") == "failed"
    assert of(99, "========= Invalid __global__ read of size 4 bytes\n") == "found"
    assert of(1, "Traceback") == "failed"
    assert of(None, "") == "unfinished"
    found = sanitize.verdict(process.Finished(99, 2.0, "x\n========= Invalid read\n=========\n"))
    assert found["text"] == "========= Invalid read"


def test_every_tool_sees_both_backends() -> None:
    jobs = sanitize.jobs("cuda")
    assert len(set(jobs)) == len(sanitize.TOOLS) * 2 * 3
    assert jobs[0].backend == "cuda" and jobs[-1].backend == "triton"
    assert jobs[0].command("/bin/tool")[:5] == ["/bin/tool", "--tool", "memcheck", "--error-exitcode", "99"]
    lines = sanitize.lines({str(jobs[0]): {"status": "found", "text": "a\nb"}}, jobs[:2])
    assert lines[1:] == ["  memcheck cuda bfloat16: found a | b", "  racecheck cuda bfloat16: not started "]
