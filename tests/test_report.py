"""Tables, pages and the README's section: they say what the rows say."""

from __future__ import annotations

import dataclasses
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import aims, labels, markdown, plots, records, report, result_page, roofs, speeds, summary
from benchmarks.plots import batches
from benchmarks.providers import PROVIDERS
from benchmarks.records import ROOT, Record
from tests import made_up_results as made_up

CPU_SPEEDS = {"eager_nchw": 0.8, "eager_channels_last": 1.0, "inductor": 1.5, "onnxruntime": 2.0, "resfuse": 1.6}


def graphs(rows: list[Record], faster: float) -> list[Record]:
    """The same rows as CUDA graphs."""

    def times(row: Record) -> dict[str, float]:
        return {name: value / faster for name, value in row.quantiles._asdict().items()}

    return [dataclasses.replace(row, metric="graph_time", **times(row)) for row in rows]


def printed(tables: object) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    for table in tables:  # type: ignore[attr-defined]
        report.show_table(console, table)
    return console.export_text()


class TestSpeeds:
    def test_the_best_peer_is_none_of_ours(self) -> None:
        rows = made_up.case({**CPU_SPEEDS, "resfuse_compiled": 9.0}, 1.0)
        (one,) = speeds.comparisons(rows)
        assert one.best_peer == "onnxruntime"
        assert one.against_best_peer() == pytest.approx(0.8)
        assert one.speed("resfuse", one.base) == pytest.approx(1.6)
        assert (one.batch, one.image) == (16, "3x224x224")

    def test_the_latest_run_of_a_case_counts(self) -> None:
        later = dataclasses.replace(made_up.CPU, date="2027-01-01")
        old, new = made_up.case(CPU_SPEEDS, 1.0), made_up.case(CPU_SPEEDS, 2.0, conditions=later)
        memory = [made_up.row("resfuse", 5.0, metric="peak_memory", unit="B")]
        for rows in (old + new + memory, new + memory + old):
            timed = [one for one in speeds.comparisons(rows) if one.times]
            assert [one.first.conditions.date for one in timed] == ["2027-01-01"]
        apart = [made_up.row("resfuse", 5.0, metric="peak_memory", unit="B", conditions=later)]
        assert len(speeds.comparisons(old + apart)) == 2

    def test_graphs_are_a_view_of_their_own(self) -> None:
        rows = made_up.case(CPU_SPEEDS, 1.0)
        own = made_up.case({"inductor_reduce_overhead": 3.0}, 1.0)  # which captures its graphs itself
        (one,) = speeds.comparisons(rows + own + graphs(rows, 4.0))
        by_calls, by_graphs = one.views
        assert by_calls.best_peer == "inductor_reduce_overhead"
        assert by_graphs.best_peer == "onnxruntime"
        assert by_graphs.median("resfuse") == pytest.approx(1 / 1.6 / 4)
        assert by_graphs.median("inductor_reduce_overhead") == pytest.approx(1 / 3)
        assert [view.graphed for view in speeds.views(speeds.comparisons(rows))] == [False]

    def test_a_roof_is_that_of_the_run(self) -> None:
        other = dataclasses.replace(made_up.GPU, date="2027-01-01")
        rows = made_up.ceilings() + [
            dataclasses.replace(row, p50=row.p50 / 2) for row in made_up.ceilings(other)
        ]  # fmt: skip
        assert roofs.ceilings(rows, made_up.GPU).bandwidth == made_up.BANDWIDTH
        assert roofs.ceilings(rows, other).rates == {"bfloat16": made_up.RATE / 2}
        roof = roofs.ceilings(rows, made_up.GPU)
        assert roof.attainable(1.0, "bfloat16") == made_up.BANDWIDTH
        assert roof.attainable(1e6, "bfloat16") == made_up.RATE
        assert roofs.ceilings(rows, made_up.CPU) == roofs.Ceilings(0.0, {})

    def test_geometric_mean(self) -> None:
        assert speeds.geometric_mean([0.5, None, 2.0]) == pytest.approx(1.0)
        assert speeds.geometric_mean([4.0]) == pytest.approx(4.0)
        assert speeds.geometric_mean([None]) is None


def test_versions_are_told_once() -> None:
    versions = ("torch 2.11.0, resfuse 0.1.0 (cpu, reference)", "torch 2.11.0, resfuse 0.1.0 (cpu, reference), peer v1")
    runs = [dataclasses.replace(made_up.CPU, versions=text) for text in versions]
    text = labels.conditions_text(made_up.row("resfuse", 1.0, conditions=run) for run in runs)
    assert (
        text == "a processor, 2 threads; torch 2.11.0, resfuse 0.1.0 (cpu, reference), peer v1; commit abc, 2026-11-21"
    )


def test_names_of_providers() -> None:
    assert labels.label("inductor_max_autotune") == "torch.compile max autotune"
    assert labels.label("resfuse_cuda") == "resfuse cuda"
    assert labels.label("eager_channels_last") == "eager channels_last"


class TestTerminal:
    def test_all_tables_fit(self) -> None:
        sweep, layers = made_up.sweep(), made_up.layers(4)
        text = printed([*report.case_tables(layers), *report.summary_tables([*sweep, *layers])])
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text
        assert "resnet50 layer0" in text

    def test_columns_that_matter_less_give_way(self) -> None:
        rows = made_up.case(CPU_SPEEDS, 1.0)
        for metric in ("error_output", "launches", "host_time", "peak_memory", "minor_faults", "system_time"):
            rows += [made_up.row(name, 123.0, metric=metric, unit="1") for name in CPU_SPEEDS]
        rows += made_up.case(CPU_SPEEDS, 0.5, dtype="bfloat16")
        text = printed(report.case_tables(rows))
        assert "…" not in text
        assert "launches" in text
        assert "system" not in text
        assert "fp32" in text

    def test_summary(self) -> None:
        rows = made_up.case(CPU_SPEEDS, 1.0) + made_up.case(CPU_SPEEDS, 4.0, shape="1x3x224x224")
        rows += graphs(made_up.case(CPU_SPEEDS, 4.0, shape="1x3x224x224"), 8.0)
        by_calls, by_graphs = report.summary_tables(rows)
        assert "CUDA graphs" in str(by_graphs.title)
        assert by_calls.row_count == 3  # two batches and their mean
        assert by_graphs.row_count == 1
        text = printed([by_calls])
        assert text.count("onnxruntime") == 2
        assert text.count("0.80x") == 3
        assert text.count("1.60x") == 3


class TestReadme:
    TEXT = f"before\n{markdown.BEGIN}\nold\n{markdown.END}\nafter\n"

    def test_it_is_what_the_results_give(self) -> None:
        """Else run `python -m benchmarks.markdown`."""
        text = (ROOT / "README.md").read_text()
        section = markdown.section(speeds.read_all(markdown.committed()))
        assert markdown.replace(text, section) == text

    def test_writing_twice_changes_nothing_more(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        readme, results = tmp_path / "README.md", tmp_path / "model-inference.csv"
        readme.write_text(self.TEXT)
        records.update(results, made_up.case(CPU_SPEEDS, 1.0) + made_up.sweep())
        line = [str(results), "--readme", str(readme)]
        assert markdown.main([*line, "--check"]) == 1
        assert readme.read_text() == self.TEXT
        assert markdown.main(line) == 0
        once = readme.read_text()
        assert once.startswith("before\n")
        assert once.endswith("\nafter\n")
        assert "old" not in once
        assert markdown.main(line) == markdown.main([*line, "--check"]) == 0
        assert readme.read_text() == once
        assert "is current" in capsys.readouterr().out

    def test_the_table(self) -> None:
        rows = made_up.case(CPU_SPEEDS, 0.1) + made_up.case(CPU_SPEEDS, 9.0, shape="3x3x224x224")
        text = markdown.section(rows)
        assert "| inference, float32, batch 16 | 125 | 100 | 67 | 50 | 62 | 0.80x |" in text
        assert "batch 3" not in text
        assert made_up.CPU.versions in text.replace("\n", " ")
        assert "1.60x the speed of eager channels_last, and 0.80x that of the fastest peer" in text.replace("\n", " ")

    def test_a_gpu_comes_first_and_its_graphs_have_lines(self) -> None:
        one = {"shape": "1x3x224x224", "dtype": "bfloat16", "conditions": made_up.GPU}
        gpu = made_up.case(made_up.SPEEDS, 0.01, **one)
        text = markdown.section(made_up.case(CPU_SPEEDS, 0.1) + gpu + graphs(gpu, 10.0))
        assert text.index("NVIDIA H200") < text.index("a processor")
        assert "| inference, bfloat16, batch 1, CUDA graphs | 2 | 1 | 0.625 |" in text  # the fastest torch.compile
        assert "| inference, bfloat16, batch 1 | 20 | 10 | 6.25 |" in text

    @pytest.mark.parametrize("text", ["none", f"{markdown.END}\n{markdown.BEGIN}", TEXT + TEXT])
    def test_markers_have_to_be_there_once(self, text: str) -> None:
        with pytest.raises(ValueError, match="expected one line <!-- speed: begin -->"):
            markdown.replace(text, "new")

    def test_without_results_it_stays(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        readme, results = tmp_path / "README.md", tmp_path / "other.csv"
        readme.write_text(self.TEXT)
        records.update(results, made_up.layers(2))
        assert markdown.main([str(results), "--readme", str(readme)]) == 1
        assert "no results of resnet50" in capsys.readouterr().err
        assert readme.read_text() == self.TEXT


class TestAims:
    def outcome(self, rows: list[Record]) -> dict[str, tuple[str, str]]:
        return {outcome.aim.text: (outcome.text, outcome.verdict) for outcome in aims.outcomes(rows)}

    def test_nothing_measured(self) -> None:
        assert {verdict for _, verdict in self.outcome([]).values()} == {"not measured"}
        other = dataclasses.replace(made_up.GPU, device="NVIDIA A100")
        rows = made_up.case(made_up.SPEEDS, 1.0, shape="128x3x224x224", dtype="bfloat16", conditions=other)
        assert {verdict for _, verdict in self.outcome(rows).values()} == {"not measured"}

    def test_met_and_missed(self) -> None:
        found = self.outcome(made_up.sweep())
        inference, train = (
            "NVIDIA H200: inference, bfloat16, batch 128: at least ",
            "NVIDIA H200: train, bfloat16, batch 256: ",
        )
        assert found[inference + "2.5x eager channels_last"] == ("2.00x", "missed")
        assert found[inference + "1.5x torch.compile max autotune"] == ("1.25x", "missed")
        assert found[train + "at least 1.5x eager channels_last"] == ("2.00x", "met")
        assert found[train + "at least 1.25x torch.compile"] == ("1.25x", "met")  # against its fastest mode
        assert found[train + "peak memory at most 1 of torch.compile's"] == ("0.94", "met")
        assert found[train + "peak memory at most 0.55 of eager channels_last's (later)"] == ("0.75", "missed")
        latency = next(text for text in found if "0.20 ms" in text)
        assert found[latency] == ("-", "not measured")  # only by calls, not by graphs

    def test_every_run_can_tell(self) -> None:
        """A later run without the peer does not take the result away."""
        later = dataclasses.replace(made_up.CPU, date="2027-01-01")
        rows = made_up.case({"openvino": 2.0, "resfuse": 1.9}, 1.0)
        rows += made_up.case({"eager_nchw": 1.0, "resfuse": 5.0}, 1.0, conditions=later)
        assert "0.95x" in {text for text, _ in self.outcome(rows).values()}
        (measured,) = [outcome for outcome in aims.outcomes(rows) if outcome.measured is not None]
        assert measured.run == made_up.CPU.date
        page = result_page.page(rows)  # and shows both runs
        assert "| resnet50, run of 2026-11-21 3x224x224 | 16 |" in page
        assert "| resnet50, run of 2027-01-01 3x224x224 | 16 |" in page

    @pytest.mark.parametrize(("seconds", "verdict"), [(0.15e-3, "met"), (0.25e-3, "missed")])
    def test_latency_is_that_of_graphs(self, seconds: float, verdict: str) -> None:
        subject = {"shape": "1x3x224x224", "dtype": "bfloat16", "conditions": made_up.GPU, "metric": "graph_time"}
        found = self.outcome(made_up.case({"resfuse": 1.0}, seconds, **subject))
        assert next(outcome for text, outcome in found.items() if "0.20 ms" in text) == (
            f"{seconds * 1e3:.3f} ms",
            verdict,
        )

    def test_a_processor_has_an_aim_of_its_own(self) -> None:
        found = self.outcome(made_up.case({"openvino": 2.0, "resfuse": 1.9}, 1.0))
        assert found["CPU: inference, float32, batch 16: at least 1x OpenVINO"] == ("0.95x", "missed")


class TestPage:
    def test_layers_on_which_a_peer_is_faster(self) -> None:
        rows = made_up.layers(6)
        rows = [dataclasses.replace(row, name=row.name + " x3") if row.name.endswith("layer0") else row for row in rows]
        slower = result_page.behind(speeds.comparisons(rows))
        assert [entry.one.first.name for entry in slower] == ["resnet50 layer0 x3", "resnet50 layer3"]
        assert {entry.peer for entry in slower} == {"tensorrt"}
        most = slower[0]
        each = most.one.times["resfuse"].p50 - most.one.times["tensorrt"].p50
        assert most.lost == pytest.approx(3 * each)
        text = result_page.page(rows)
        assert "2 of 6:" in text
        assert "| resnet50 layer0 x3 | inference, bfloat16, batch 128 | TensorRT | 10 | 8 | 6 | 0.80x | 50% |" in text

    def test_graphs_decide_where_there_are_any(self) -> None:
        rows = made_up.layers(2)
        captured = graphs([row for row in rows if row.provider != "tensorrt" and row.level == "layer"], 10.0)
        assert result_page.behind(speeds.comparisons(rows))
        assert not result_page.behind(speeds.comparisons(rows + captured))
        assert "None of 2." in result_page.page(rows + captured)

    def test_it_tells_machines_ceilings_means_and_failures(self) -> None:
        failed = made_up.row("cudnn_graph", 1.0, metric="left_out", unit="1", level="layer", conditions=made_up.GPU)
        idle = dataclasses.replace(failed, provider="tensorrt", p50=0.0)  # which had nothing to offer
        wide = dataclasses.replace(made_up.row("eager_nchw", 1.0, shape="2x3x224x224"), p80=2.0)
        text = result_page.page([*made_up.layers(3), failed, idle, *made_up.case(CPU_SPEEDS, 1.0), wide])
        assert "Ceilings, measured in the run: 4000 GB/s; bfloat16 800 TFLOP/s." in text
        assert "in so many cases: cuDNN graph (1)." in text
        assert "The spread is over 15% in 1 of 6 times" in text
        mean = (0.8 * 1.2 * 1.2) ** (1 / 3)
        assert f"{mean:.2f}x that of the best peer" in text
        assert "## Models, inference, float32, a processor, 2 threads" in text

    def test_files(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        records.update(tmp_path / "model-inference.csv", made_up.case(CPU_SPEEDS, 1.0))
        (tmp_path / "resources.csv").write_text("kernel,registers\nconv,200\n")  # somebody else's

        def no_plots(*_: object) -> list[Path]:
            raise ModuleNotFoundError("No module named 'matplotlib'")

        with monkeypatch.context() as patch:
            patch.setattr(plots, "draw", no_plots)
            assert summary.main([str(tmp_path)]) == 0
        assert "Plots were left out: No module named 'matplotlib'." in (tmp_path / "report.md").read_text()
        pytest.importorskip("matplotlib")
        assert summary.main([str(tmp_path)]) == 0
        assert "](model-inference.png)" in (tmp_path / "report.md").read_text()
        assert (tmp_path / "model-inference.png").exists()
        assert str(tmp_path / "report.md") in capsys.readouterr().out

    def test_several_folders(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        first, second = tmp_path / "first", tmp_path / "second"
        records.update(first / "model-inference.csv", made_up.case(CPU_SPEEDS, 1.0))
        records.update(second / "layer-inference.csv", made_up.layers(2))
        assert summary.write([first, tmp_path / "none", second])[-1] == first / "report.md"
        page = (first / "report.md").read_text()
        assert "## Layers, inference" in page
        assert "](../second/layer-inference-roofline.png)" in page
        assert (second / "layer-inference-roofline.png").exists()

    def test_a_bare_machine_gets_its_page(self, tmp_path: Path) -> None:
        """Without rich and matplotlib, as a GPU server may be."""
        records.update(tmp_path / "layer-inference.csv", made_up.layers(3))
        code = (
            "import sys; sys.modules.update(rich=None, matplotlib=None)\n"
            "from benchmarks import markdown, summary\n"
            "sys.exit(summary.main(sys.argv[1:]))"
        )
        done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        page = (tmp_path / "report.md").read_text()
        assert "Plots were left out" in page
        assert "## Layers, inference, bfloat16" in page

    def test_a_folder_without_results(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for folder in (tmp_path, tmp_path / "none"):
            assert summary.main([str(folder)]) == 1
            assert f"no CSV files that the benchmarks wrote in {folder}" in capsys.readouterr().err
        assert not (tmp_path / "none").exists()


class TestDocumentation:
    """benchmarks/README.md names what there is."""

    TEXT = (ROOT / "benchmarks" / "README.md").read_text()

    def test_providers(self) -> None:
        assert [name for name in PROVIDERS if f"`{name}`" not in self.TEXT] == []

    def test_columns(self) -> None:
        assert [name for name in records.COLUMNS if f"`{name}`" not in self.TEXT] == []

    def test_metrics_that_are_read_here(self) -> None:
        read = (speeds.TIME, speeds.GRAPH_TIME, speeds.LEFT_OUT, *batches.MEMORY)
        assert [name for name in read if f"`{name}`" not in self.TEXT] == []

    def test_plots(self) -> None:
        assert [suffix for suffix in plots.KINDS if f"`<file>{suffix}.png`" not in self.TEXT] == []

    def test_commands(self) -> None:
        """All that can be run."""
        named = set(re.findall(r"`benchmarks\.(\w+)[ `]", self.TEXT))
        folder = ROOT / "benchmarks"
        there = {path.stem for path in folder.glob("*.py") if 'if __name__ == "__main__"' in path.read_text()}
        there |= {path.parent.name for path in folder.glob("*/__main__.py")}
        assert named <= there
        assert there - named <= {"saved_bytes"}  # a part of `benchmarks.memory`
