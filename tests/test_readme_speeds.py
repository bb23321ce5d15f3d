"""The README's table of speeds, written between its markers."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import markdown, records, speeds
from benchmarks.records import ROOT
from tests import made_up_results as made_up

TEXT = f"before\n{markdown.BEGIN}\nold\n{markdown.END}\nafter\n"


def test_it_is_what_the_results_give() -> None:
    """Else run `python -m benchmarks.markdown`."""
    text = (ROOT / "README.md").read_text()
    section = markdown.section(speeds.read_all(markdown.committed()))
    assert markdown.replace(text, section) == text


def test_writing_twice_changes_nothing_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "model-inference.csv"
    readme.write_text(TEXT)
    records.update(results, made_up.case(made_up.CPU_SPEEDS, 1.0) + made_up.sweep())
    line = [str(results), "--readme", str(readme)]
    assert markdown.main([*line, "--check"]) == 1
    assert readme.read_text() == TEXT
    assert markdown.main(line) == 0
    once = readme.read_text()
    assert once.startswith("before\n")
    assert once.endswith("\nafter\n")
    assert "old" not in once
    assert markdown.main(line) == markdown.main([*line, "--check"]) == 0
    assert readme.read_text() == once
    assert "is current" in capsys.readouterr().out


def test_the_table() -> None:
    rows = made_up.case(made_up.CPU_SPEEDS, 0.1) + made_up.case(made_up.CPU_SPEEDS, 9.0, shape="3x3x224x224")
    text = markdown.section(rows)
    assert "| inference, float32, batch 16 | 125 | 100 | 67 | 50 | 62 | 0.80x |" in text
    assert "batch 3" not in text
    assert made_up.CPU.versions in text.replace("\n", " ")
    assert "Speed of resfuse: inference 1.60x eager channels_last's, 0.80x the fastest peer's." in text.replace(
        "\n", " "
    )


def test_a_gpu_comes_first_and_its_graphs_have_lines() -> None:
    one = {"shape": "1x3x224x224", "dtype": "bfloat16", "conditions": made_up.GPU}
    gpu = made_up.case(made_up.SPEEDS, 0.01, **one)
    text = markdown.section(made_up.case(made_up.CPU_SPEEDS, 0.1) + gpu + made_up.graphs(gpu, 10.0))
    assert text.index("NVIDIA H200") < text.index("a processor")
    assert "| inference, bfloat16, batch 1, CUDA graphs | 2 | 1 | 0.625 |" in text  # the fastest torch.compile
    assert "| inference, bfloat16, batch 1 | 20 | 10 | 6.25 |" in text


@pytest.mark.parametrize("text", ["none", f"{markdown.END}\n{markdown.BEGIN}", TEXT + TEXT])
def test_markers_have_to_be_there_once(text: str) -> None:
    with pytest.raises(ValueError, match="expected one line <!-- speed: begin -->"):
        markdown.replace(text, "new")


def test_without_results_it_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "other.csv"
    readme.write_text(TEXT)
    records.update(results, made_up.layers(2))
    assert markdown.main([str(results), "--readme", str(readme)]) == 1
    assert "no results of resnet50" in capsys.readouterr().err
    assert readme.read_text() == TEXT
