"""The page that lists which layers of other people's models are fused."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from torch import nn
from torchvision.ops.misc import Conv2dNormActivation

from benchmarks import fused_models
from resfuse import fuse_
from resfuse.cli import catalogue
from tests import models


def test_page_is_up_to_date() -> None:
    text = fused_models.PAGE.read_text()
    for package in fused_models.PACKAGES:
        if f"{package} {version(package)}" not in text:
            pytest.skip(f"the page is of another version of {package} than {version(package)}")
    assert fused_models.page() == text, f"run {fused_models.COMMAND}"


def test_page_lists_every_model_once() -> None:
    rows = re.findall(r"^\| ([^|]+) \| \d+ of \d+ \|", fused_models.PAGE.read_text(), re.MULTILINE)
    assert rows == [entry.name for entry in catalogue.entries()]


def test_row_counts_layers_and_gives_reasons() -> None:
    def build() -> nn.Module:
        model = nn.Sequential(
            Conv2dNormActivation(3, 4), nn.Conv2d(4, 4, 1), Conv2dNormActivation(4, 4), models.projection(4, 4, 1)
        )
        model[3][1].register_forward_hook(lambda *_: None)
        return model

    model = build()
    entry = catalogue.Entry("tests", "three of four", build, models.call)
    row = fused_models.row(entry, model, fuse_(model))
    assert row == "| three of four | 2 of 4 | 2 of 3 | 2 | BatchNorm2d has hooks |"


def test_written_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        catalogue, "entries", lambda: iter([catalogue.Entry("a", "b", models.small_resnet, models.call)])
    )
    assert fused_models.main(["--output", str(tmp_path / "docs" / "page.md")]) == 0
    assert "| b | 12 of 12 | 12 of 12 | 12 | nothing |" in (tmp_path / "docs" / "page.md").read_text()
