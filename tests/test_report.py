"""Tables for the terminal, and what benchmarks/README.md says there is."""

from __future__ import annotations

import io
import re

from rich.console import Console

from benchmarks import plots, records, report, speeds
from benchmarks.plots import batches
from benchmarks.providers import PROVIDERS
from benchmarks.records import ROOT
from tests import made_up_results as made_up


def printed(tables: object) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    for table in tables:  # type: ignore[attr-defined]
        report.show_table(console, table)
    return console.export_text()


class TestTerminal:
    def test_all_tables_fit(self) -> None:
        sweep, layers = made_up.sweep(), made_up.layers(4)
        text = printed([*report.case_tables(layers), *report.summary_tables([*sweep, *layers])])
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text
        assert "resnet50 layer0" in text

    def test_columns_that_matter_less_give_way(self) -> None:
        rows = made_up.case(made_up.CPU_SPEEDS, 1.0)
        for metric in ("error_output", "launches", "host_time", "peak_memory", "minor_faults", "system_time"):
            rows += [made_up.row(name, 123.0, metric=metric, unit="1") for name in made_up.CPU_SPEEDS]
        rows += made_up.case(made_up.CPU_SPEEDS, 0.5, dtype="bfloat16")
        text = printed(report.case_tables(rows))
        assert "…" not in text
        assert "launches" in text
        assert "system" not in text
        assert "fp32" in text

    def test_summary(self) -> None:
        rows = made_up.case(made_up.CPU_SPEEDS, 1.0) + made_up.case(made_up.CPU_SPEEDS, 4.0, shape="1x3x224x224")
        rows += made_up.graphs(made_up.case(made_up.CPU_SPEEDS, 4.0, shape="1x3x224x224"), 8.0)
        by_calls, by_graphs = report.summary_tables(rows)
        assert "CUDA graphs" in str(by_graphs.title)
        assert by_calls.row_count == 3  # two batches and their mean
        assert by_graphs.row_count == 1
        text = printed([by_calls])
        assert text.count("onnxruntime") == 2
        assert text.count("0.80x") == 3
        assert text.count("1.60x") == 3


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
        """All that can be run, and nothing else."""
        named = set(re.findall(r"`benchmarks\.(\w+)[ `]", self.TEXT))
        folder = ROOT / "benchmarks"
        there = {path.stem for path in folder.glob("*.py") if 'if __name__ == "__main__"' in path.read_text()}
        there |= {path.parent.name for path in folder.glob("*/__main__.py")}
        assert named == there
