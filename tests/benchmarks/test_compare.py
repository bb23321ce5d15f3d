"""A comparison of two commits: what the ratios say, and the tree of the other commit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("pandas")

from benchmarks import compare
from benchmarks.worker import ROOT


def in_a_checkout() -> bool:
    return subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True).returncode == 0


needs_git = pytest.mark.skipif(not in_a_checkout(), reason="not a git checkout")


def test_the_interval_of_a_median() -> None:
    """For 10 values the second and the ninth: 2 * (1 + 10) / 1024 = 2.1 %; with the third it would be 10.9 %."""
    values = [float(value) for value in (5, 3, 9, 1, 7, 10, 2, 8, 6, 4)]
    assert compare.median_interval(values) == (2.0, 9.0)
    assert compare.median_interval(values, confidence=0.85) == (3.0, 8.0)
    assert compare.median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0), "too few: all of them"


@pytest.mark.parametrize(("factor", "verdict"), [(1.1, "slower"), (0.9, "faster"), (1.0, "same")])
def test_ratios_pair_the_rounds(factor: float, verdict: str) -> None:
    """A disturbance that hits both sides of a round cancels."""
    base = [1.0, 1.0, 5.0, 1.0, 2.0, 1.0, 1.0, 9.0]
    noise = [0.99, 1.01, 1.0, 1.0, 0.99, 1.01, 1.0, 1.0]
    found = compare.ratio("x", base, [value * factor * wiggle for value, wiggle in zip(base, noise, strict=True)])
    assert found.median == pytest.approx(factor)
    assert found.verdict == verdict
    assert f"{factor:.3f}" in compare.line(found)


@needs_git
def test_a_commit_is_checked_out_once_with_its_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = {path.name for path in (ROOT / "resfuse").glob("*.so")}
    monkeypatch.setattr(compare, "CACHE", tmp_path)
    monkeypatch.setattr(compare, "native_digest", lambda folder: "the same")
    folder, commit = compare.checked_out("HEAD", cuda=False)
    assert (folder / "resfuse" / "__init__.py").is_file() and folder.name == commit
    assert {path.name for path in (folder / "resfuse").glob("*.so")} == built
    (folder / "mark").touch()
    assert compare.checked_out("HEAD", cuda=False) == (folder, commit)
    assert (folder / "mark").exists() and [*tmp_path.iterdir()] == [folder]


@needs_git
def test_what_cannot_be_compared_with_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["no-such-commit"]) == 2
    assert "expected a commit, got 'no-such-commit'" in capsys.readouterr().err


def test_the_digest_follows_the_native_sources(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    source = tmp_path / "csrc" / "a.cpp"
    source.write_text("1")
    first = compare.native_digest(tmp_path)
    (tmp_path / "README.md").write_text("x")
    assert compare.native_digest(tmp_path) == first
    source.write_text("2")
    assert compare.native_digest(tmp_path) != first


OPTIONS = ("--quick", "--device", "cpu", "--threads", "1")
COMMAND = [sys.executable, "-W", "ignore", "-m", "benchmarks.compare", "HEAD", *OPTIONS]


@needs_git
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "lines"),
    [(["--model", "cifar_resnet8", "--mode", "inference", "train", "--batch", "2"], 2), (["--overhead"], 12)],
)
def test_head_with_itself(arguments: list[str], lines: int) -> None:
    done = subprocess.run(
        [*COMMAND, "--rounds", "2", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(" [" in line for line in done.stdout.splitlines()) == lines
