"""Plots of results: what is in them is tested as data, and that they are drawn, small, by drawing them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks import labels, plots, records
from benchmarks.plots import __main__ as command
from benchmarks.plots import batches, ratios, roofline, style
from benchmarks.records import Record
from tests import made_up_results as made_up

PAIR = {"eager_channels_last": 1.0, "resfuse": 2.0}


def test_a_ratio_needs_a_base_of_the_same_run() -> None:
    rows = made_up.case(PAIR, 4.0)
    (panel,) = ratios.panels(rows)
    assert panel.groups == {"resnet50\nbatch 16": {"eager_channels_last": (1, 1, 1), "resfuse": (2, 2, 2)}}
    assert "eager channels_last" in panel.label
    later = dataclasses.replace(made_up.CPU, date="2026-12-01")
    rows[1] = dataclasses.replace(rows[1], conditions=later)
    assert ratios.panels(rows) == []


def test_narrow_types_are_held_against_float32_too() -> None:
    rows = made_up.case(PAIR, 4.0) + made_up.case(PAIR, 1.0, dtype="bfloat16")
    titles = {(panel.title, panel.label): panel.groups for panel in ratios.panels(rows)}
    (against,) = [groups for (_, label), groups in titles.items() if "float32" in label]
    assert len(titles) == 3
    assert against["resnet50\nbatch 16"]["resfuse"].p50 == pytest.approx(8.0)


def test_quantiles_of_a_speed_are_those_of_its_time_turned_around() -> None:
    rows = made_up.case({"eager_channels_last": 1.0}, 4.0)
    spread = dataclasses.replace(made_up.row("resfuse", 2.0), p20=1.0, p80=4.0)
    (panel,) = ratios.panels([*rows, spread])
    assert panel.groups["resnet50\nbatch 16"]["resfuse"] == (4.0, 2.0, 1.0)
    assert ratios._spreads([panel.groups["resnet50\nbatch 16"]["resfuse"]]) == [[1.0], [2.0]]


def test_many_cases_are_lines_of_dots() -> None:
    (panel,) = ratios.panels(made_up.layers(12))
    assert panel.dotted
    assert panel.providers[0] == "eager_nchw"
    assert panel.providers[-1] == "resfuse"
    (panel,) = ratios.panels(made_up.layers(3))
    assert not panel.dotted


def test_saved_bytes_are_compared_at_one_batch() -> None:
    rows = [
        made_up.row(provider, size * batch, metric="saved_bytes", unit="B", mode="train", shape=f"{batch}x3x32x32")
        for batch in (8, 2, 4)
        for provider, size in {"eager_channels_last": 10.0, "resfuse": 8.0}.items()
    ]
    (panel,) = ratios.panels(rows)
    assert list(panel.groups) == ["resnet50\nbatch 8"]
    assert panel.groups["resnet50\nbatch 8"]["resfuse"].p50 == pytest.approx(0.8)
    assert "lower is better" in panel.label


def test_the_roof_is_that_of_the_run() -> None:
    rows = made_up.layers(6)
    (panel,) = roofline.panels(rows)
    assert (panel.roof.bandwidth, panel.roof.rates) == (made_up.BANDWIDTH, {"bfloat16": made_up.RATE})
    assert len(panel.points) == 6 * len(made_up.SPEEDS)
    # At a speed of 2 a layer takes twice the time of the roofline, at a speed of 3 a third more.
    fractions = {
        point.name: point.rate / panel.roof.attainable(point.intensity, "bfloat16")
        for point in panel.points
        if point.provider == "resfuse"
    }
    assert fractions["resnet50 layer0"] == pytest.approx(0.5, rel=1e-4)
    assert fractions["resnet50 layer1"] == pytest.approx(0.75, rel=1e-4)
    assert {point.name for point in roofline.furthest(panel)[:2]} == {"resnet50 layer0", "resnet50 layer3"}
    assert roofline.panels([row for row in rows if row.level != records.CEILINGS]) == []


def test_lines_over_the_batch() -> None:
    rows = made_up.sweep()
    milliseconds, rates, *_ = batches.latency_charts(rows)
    assert list(milliseconds.lines["resfuse", "-"]) == [1, 8, 32, 128, 256]
    assert milliseconds.lines["resfuse", "-"][128] == pytest.approx((2e-4 + 5e-5 * 128) / 2 * 1e3)
    assert rates.lines["resfuse", "-"][128] == pytest.approx(128 / ((2e-4 + 5e-5 * 128) / 2))
    (memory,) = batches.memory_charts(rows)
    assert memory.lines["inductor", "-"][256] == pytest.approx((0.5 + 0.09 * 256) * 0.8)
    assert memory.lines["inductor", ":"][256] == pytest.approx((0.5 + 0.09 * 256) * 0.8 * 0.95)
    resident = [dataclasses.replace(row, conditions=made_up.CPU) for row in rows]  # the process, libraries and all
    assert batches.memory_charts(resident) == []
    assert batches.memory_charts([row for row in resident if row.metric != "time"])  # tensors, counted
    two = [row for row in rows if row.shape.startswith(("1x", "8x"))]
    assert batches.latency_charts(two) == batches.memory_charts(two) == []


def test_providers_are_told_apart() -> None:
    names = [*made_up.SPEEDS, "resfuse_cpu", "cudnn_other", "inductor_freezing", "onnxruntime", "openvino", "new", "n2"]
    looks = style.styles(names)
    assert len({(look.color, look.hatch) for look in looks.values()}) == len(names)
    assert looks == style.styles(reversed(names))
    assert all(looks[name] == style.styles([name])[name] for name in style.KNOWN if name in names)


def brightness(color: str) -> float:
    """Relative luminance, which every kind of colour vision sees (WCAG 2)."""
    parts = [int(color[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_forms_of_one_system_differ_in_brightness_or_pattern() -> None:
    looks = list(style.styles(made_up.SPEEDS).values())
    for index, one in enumerate(looks):
        for other in looks[index + 1 :]:
            if one.marker == other.marker and one.hatch == other.hatch:
                assert abs(brightness(one.color) - brightness(other.color)) > 0.04, (one, other)


def test_conditions_are_told_once() -> None:
    later = dataclasses.replace(made_up.CPU, date="2026-11-23T10:00:00", commit="def")
    rows = [made_up.row("resfuse", 1.0), made_up.row("resfuse", 1.0, conditions=later)]
    text = labels.conditions_text(rows)
    assert text == f"a processor, 2 threads; {made_up.CPU.versions}; commit abc, def, 2026-11-21 to 2026-11-23"


@pytest.mark.parametrize(
    ("rows", "suffixes"),
    [
        (made_up.case(made_up.SPEEDS, 1.0) + made_up.case(made_up.SPEEDS, 1.0, dtype="bfloat16"), [""]),
        (made_up.layers(23), ["", "-roofline"]),
        (made_up.sweep(), ["", "-latency", "-peak"]),
        ([made_up.row("resfuse", 1.0)], []),
    ],
    ids=["models", "layers", "batches", "nothing"],
)
def test_files(rows: list[Record], suffixes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "results.csv"
    records.update(path, rows)
    assert command.main([str(path)]) == 0
    drawn = sorted(tmp_path.glob("*.png"))
    assert drawn == [tmp_path / f"results{suffix}.png" for suffix in sorted(suffixes, key=lambda text: f"{text}.png")]
    assert all(10_000 < plot.stat().st_size < 150_000 for plot in drawn)
    said = capsys.readouterr().out
    assert all(str(plot) in said for plot in drawn) if drawn else "nothing to draw" in said


def test_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    assert command.main([str(other)]) == 0
    assert "other.csv has nothing to draw" in capsys.readouterr().out
    other.write_text(",".join(records.COLUMNS) + "\nmodel,resnet50\n")
    for path in (other, tmp_path / "none.csv"):
        assert command.main([str(path)]) == 1
        assert path.name in capsys.readouterr().err


def test_kinds_of_plots_are_documented() -> None:
    assert all(f"`<file>{suffix}.png`" in (plots.__doc__ or "") for suffix in plots.KINDS)
