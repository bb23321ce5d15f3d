"""The CSV files, and the tables, plots and README that are made of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("pandas")

import pandas as pd
import torch

from benchmarks import report, results
from benchmarks.case import Case, Setting
from benchmarks.results import RESULTS, ROOT
from tests.benchmarks.made_up import RUN, rows

CASE, SETTING = Case("add_relu", "a case", (), ((4, 8, 2, 2),)), Setting("inference", torch.bfloat16, "cpu", 2)
SPEEDS = {
    "eager_nchw": 125.0,
    "eager_channels_last": 100.0,
    "inductor": 80.0,
    "inductor_freezing": 67.0,
    "openvino": 50.0,
}
TEXT = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"


# CSV


def test_quantiles() -> None:
    assert results.quantiles([3.0]) == {"p20": 3.0, "p50": 3.0, "p80": 3.0, "samples": 1}
    assert results.quantiles([6.0, 1.0, 2.0, 3.0, 4.0, 5.0]) == {"p20": 2.0, "p50": 3.5, "p80": 5.0, "samples": 6}


def test_a_row_has_the_columns() -> None:
    row = results.row(CASE, SETTING, "resfuse", "time", "s", [1.0, 3.0]) | RUN
    assert set(results.COLUMNS) - set(row) == {"bytes", "flops", "roofline"}
    assert (row["shape"], row["x"], row["dtype"], row["p50"]) == ("4x8x2x2", 4, "bfloat16", 2.0)


def test_a_case_has_rows_of_one_run(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    later = RUN | {"date": "2026-11-22T00:00:00+00:00"}

    def write(name: str, providers: list[str], run: dict[str, object]) -> None:
        found = [results.row(CASE._replace(name=name), SETTING, one, "time", "s", [1.0]) for one in providers]
        ceiling = {
            **found[0],
            "op": results.CEILING,
            "name": "copy",
            "shape": "",
            "provider": "pytorch",
            "metric": "bandwidth",
        }
        results.update(path, [row | run for row in [ceiling, *found]])

    def read() -> set[tuple[str, str, str]]:
        return set(results.read(path)[["name", "provider", "date"]].itertuples(index=False, name=None))

    write("first", ["eager_nchw", "resfuse"], RUN)
    write("second", ["resfuse"], RUN)
    write("first", ["resfuse"], later)
    assert {("first", "resfuse", later["date"]), ("second", "resfuse", RUN["date"])} < read()
    assert ("first", "eager_nchw", RUN["date"]) not in read()
    assert len(results.read(path)) == 4, "two cases, and the ceilings of their two runs"
    write("second", ["resfuse"], later)
    assert {date for *_, date in read()} == {later["date"]}, "a ceiling without a case of its run is dropped"


def test_numbers_survive_the_file(tmp_path: Path) -> None:
    found = results.row(CASE, SETTING, "resfuse", "time", "s", [0.00123456]) | RUN | {"roofline": 0.5}
    results.update(tmp_path / "a.csv", [found])
    (read,) = results.read(tmp_path / "a.csv").to_dict("records")
    assert (read["p50"], read["roofline"], read["versions"]) == (0.00123456, 0.5, RUN["versions"])
    assert math.isnan(read["bytes"])


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("op,name\nadd_relu,x\n")
    with pytest.raises(ValueError, match="lacks the columns mode"):
        results.read(tmp_path / "a.csv")
    assert results.read(tmp_path / "none.csv").empty


def test_the_commit_can_be_given_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_COMMIT", "1234567")
    assert results.commit() == "1234567"


# Ratios


def test_ratios_are_against_channels_last_and_the_fastest_peer() -> None:
    table = report.times(rows({**SPEEDS, "resfuse": 62.5, "resfuse_cuda": 10.0}))
    assert list(table) == [*SPEEDS, "resfuse", "resfuse_cuda"]
    assert report.ratios(table).iloc[0].to_dict() == {"vs eager": 1.6, "vs fastest peer": pytest.approx(0.8)}
    without = report.times(rows({"eager_nchw": 125.0, "resfuse": 62.5}))
    assert report.ratios(without).iloc[0]["vs eager"] == 2.0
    assert report.ratios(report.times(rows({"eager_nchw": 125.0}))).isna().all(axis=None)


def test_means_of_ratios_are_geometric() -> None:
    found = pd.DataFrame({"a": [2.0, 0.5, math.nan, 8.0], "b": [math.nan] * 4})
    assert report.geometric_means(found) == ["2.00x", "-"]


def test_graph_times_stand_for_calls_where_there_are_any() -> None:
    called = rows({"eager_channels_last": 10.0, "inductor_reduce_overhead": 4.0, "resfuse": 8.0}, shape="1x3x224x224")
    replayed = rows({"eager_channels_last": 5.0, "resfuse": 2.0}, "graph_time", shape="1x3x224x224")
    both = pd.concat([called, replayed, rows(SPEEDS)], ignore_index=True)
    found = report.times(both, graphs=True)
    assert len(found) == 1, "the case of batch 16 was not captured"
    assert found.iloc[0].dropna().to_dict() == {
        "eager_channels_last": 5e-3, "inductor_reduce_overhead": 4e-3, "resfuse": 2e-3,
    }  # fmt: skip


def test_the_latest_run_of_a_case_counts() -> None:
    later = rows({"resfuse": 5.0}, date="2026-11-23T00:00:00+00:00")
    assert report.times(pd.concat([later, rows({"resfuse": 9.0})])).iloc[0]["resfuse"] == 5e-3


# README


def test_the_readme_has_what_the_results_give() -> None:
    """Else run `python -m benchmarks.report`."""
    assert report.main(["--check"]) == 0


def test_the_page_is_what_the_results_give() -> None:
    """Else run `python -m benchmarks.report`."""
    found = results.read(*sorted(RESULTS.glob("*.csv")))
    text = (RESULTS / "report.md").read_text()
    plots = [line.partition("](")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert report.page(found, plots) == text
    assert plots and all((RESULTS / name).is_file() for name in plots)
    assert "model-inference.png" in plots


def test_the_table_of_the_readme() -> None:
    found = pd.concat([rows({**SPEEDS, "resfuse": 62.5}), rows({"resfuse": 1.0}, shape="16x3x32x32")])
    text = report.readme_table(found)
    head = "|  | eager NCHW | eager channels_last | torch.compile | OpenVINO | **resfuse** | vs fastest peer |"
    assert head in text
    assert "| inference, float32, batch 16 | 125 | 100 | 67 | 50 | 62 | 0.80x |" in text
    assert "Speed of resfuse: inference 1.60x eager channels_last's, 0.80x the fastest peer's." in text
    assert "AMD EPYC, 2 threads; torch 2.11.0" in text.replace("\n", " ")
    assert "at most 20% of the median apart." in text.replace("\n", " ")


def test_a_gpu_comes_first_and_its_graphs_have_lines() -> None:
    gpu = {"device": "NVIDIA H200", "dtype": "bfloat16", "shape": "1x3x224x224"}
    found = [rows({"eager_channels_last": 10.0, "resfuse": 6.25}, **gpu)]
    found += [rows({"eager_channels_last": 1.0, "resfuse": 0.625}, "graph_time", **gpu)]
    text = report.readme_table(pd.concat([rows({**SPEEDS, "resfuse": 62.5}), *found]))
    assert text.index("NVIDIA H200") < text.index("AMD EPYC")
    assert "| inference, bfloat16, batch 1 | 10 | 6.25 | 1.60x |" in text
    assert "| inference, bfloat16, batch 1, CUDA graphs | 1 | 0.625 | 1.60x |" in text


def test_writing_twice_changes_nothing_more(tmp_path: Path) -> None:
    readme, folder = tmp_path / "README.md", tmp_path / "results"
    folder.mkdir()
    readme.write_text(TEXT)
    rows({**SPEEDS, "resfuse": 62.5}).to_csv(folder / "models.csv", index=False)
    line = [str(folder), "--readme", str(readme)]
    assert report.main([*line, "--check"]) == 1
    assert readme.read_text() == TEXT
    assert report.main([*line, "--no-plots"]) == 0
    once = readme.read_text()
    assert once.startswith("before\n") and once.endswith("\nafter\n") and "old" not in once
    assert report.main([*line, "--check"]) == 0
    assert "| 1.60x | 0.80x |" in (folder / "report.md").read_text()


@pytest.mark.parametrize("text", ["none", f"{report.END}\n{report.BEGIN}", TEXT + TEXT])
def test_a_readme_without_its_markers_is_left_alone(text: str) -> None:
    with pytest.raises(ValueError, match="expected one line"):
        report.replace(text, "new")


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    sweep = [rows({"eager_nchw": 10.0 * n, "resfuse": 5.0 * n}, shape=f"{n}x3x224x224") for n in (1, 2, 4)]
    layers = rows({"eager_nchw": 2.0, "resfuse": 1.0}, op="conv_bn_act", flops=1e9, bytes=1e7)
    ceilings = [rows({"pytorch": 1.0}, "bandwidth", op=results.CEILING, dtype="", p50=1e11)]
    ceilings += [rows({"pytorch": 1.0}, "rate", op=results.CEILING, p50=1e12)]
    names = plots.draw(pd.concat([*sweep, layers, *ceilings], ignore_index=True), tmp_path)
    assert names == ["model-inference.png", "conv_bn_act-roofline.png", "latency.png"]
    assert all((tmp_path / name).stat().st_size > 5000 for name in names)
    assert plots.draw(rows({}), tmp_path) == []


def test_committed_results_hold_what_pages_name() -> None:
    for name in ("models.csv", "conv_bn_act.csv", "overhead.csv", "memory.csv"):
        assert len(results.read(RESULTS / name)) > 20
    assert (ROOT / "benchmarks" / "results" / "model-train.png").is_file()
